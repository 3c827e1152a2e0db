"""Times the candidates on an sm_90 device: see README.md.

    python -m tests.candidates --out FILE.jsonl --budget 100 [--only attention,conv]

--only: of the candidates those with one of these in their case or name.  --tiny: on a CPU, in Triton's interpreter,
small shapes and no clock: the program's own test.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from tests.candidates.compiling import Compilers, compile_part


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.candidates")
    parser.add_argument("--out", default="candidates.jsonl")
    parser.add_argument("--budget", type=float, default=100, help="seconds")
    parser.add_argument("--only", default="")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--compile", nargs=3, metavar=("PART", "PARTS", "DONE"), help="what its child processes do")
    return parser.parse_args()


def main() -> int:
    began, said = time.perf_counter(), arguments()
    if said.tiny:                                      # Triton asks when a kernel is defined
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[2] / "build" / "triton-candidates"))
    compilers = None if said.tiny or said.compile else Compilers(said.only)
    import torch  # the compilers have begun
    import triton

    from tests.candidates import timing
    from tests.candidates.lists import everything
    candidates = [each for each in everything(tiny=said.tiny)
                  if any(part in f"{each.case.name} {each.name}" for part in said.only.split(","))]
    if said.compile:
        part, parts, done = said.compile
        return min(1, compile_part(candidates, int(part), int(parts), Path(done)))
    Path(said.out).parent.mkdir(parents=True, exist_ok=True)
    with open(said.out, "a", encoding="utf-8") as out, torch.inference_mode():
        if not compilers:
            timing.run_all(out, candidates, None, began, said.budget)
            return 0
        timing.watchdog(said.budget + 15, compilers)
        try:
            timing.report(out, {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                                "triton": triton.__version__, "candidates": len(candidates)})
            timing.run_all(out, candidates, compilers, began, said.budget)
        finally:
            compilers.stop()
        timing.report(out, {"seconds": round(time.perf_counter() - began, 1)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
