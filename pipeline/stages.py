"""What a pipeline means: stages in a row, each a few steps that run one after the other in one process.

`run_local` is the definition. `cluster.run` yields the same outcomes in any order, on many machines.
"""

import hashlib
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, Protocol

from dailies.actors.actor import Plain, as_actor
from dailies.actors.device_lock import DeviceLock, Halted
from dailies.actors.messages import Clip, Failure, Request
from dailies.pipeline.scheduler.faults import WorkerUnfit, lost_context, machine_fault, store_trouble
from dailies.pipeline.store import NotFound, StoreError


@dataclass(frozen=True, kw_only=True)
class Step:
    """How to make one actor: `actor(**args)` gives a callable from a list of values to a list as long."""

    actor: Callable[..., Callable[[list], list]]
    args: dict[str, Any] = field(default_factory=dict)
    name: str | None = None                             # names its seconds in the ledger; None: the stage's name

    def make(self) -> Callable[[list], list]:
        return self.actor(**self.args)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One kind of worker: what it runs, and what one replica of it needs."""

    name: str                                           # encode, sample, publish: names its seconds in the ledger
    steps: tuple[Step, ...]                             # in one process, so what passes between them never travels
    then: tuple[Step, ...] = ()                         # after them, in processes of its own beside it (pool.py):
    processes: int = 0                                  # so many; 0: in the same process
    concurrency: int = 1                                # calls within at once: one computes, others fetch, save, wait
    gpus: float = 0.0                                   # of one replica: a share of a GPU's memory, or whole GPUs
    cpus: float = 1.0                                   # of one replica; whole cores are its torch threads, 1 at least
    replicas: int | None = None                         # None: as many as fit (placement.py)
    batch: int = 1                                      # values per call, all of one bucket
    key: Callable[[Request], str] | None = None         # requests of one key share the work; the first stage only
    window: int | None = None                           # clips made ready ahead, then its resources go back; likewise

    def __post_init__(self) -> None:
        if self.gpus < 0 or self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"stage {self.name}: gpus must be a share of one GPU or a whole number; "
                             f"got {self.gpus:g}")
        if self.concurrency <= self.processes:
            raise ValueError(f"stage {self.name}: {self.processes} processes need a concurrency of "
                             f"{self.processes + 1} or more, so that one value is made while they work; "
                             f"got {self.concurrency}")

    @property
    def shares_gpus(self) -> bool:
        """It leaves a part of its GPU's memory to other stages, and takes turns with them."""
        return 0 < self.gpus < 1

    @property
    def depth(self) -> int:
        """Calls that one replica is given at once: so that one waits there, it never does."""
        return max(2, self.concurrency)

    @property
    def threads(self) -> int:
        """Fixed by the stage and not by the machine: results may depend on it in the last bit."""
        return max(1, int(self.cpus))


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one call of a worker cost."""

    seconds: dict[str, float]                           # per value, by step name; not what it waited for others
    worker: str
    device: str
    peak_memory_bytes: int                              # of the GPU in this call, or of the process since its start
    partly: bool = False                                # some was done in an earlier call: the seconds are no measure
    broken: bool = False                                # the GPU's context is lost, and every later call would fail
    pace_s: float | None = None                         # per value, where there is always a next one; None: the sum
    held_s: float = 0.0                                 # per value, with its GPU to itself; 0 on a CPU
    notes: tuple[tuple[str, str], ...] = ()             # clip_id, and what is to be told of how it was made


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one request, and what it cost."""

    value: Clip | Failure
    attempts: int = 1
    queue_s: float = 0.0                                # nobody worked on it
    seconds: dict[str, float] = field(default_factory=dict)    # by step name; shared work counts for one of the clips
    worker: str | None = None                           # where it spent the most seconds, or failed
    device: str | None = None                           # of that worker
    peak_memory_bytes: int | None = None                # the largest of the stages'
    gpu_s: float | None = None                          # with a GPU to itself, in all stages; None: on CPUs
    notes: tuple[str, ...] = ()                         # what was found in the run folder: used, or made again


class WorksOn(Protocol):
    """What does the rest beside a worker (pool.py)."""

    def reserve(self, requests: Sequence[Request]) -> AbstractContextManager[Any]: ...
    def kept_waiting_s(self) -> float: ...
    def __call__(self, values: list, safe: bool) -> tuple[list, Report]: ...


