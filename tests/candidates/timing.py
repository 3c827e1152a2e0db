"""Times candidates by events and compares what they make; a line of JSON for each."""

import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.candidates.compiling import Compilers

ROOM = 0.1                                             # seconds of calls of a candidate


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """What candidates are given and should make.

    name: section, colon, the rest.  inputs: device -> tensors, of no memory on "meta".  expected: of the inputs.
    bound: of the relative rms error, or of whole numbers of the share that differs.  work: operations of a call.
    """

    name: str
    inputs: Callable[[str], tuple]
    expected: Callable[..., Tensor]
    bound: float
    work: float = 0.0


@dataclass(frozen=True, eq=False)
class Candidate:
    case: Case
    name: str
    call: Callable[..., Tensor]                        # of the inputs
    compiles: bool = True                              # has Triton kernels to be made beforehand


def run_all(out: Any, candidates: list[Candidate], compilers: Compilers | None, began: float, budget: float) -> None:
    """compilers None: on a CPU, in Triton's interpreter.  began: when, by perf_counter; budget: seconds from then."""
    device, until = "cuda" if compilers else "cpu", began + budget
    flush = torch.empty(1 << 29 if compilers else 0, dtype=torch.int8, device=device)
    last = given = want = None
    waiting, late = list(enumerate(candidates)), []
    while waiting or late:
        if time.perf_counter() > until - 1:
            break
        if not waiting:                                # those that took long to compile, when all others are through
            waiting, late = late, []
        place, candidate = waiting.pop(0)
        if compilers and candidate.compiles:           # the first need the compilers to have begun
            patience = max(time.perf_counter() + 0.3, began + 0.45 * budget) if waiting or late else until
            if not compilers.wait(place, min(patience, until)):
                late.append((place, candidate))
                continue
        case = candidate.case
        line = {"case": case.name, "name": candidate.name}
        try:
            if last is not case:
                last = given = want = None             # before others are made: there is room for one
                torch.manual_seed(0)
                given = case.inputs(device)
                want = case.expected(*given)
                last = case
            spent = timed(lambda: candidate.call(*given), flush) if compilers else [0.0]
            got = candidate.call(*given)
            error = difference(got, want)
            median = statistics.median(spent)
            line |= {"ms": median, "best": min(spent), "calls": len(spent), "error": error, "right": error < case.bound,
                     "T/s": case.work / median / 1e9 if median else 0.0}
            got.fill_(torch.nan if got.is_floating_point() else -1)     # or the next finds there what it should make
            del got
        except Exception as failure:
            line["failed"] = f"{type(failure).__name__}: {failure}"
        report(out, line)
    if left := len(waiting) + len(late):
        report(out, {"left": left, "why": f"the budget of {budget:.0f} s is spent"})


def timed(call: Callable[[], Tensor], flush: Tensor) -> list[float]:
    """ms of every call, queued one behind the other; while the L2 cache is written over between, it is launched."""
    call()                                             # fetches the kernels
    flush.zero_()
    first = ms([clocked(call)])[0]
    clocks = []
    for _ in range(max(4, min(40, int(1e3 * ROOM / (first + 0.2))))):
        flush.zero_()
        clocks.append(clocked(call))
    return ms(clocks)


def clocked(call: Callable[[], Tensor]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    return start, end


def ms(clocks: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in clocks]


def difference(got: Tensor, want: Tensor) -> float:
    """Relative rms, NaN where one is; of whole numbers the share that differs."""
    if got.shape != want.shape:
        raise ValueError(f"made {list(got.shape)} instead of {list(want.shape)}")
    if not got.is_floating_point():
        return (got != want).float().mean().item()
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def report(out: Any, line: dict[str, Any]) -> None:
    out.write(json.dumps(line) + "\n")
    out.flush()
    if "failed" in line:
        print(f"{line['case']:66} {line['name']:32} FAILED {line['failed'][:160]}", flush=True)
    elif "ms" in line:
        wrong = "" if line["right"] else "  WRONG"
        print(f"{line['case']:66} {line['name']:32} {line['ms']:8.3f} ms {line['T/s']:6.0f} T/s  error "
              f"{line['error']:.1e}{wrong}", flush=True)
    else:
        print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)


def watchdog(seconds: float, compilers: Compilers) -> None:
    """A kernel that hangs must not hold the device: what is written is written."""
    def bark() -> None:
        print(f"stopped by the watchdog after {seconds:.0f} s: the kernel last begun hangs", flush=True)
        compilers.stop()
        os._exit(3)

    timer = threading.Timer(seconds, bark)
    timer.daemon = True
    timer.start()
