"""What a part of the kit stands on: its device, where it says what it found, and how a call is timed."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch

_SECONDS, LEAST, MOST = 0.3, 3, 100                      # of one measurement; its calls
FLUSHED = 1 << 29                                       # bytes: several times any cache, and a head start for the host


@dataclass(kw_only=True)
class Ground:
    """Where a part works and where it says what it found."""

    device: str
    tiny: bool                                          # sizes of a dry run
    file: TextIO
    failures: list[str] = field(default_factory=list)
    flushed: Any = None

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def tell(self, what: str, **figures: Any) -> None:
        """A line, written down at once."""
        self.file.write(json.dumps({"what": what} | figures) + "\n")
        self.file.flush()
        print(what, figures, flush=True)

    @contextlib.contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """What fails here costs one line; a lost context ends the part, since nothing after it would hold."""
        try:
            yield
        except Exception as error:
            self.tell(what, failed=f"{type(error).__name__}: {str(error).strip()[:400]}")
            self.failures.append(what)
            del error
            if self.on_gpu:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def ms(self, call: Callable[[], Any], seconds: float = _SECONDS) -> float:
        """Milliseconds of a call: the median by the device's own clock.

        Calls are queued, and before each the cache is written over: that hides what the host needs to launch one, and
        nobody finds what the last one left.
        """
        if not self.on_gpu:
            began = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - began)
        if self.flushed is None:
            self.flushed = torch.empty(FLUSHED, dtype=torch.int8, device=self.device)
        call()
        self.wait()
        began = time.perf_counter()
        call()
        self.wait()
        count = max(LEAST, min(MOST, int(seconds / (time.perf_counter() - began))))
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, stop in pairs:
            self.flushed.zero_()
            start.record()
            call()
            stop.record()
        self.wait()
        return sorted(start.elapsed_time(stop) for start, stop in pairs)[count // 2]

    def random(self, *shape: int, dtype: Any = None, seed: int = 0) -> Any:
        """Standard normals, drawn on the device: a CPU's generator takes ten seconds for 1e9 of them."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype or torch.bfloat16)

    def peak_gb(self) -> float:
        """Of memory since the last look, in 1e9 bytes."""
        if not self.on_gpu:
            return 0.0
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return peak


def difference(got: Any, want: Any) -> float:
    """|got - want| / |want|, in fp32; not a number where either is."""
    got, want = got.float(), want.float()
    return ((got - want).norm() / want.norm()).item()