class Worker:
    """One replica of a stage. Making it loads; calling it never raises for a value's sake.

    What is not the value's fault passes through: StoreError, NotFound (a lost input), Halted, WorkerUnfit.
    Threads may call it side by side: steps that compute on its device take `lock` meanwhile.
    """

    def __init__(self, stage: str, steps: Iterable[Step], threads: int, name: str = "local",
                 halted: Callable[[], bool] | None = None, recalled: Callable[[], bool] = lambda: False,
                 pool: "WorksOn | None" = None, concurrency: int = 1):
        """halted: asked where a step can stop in the middle and lose nothing: is it to?  recalled: asked before a step
        computes: is it not to begin?  pool: works on what the steps have made.  concurrency: threads that call.
        """
        self.stage, self.threads, self.name, self.pool, self.concurrency = stage, threads, name, pool, concurrency
        self.broken = False
        self.steps = [(step.name or stage, as_actor(step.make())) for step in steps]
        self.torch: Any = sys.modules.get("torch")      # there if a step computes with it; slow to import for nothing
        self.gpu = next((step.device for _, step in self.steps if step.device.startswith("cuda")), None)
        self.device = self.torch.cuda.get_device_name(self.gpu) if self.torch and self.gpu else "cpu"
        self.mine = threading.local()                   # of each thread that calls
        device_id = self.device_id()
        self.on_gpu = self.gpu is not None or device_id is not None
        self.lock = DeviceLock(device_id, recalled, entered=self.began_on_device, leaving=self.ended_on_device)
        for _, step in self.steps:
            step.lock = self.lock
            if halted:
                step.halted = halted                    # type: ignore[method-assign]  # each worker tells its own steps

    def device_id(self) -> str | None:
        """What all processes on this machine call the GPU of this one; None without, and for who takes no turns."""
        if not all(step.takes_turns for _, step in self.steps):
            return None
        if self.gpu:
            return str(self.torch.cuda.get_device_properties(self.gpu).uuid)
        return next((step.device_id for _, step in self.steps if step.device_id), None)

    def began_on_device(self) -> None:
        if self.gpu:
            self.torch.cuda.reset_peak_memory_stats(self.gpu)

    def ended_on_device(self) -> None:
        if self.gpu and not self.broken:
            self.mine.peak = self.torch.cuda.max_memory_allocated(self.gpu)

    def kept_waiting_s(self) -> float:
        """By other processes on its device, in all, and by the store behind those of its pool."""
        return self.lock.kept_waiting_s() + (self.pool.kept_waiting_s() if self.pool else 0.0)

    def __call__(self, values: list, safe: bool = False) -> tuple[list, Report]:
        """What the steps make of the values, in order. A Failure passes untouched, or stands for what failed here.

        safe: as a last attempt. The steps are told, and a GPU's cached memory is given back.
        """
        for _, step in self.steps:
            step.safe = safe
        if safe and self.gpu:
            self.torch.cuda.empty_cache()
        if self.torch:
            self.torch.set_num_threads(self.threads)    # each time: in run_local, stages share one process
        self.mine.peak, held_s = 0, self.lock.held_s
        with self.pool.reserve([request_of(value) for value in values]) if self.pool else nullcontext():
            values, seconds = self.make(list(values))
            report = Report(seconds=seconds, worker=self.name, device=self.device, broken=self.broken,
                            partly=any(step.partly for _, step in self.steps),
                            notes=tuple(note for _, step in self.steps for note in step.notes),
                            held_s=(self.lock.held_s - held_s) / max(1, len(values)) if self.on_gpu else 0.0,
                            peak_memory_bytes=0 if self.broken else self.peak_memory())
            if self.pool:                               # a Failure passes it; frames are on the CPU already
                values, theirs = self.pool(values, safe)
                report = self.with_pool(report, theirs)
        return values, replace(report, pace_s=self.pace_s(report))

    def pace_s(self, report: Report) -> float:
        """Of this many threads that take turns on one device."""
        return max(report.pace_s or 0.0, report.held_s, sum(report.seconds.values()) / self.concurrency)

    def with_pool(self, mine: Report, theirs: Report) -> Report:
        seconds = dict(mine.seconds)
        for name, spent in theirs.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + spent
        return replace(mine, seconds=seconds, pace_s=theirs.pace_s,
                       peak_memory_bytes=mine.peak_memory_bytes or theirs.peak_memory_bytes)

    def make(self, values: list) -> tuple[list, dict[str, float]]:
        """What the steps of this process make, and the seconds of each, without what this thread waited for others."""
        seconds: dict[str, float] = {}
        for name, step in self.steps:
            began, waited_s = time.perf_counter(), self.lock.waited_s
            places = [place for place, value in enumerate(values) if not isinstance(value, Failure)]
            for place, made in zip(places, self.run(step, [values[place] for place in places]), strict=True):
                failed = isinstance(made, Failure)
                values[place] = replace(made, worker=self.name, device=self.device) if failed else made
            spent = time.perf_counter() - began - (self.lock.waited_s - waited_s)
            seconds[name] = seconds.get(name, 0.0) + spent / max(1, len(values))
        return values, seconds

    def run(self, step: Callable[[list], list], values: list) -> list:
        if not values:
            return []
        try:
            return results_of(step, values)
        except (StoreError, NotFound, Halted, WorkerUnfit):
            raise
        except Exception as error:
            if trouble := store_trouble(error):
                raise trouble from None
            unfit = self.unfit(error)
            if unfit and (unfit.sure or len(values) == 1):
                raise unfit from error
            if type(error).__name__ == "OutOfMemoryError" and self.gpu:
                self.torch.cuda.empty_cache()
            elif lost_context(error):
                self.broken = True
            if len(values) > 1:                         # one bad value must not cost its neighbours
                return [made for value in values for made in self.run(step, [value])]
            return [Failure(request=request_of(values[0]), stage=self.stage, error_type=type(error).__name__,
                            error=str(error), stack=digest_of(error), about_row=getattr(error, "about_row", False))]

    def unfit(self, error: Exception) -> WorkerUnfit | None:
        """What is wrong with the machine or this process, if it is that and not the value."""
        if self.broken and lost_context(error):         # under another thread's value
            return WorkerUnfit("its GPU's context is lost", sure=False)
        return machine_fault(error)

    def peak_memory(self) -> int:
        if self.gpu:
            return self.mine.peak or self.torch.cuda.max_memory_allocated(self.gpu)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Engine(Protocol):
    """What makes the outcomes of a render: pipeline/scheduler/cluster.py, or what is given in its place."""

    def connect(self, address: str, *, cpus: int | None,
                note: Callable[[str], None]) -> AbstractContextManager[None]: ...
    def run(self, stages: Sequence[Stage], requests: Iterable[Request], **options: Any) -> Iterator[Outcome]: ...


