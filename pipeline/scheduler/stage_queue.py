"""The tasks that the driver holds, each in the queue of the stage that it waits for or is in."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from dailies.pipeline.scheduler.executor import Replica, Task
from dailies.pipeline.stages import Outcome, Stage

FOR_LATER = 256             # tasks that may wait for replicas about to start on GPUs: those have work meanwhile


@dataclass(eq=False, kw_only=True, slots=True)
class Shared:
    """Work that all tasks of one key share."""

    users: int = 0
    ready: bool = False
    value: Any = None
    leader: Task | None = None           # the one that works for all
    waiting: list[Task] = field(default_factory=list)


class StageQueue:
    """One stage's queue and its replicas."""

    def __init__(self, stage: Stage, index: int):
        self.stage, self.index = stage, index
        self.waiting: deque[Task] = deque()
        self.shared: dict[str, Shared] = {}
        self.sharing = 0                    # tasks that wait for another task of their key
        self.replicas: list[Replica] = []
        self.open = True                    # False: it gave its resources back
        self.done = self.in_flight = 0
        self.failed_starts = 0              # with no success since
        self.not_before = 0.0
        self.seconds: float | None = None   # of work on a value
        self.pace_s: float | None = None    # after which a replica takes the next
        self.holds_gpus = False             # seen to take a GPU's time, not its memory alone
        self.first_s = 0.0                  # the longest that a replica took for its first value of a bucket
        self.streak: set[str] = set()       # clips that failed here since it last made one, on any replica
        self.withheld: list[Outcome] = []   # failures of the streak: are they the tasks' own?

    @property
    def ready(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.state == "ready"]

    @property
    def pace_share(self) -> float:
        """Of a value's seconds, those in which the replica could not have taken another."""
        return self.pace_s / self.seconds if self.pace_s and self.seconds else 1.0

    @property
    def tasks(self) -> int:
        return len(self.waiting) + self.in_flight + self.sharing

    def take(self, replica: Replica) -> list[Task]:
        """The next tasks for a replica: all of one bucket; none that failed in it while there are others.

        A suspect works alone: no other task in its batch, none before or behind it in the process.
        """
        waiting, choosy = self.waiting, len(self.ready) > 1
        position = next((position for position, task in enumerate(islice(waiting, 8))
                         if not choosy or task.avoid is not replica), None)
        if position is None or waiting[position].shares_none and replica.calls:
            return []
        tasks = [waiting[position]]
        del waiting[position]
        while len(tasks) < self.stage.batch and not tasks[0].shares_none and position < len(waiting):
            task = waiting[position]
            if task.shares_none or task.request.bucket != tasks[0].request.bucket:
                break
            tasks.append(task)
            del waiting[position]
        return tasks


class StageQueues:
    """All queues. Work by key is shared in the first: there one task of a key works, and the others wait for it."""

    def __init__(self, stages: Sequence[Stage]):
        self.all = [StageQueue(stage, index) for index, stage in enumerate(stages)]
        for stage in stages[1:]:
            if stage.key is not None or stage.window is not None:
                raise ValueError(f"stage {stage.name}: only the first stage may have a key or a window")
        self.held = 0                       # tasks between the source and their outcome

    def __getitem__(self, index: int) -> StageQueue:
        return self.all[index]

    def __iter__(self) -> Iterator[StageQueue]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def add(self, task: Task) -> None:
        self.held += 1
        self.enter(task)

    def remove(self, task: Task) -> None:
        """The task has its outcome."""
        self.held -= 1
        if task.key is None:
            return
        first = self.all[0]
        shared = first.shared[task.key]
        shared.users -= 1
        if not shared.users:
            del first.shared[task.key]
        elif shared.leader is task:          # it failed; the next of its key tries for itself
            shared.leader = None
            first.sharing -= 1
            self.enter(shared.waiting.pop(0))

    def enter(self, task: Task) -> None:
        queue = self.all[task.stage_index]
        if queue.stage.key is None:
            queue.waiting.append(task)
            return
        first_time = task.key is None
        task.key = task.key or queue.stage.key(task.request)
        shared = queue.shared.setdefault(task.key, Shared())
        shared.users += first_time
        if shared.ready:
            task.value = shared.value
            self.advance(task)
        elif shared.leader in (None, task):
            shared.leader = task
            queue.waiting.append(task)
        else:
            shared.waiting.append(task)
            queue.sharing += 1

    def advance(self, task: Task) -> None:
        """The task's value is made; so is that of all tasks which waited for it."""
        queue = self.all[task.stage_index]
        waiting: list[Task] = []
        if task.key is not None and task.stage_index == 0 and not (shared := queue.shared[task.key]).ready:
            shared.ready, shared.value, shared.leader = True, task.value, None
            waiting, shared.waiting = shared.waiting, []
            queue.sharing -= len(waiting)
        task.stage_index += 1
        task.alone, task.avoid = False, None
        self.enter(task)
        for other in waiting:
            other.value = task.value
            self.advance(other)

    def restart(self, task: Task) -> None:
        """Its input is gone: back to the first stage, where what its key made may be gone too."""
        if task.key is not None and (shared := self.all[0].shared[task.key]).value is task.value:
            shared.ready, shared.value = False, None
        task.stage_index, task.value, task.alone, task.avoid = 0, None, False, None
        self.enter(task)

    def has_capacity(self, queue: StageQueue) -> bool:
        """May the queue take another task?"""
        if queue.stage.window is None:
            if queue.stage.shares_gpus and (not queue.ready or len(queue.ready) < len(queue.replicas)):
                return len(queue.waiting) < FOR_LATER
            feeders = len(self.all[queue.index - 1].replicas) if queue.index else 0
            return len(queue.waiting) < max(4, 2 * queue.stage.batch * len(queue.replicas), feeders)
        return queue.open and queue.tasks + self.ahead(queue) < self.window(queue)

    def ahead(self, queue: StageQueue) -> int:
        """Tasks that this queue has made ready and the next has not begun."""
        return len(self.all[queue.index + 1].waiting) if queue.index + 1 < len(self.all) else 0

    def window(self, queue: StageQueue) -> int:
        follower = self.all[min(queue.index + 1, len(self.all) - 1)]
        return max(queue.stage.window or 0, 4 * follower.stage.batch * max(1, len(follower.replicas)))

    def unbegun(self, queue: StageQueue) -> int:
        """Tasks held that this stage has still to begin."""
        return len(queue.waiting) + sum(before.tasks for before in self.all[:queue.index])
