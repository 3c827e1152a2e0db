"""Which requests are begun: as the first stage has room, until a person asks to stop or the budget is spent."""

import math
from collections.abc import Callable, Iterable, Sequence

from dailies.actors.messages import Request
from dailies.pipeline.scheduler.budget import Budget
from dailies.pipeline.scheduler.executor import Replica, Task
from dailies.pipeline.scheduler.stage_queue import StageQueue, StageQueues


class Stop:
    """Asks a run to end early; may be used from a signal handler or another thread."""

    def __init__(self) -> None:
        self.draining = self.saving = self.at_once = False

    def drain(self) -> None:
        """Begin nothing new; what is being sampled is still published."""
        self.draining = True

    def save(self) -> None:
        """As drain, but what is being sampled stops between two steps; it is continued from there another time."""
        self.draining = self.saving = True

    def now(self) -> None:
        self.draining = self.at_once = True


class Intake:
    def __init__(self, requests: Iterable[Request], queues: StageQueues, budget: Budget, stop: Stop,
                 now: Callable[[], float]):
        self.requests, self.queues, self.budget, self.stop, self.now = iter(requests), queues, budget, stop, now
        self.coming: Request | None = None              # the next request: None when there is none

    def advance(self) -> None:
        self.coming = next(self.requests, None)

    @property
    def draining(self) -> bool:
        return self.stop.draining or self.budget.is_over

    @property
    def more(self) -> bool:
        """Whether another request will be taken."""
        return self.coming is not None and not self.draining

    def fill(self) -> None:
        """Take requests until the first queue is long enough."""
        first = self.queues[0]
        while (request := self.coming) is not None and self.more and self.queues.has_capacity(first):
            if self.budget.has_limit and not self.budget.fits(self.path_s(first, request), self.now()):
                self.budget.left_out += 1
                self.advance()
                continue
            task = Task(request=request, arrived=self.now())
            self.advance()
            self.queues.add(task)

    def unbegun(self, queue: StageQueue) -> float:
        """Tasks that this stage has still to begin."""
        return math.inf if self.more else self.queues.unbegun(queue)

    def take(self, queue: StageQueue, replica: Replica) -> list[Task]:
        """The next tasks for a replica. Those that would not become clips within the budget are left out of the run;
        what only the last stage has still to do is done in any case."""
        last = queue.index == len(self.queues) - 1
        while (tasks := queue.take(replica)) and not (last and queue.index) and not self.fits(queue, replica, tasks):
            self.budget.left_out += len(tasks)
            for task in tasks:
                self.queues.remove(task)
        return tasks

    def fits(self, queue: StageQueue, replica: Replica, tasks: Sequence[Task]) -> bool:
        """Whether tasks can become clips within the budget if this replica gets them now."""
        if not self.budget.has_limit:
            return True
        request, name, now = tasks[0].request, queue.stage.name, self.now()
        seconds = self.path_s(queue, request) + (len(tasks) - 1) * self.budget.seconds(name, request)
        for position, call in enumerate(call for call in replica.calls if call.tasks):
            takes_s = len(call.tasks) * self.budget.seconds(name, call.tasks[0].request) * queue.pace_share
            seconds += takes_s if position else max(0.0, takes_s - (now - call.began))
        if queue.stage.window is None:                  # what works ahead of a long queue is not judged by its length
            for later in self.queues.all[queue.index + 1:]:
                seconds += len(later.waiting) * (later.pace_s or 0.0) / max(1, len(later.ready))
        return self.budget.fits(seconds, now)

    def path_s(self, queue: StageQueue, request: Request) -> float:
        """Seconds of work on a request from this stage to the last."""
        return sum(self.budget.seconds(each.stage.name, request) for each in self.queues.all[queue.index:])