def results_of(step: Any, values: list) -> list:
    """What a step makes of values.  Raises TypeError, ValueError where that is not one for each."""
    made, name = step(values), type(step.call if isinstance(step, Plain) else step).__name__
    if not isinstance(made, list | tuple):
        raise TypeError(f"{name} must return a list; it returned {type(made).__name__}")
    if len(made) != len(values):
        raise ValueError(f"{name} must return a value for each that it gets; it got {len(values)} and returned "
                         f"{len(made)}")
    for value in made:
        if carries_request(values[0]) and not carries_request(value):
            raise TypeError(f"{name} must return values that carry their request, as those that it gets do; it "
                            f"returned {type(value).__name__}")
    return list(made)


def carries_request(value: Any) -> bool:
    return isinstance(value, Request) or isinstance(getattr(value, "request", None), Request)


def check_stages(stages: Sequence[Stage]) -> None:
    """Raises ValueError for one without a name or a step, and for two of one name: seconds are told by it."""
    names = [stage.name for stage in stages]
    for stage in stages:
        if not stage.name or not stage.steps:
            raise ValueError(f"a stage must have a name, by which its seconds are told, and a step; got {stage.name!r} "
                             f"and {len(stage.steps)} steps")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"every stage must have a name of its own; {names.count(twice[0])} are called {twice[0]}")


def digest_of(error: Exception) -> str:
    """Equal for errors that were raised along one path of calls, on any machine; then the end of that path."""
    frames = traceback.extract_tb(error.__traceback__)
    path = "\n".join(f"{PurePath(frame.filename).name}:{frame.lineno}" for frame in frames)
    last = frames[-1]
    return (f"{hashlib.sha256(path.encode()).hexdigest()[:8]} at {PurePath(last.filename).name}:{last.lineno} "
            f"in {last.name}")


def request_of(value: Any) -> Request:
    return value if isinstance(value, Request) else value.request


def readdress(value: Any, request: Request) -> Any:
    """A value made for another request of the same key, as this request's."""
    return value if isinstance(value, Request) or value.request is request else replace(value, request=request)


def run_local(stages: Iterable[Stage], requests: Iterable[Request]) -> Iterator[Outcome]:
    """Each request through all stages, one after the other, in this process. The definition of a pipeline."""
    check_stages(stages := list(stages))
    workers = [(stage, Worker(stage.name, (*stage.steps, *stage.then), stage.threads)) for stage in stages]
    shared: dict[str, tuple[str, Any]] = {}             # stage -> the last key and what it made
    for request in requests:
        value: Any = request
        reports: list[Report] = []
        for stage, worker in workers:
            key = stage.key and stage.key(request)
            if key and shared.get(stage.name, ("",))[0] == key and not isinstance(value, Failure):
                value = readdress(shared[stage.name][1], request)
                continue
            (value,), report = worker([value])
            reports.append(report)
            if key and not isinstance(value, Failure):
                shared[stage.name] = key, value
        yield outcome(value, reports)


def outcome(value: Clip | Failure, reports: list[Report], *, attempts: int = 1,
            waited_s: float | None = None) -> Outcome:
    """waited_s: seconds from the request's arrival until now; None: it never waited."""
    seconds: dict[str, float] = {}
    for report in reports:
        for name, spent in report.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + spent
    failed = value if isinstance(value, Failure) else None
    longest = max(reports, key=lambda report: sum(report.seconds.values()), default=None)
    return Outcome(value=value, attempts=attempts, seconds=seconds,
                   queue_s=0.0 if waited_s is None else max(0.0, waited_s - sum(seconds.values())),
                   worker=failed and failed.worker or (longest.worker if longest else None),
                   device=failed and failed.device or (longest.device if longest else None),
                   gpu_s=sum(report.held_s for report in reports) or None,
                   notes=tuple(text for report in reports for clip_id, text in report.notes
                               if clip_id == value.request.clip_id),
                   peak_memory_bytes=max((report.peak_memory_bytes for report in reports), default=None))
