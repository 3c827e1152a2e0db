"""Compiles candidates for sm_90 in child processes, into Triton's cache, while the device works."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.candidates.timing import Candidate  # the children start before torch is imported

ROOT = Path(__file__).resolve().parent.parent.parent
JOBS = max(1, min(14, (os.cpu_count() or 2) - 2))      # at once


def compile_part(candidates: "list[Candidate]", part: int, parts: int, done: Path) -> int:
    """Every parts-th candidate, for a driver that only says sm_90; a file in `done` for each that is through.

    Returns how many failed. The process can run no kernel afterwards.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from dailies.kernels.int8_attention import kernel as int8_attention
    from dailies.kernels.sparse_attention import kernel as sparse_attention

    class Pretended:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

    def only_compile(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    driver.set_active(Pretended())
    run, JITFunction.run = JITFunction.run, only_compile
    # what the wrappers ask the device: tensors of no memory have none to ask
    int8_attention.num_stages_on = sparse_attention.num_stages_on = (
        lambda v: int8_attention.num_stages(v.dtype, roomy=True))
    failed = 0
    for place in range(part, len(candidates), parts):
        candidate = candidates[place]
        try:
            if candidate.compiles:
                candidate.call(*candidate.case.inputs("meta"))
        except Exception as error:                     # the main process meets it again, and reports it
            failed += 1
            print(f"{candidate.case.name}, {candidate.name}: {type(error).__name__} {error}", file=sys.stderr)
        (done / str(place)).touch()
    return failed


class Compilers:
    """Child processes that fill Triton's cache; `wait` until one candidate is there."""

    def __init__(self, only: str):
        self.done = Path(tempfile.mkdtemp(prefix="candidates-"))
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        said = [sys.executable, "-m", "tests.candidates", "--only", only, "--compile"]
        self.children = [subprocess.Popen([*said, str(part), str(JOBS), str(self.done)], cwd=ROOT, env=environment,
                                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                         for part in range(JOBS)]

    def wait(self, place: int, until: float) -> bool:
        """Whether it was made in time. A child that died has lost its part, which is then compiled where it is used."""
        child = self.children[place % JOBS]
        while not (self.done / str(place)).exists() and child.poll() is None:
            if time.perf_counter() > until:
                return False
            time.sleep(0.02)
        return True

    def stop(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()
        shutil.rmtree(self.done, ignore_errors=True)
