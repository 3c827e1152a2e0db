"""What the driver and the machines say to each other: tasks, calls, replicas of a stage, and the answers.

`Driver` (driver.py) decides, an `Executor` does: ray_executor.py has the one on Ray.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from dailies.actors.messages import Request
from dailies.model.errors import DailiesError
from dailies.pipeline.scheduler.placement import Node, Placement
from dailies.pipeline.stages import Report, Stage

SAFE_AFTER = 2                          # failed attempts


class ClusterError(DailiesError, RuntimeError):
    """The cluster cannot run this pipeline; the message says what to do."""

    exit_code = 5


@dataclass(eq=False, kw_only=True, slots=True)
class Task:
    """A request on its way."""

    request: Request
    arrived: float
    stage_index: int = 0                # of the stage that it waits for or is in
    value: Any = None                   # what the stage before made: a reference that only the executor understands
    failures: int = 0                   # attempts charged
    losses: int = 0                     # machines lost under it, and inputs lost
    alone: bool = False                 # a suspect: a process died while it was there, and shares none now
    avoid: "Replica | None" = None      # where it failed last
    key: str | None = None              # whose work it shares in the first stage
    reports: list[Report] = field(default_factory=list)

    @property
    def safe(self) -> bool:
        """It has failed in the usual way and elsewhere, and is now worked on alone, in the smallest pieces."""
        return self.failures >= SAFE_AFTER

    @property
    def shares_none(self) -> bool:
        """No call and no process with another task."""
        return self.alone or self.safe


@dataclass(eq=False, kw_only=True, slots=True)
class Replica:
    """One process of a stage."""

    name: str
    stage: Stage
    stage_index: int
    placement: Placement
    state: str = "planned"              # planned, starting, loading, ready, leaving, ended
    calls: "deque[Call]" = field(default_factory=deque)
    started: float = 0.0
    since: float = 0.0                  # when it was started, or its last call ended
    rests_until: float = 0.0            # it gets nothing before: the store gave it trouble
    asked_at: float = 0.0               # whether it waits for another process on its GPU
    store_trouble: int = 0              # of the store in succession, seconds apart
    buckets: set[str] = field(default_factory=set)      # of clips that it has made from the start
    failed: set[str] = field(default_factory=set)       # clips that failed here since it last made one
    blamed: set[str] = field(default_factory=set)       # clips that failed here and were made elsewhere
    handle: Any = None                  # the executor's own

    def takes(self, depth: int, now: float) -> bool:
        """Whether it may be given a call, so that it has `depth` of them."""
        has_suspect = bool(self.calls) and any(task.shares_none for task in self.calls[-1].tasks)
        return len(self.calls) < depth and not has_suspect and self.rests_until <= now


@dataclass(eq=False, kw_only=True, slots=True)
class Call:
    replica: Replica
    kind: str                           # hello, load, ping, work
    serial: int
    tasks: list[Task] = field(default_factory=list)
    values: list = field(default_factory=list)      # references to what it will make, one per task; set by the executor
    safe: bool = False                  # see Task.safe
    last: bool = False                  # what it makes comes back in the answer, and `values` stays empty
    began: float = 0.0                  # when it was submitted, or became the first of its replica
    handle: Any = None                  # the executor's own


@dataclass(frozen=True, kw_only=True)
class Hello:
    """The process runs; `devices` are the node's names of its GPUs; so many processes were killed there before for want
    of memory."""

    devices: tuple[str, ...] = ()
    killed_for_memory: int = 0


@dataclass(frozen=True, kw_only=True)
class Alive:
    """The process has loaded, or still answers."""


@dataclass(frozen=True, kw_only=True)
class Done:
    made: list                          # per task: a Failure, or, of the last stage, its value; else None
    report: Report


@dataclass(frozen=True, kw_only=True)
class Broken:
    """The call gave nothing.

    died: the process ended.  hung: it took too long, and was ended.  node: its machine was lost or cannot be reached.
    unfit: its machine failed it: no disk, memory, GPU, library.  load: its steps could not be made.
    input: a value from an earlier stage is gone.  store: the store cannot be used.
    cancelled: it had not begun, or stopped where it can be continued.
    """

    how: str
    reason: str
    sure: bool = True                   # of unfit: it cannot have been what a single value asked for
    lasting: bool = False               # of unfit: no other process on that machine would fare better, as after load


Answer = Hello | Alive | Done | Broken


class Executor(Protocol):
    """Processes on machines. A replica begins its calls in the order they were submitted, as many at once as its
    stage's concurrency, and answers each when it is done."""

    def now(self) -> float: ...
    def nodes(self) -> list[Node]: ...
    def start(self, replica: Replica) -> None: ...
    def end(self, replica: Replica) -> None: ...
    def submit(self, call: Call) -> None: ...
    def cancel(self, call: Call) -> None: ...            # not begun: it never does; at work: it stops where it can
    def recall(self, call: Call) -> None: ...           # not begun: it never does; at work: it is let finish
    def kept_waiting_s(self, replica: Replica) -> float: ...  # of its first call: by the store, by others on its GPU
    def waits_for(self, replica: Replica) -> tuple[str, float] | None: ...  # who has its GPU, for how many seconds
    def wait(self, timeout_s: float) -> Iterable[tuple[Call, Answer]]: ...
