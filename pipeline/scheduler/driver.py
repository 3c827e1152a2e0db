"""The driver's loop: which task waits where, who works on it, and what comes next.

It knows no Ray: an `Executor` starts processes, hands them calls and brings back answers (ray_executor.py).
It holds a window of tasks, never the whole night, so its memory is bounded.

    intake.py        which requests are begun          autoscaler.py    how many replicas, and where
    stage_queue.py   the tasks of each stage           failures.py      what a failure costs, and whom
    fleet.py         the replicas that run             watchdog.py      who is overdue
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from dailies.actors.messages import Clip, Failure, Request
from dailies.pipeline.scheduler.autoscaler import Autoscaler
from dailies.pipeline.scheduler.budget import Budget
from dailies.pipeline.scheduler.executor import Answer, Broken, Call, ClusterError, Done, Executor, Hello, Replica, Task
from dailies.pipeline.scheduler.failures import FailurePolicy
from dailies.pipeline.scheduler.fleet import Fleet
from dailies.pipeline.scheduler.intake import Intake, Stop
from dailies.pipeline.scheduler.placement import InsufficientCapacity, check
from dailies.pipeline.scheduler.progress import Progress, Reporter
from dailies.pipeline.scheduler.quarantine import Quarantine
from dailies.pipeline.scheduler.stage_queue import StageQueue, StageQueues
from dailies.pipeline.scheduler.watchdog import Watchdog
from dailies.pipeline.stages import Outcome, Stage, outcome

LOOK_S = 2.0                # between two looks at the machines
IDLE_S = 2.0                # after which a process is asked whether it lives before it gets a task
PATIENCE_S = 600.0          # nothing runs and nothing can be started: then the run ends
SAVING_S = 10.0             # in which a run that is told to save may still publish what is sampled
SAFE_NOTE = "made in attempt {}, in the safe profile: alone, in a quarter of the memory"


class Driver:
    def __init__(self, executor: Executor, stages: Sequence[Stage], requests: Iterable[Request], *,
                 max_attempts: int = 3, task_timeout_s: float | None = None,
                 on_progress: Callable[[Progress], None] | None = None, progress_every_s: float = 0.5,
                 stop: Stop | None = None, budget: Budget | None = None):
        self.executor, self.stages, self.queues = executor, list(stages), StageQueues(stages)
        self.stop, self.budget = stop or Stop(), budget or Budget()
        self.reporter = Reporter(on_progress, progress_every_s)
        self.intake = Intake(requests, self.queues, self.budget, self.stop, executor.now)
        self.fleet = Fleet(executor, self.queues)
        self.autoscaler = Autoscaler(self.fleet, self.intake, Quarantine(), self.reporter)
        self.failures = FailurePolicy(self.autoscaler, self.finish, max_attempts)
        self.watchdog = Watchdog(executor, self.queues, self.budget, self.reporter, task_timeout_s)
        self.results: list[Outcome] = []
        self.done = self.failed = 0
        self.look_at = -math.inf
        self.busy_at = executor.now()                   # when something last ran
        self.drained = False
        self.saving_since: float | None = None
        self.stopped: set[Call] = set()                 # that were at work, and asked to stop where they can

    def outcomes(self) -> Iterator[Outcome]:
        try:
            self.begin()
            while not self.stop.at_once:
                self.autoscaler.count_gpus()
                if self.intake.draining:
                    self.drain()
                self.intake.fill()
                self.autoscaler.tend_window()
                self.look()
                for queue in reversed(self.queues):     # what is nearly done first
                    self.dispatch(queue)
                if self.reporter.is_due(self.executor.now()):
                    self.tell()
                if finished := self.finished():
                    for queue in self.queues:
                        self.end_streak(queue)
                yield from self.results
                self.results.clear()
                if finished:
                    break
                for call, answer in self.executor.wait(self.timeout_s()):
                    self.settle(call, answer)
        finally:
            self.autoscaler.count_gpus(last=True)
            for replica in self.fleet.replicas:
                self.fleet.end(replica)
            self.tell()

    def begin(self) -> None:
        """Raises ClusterError where the machines can never run the stages."""
        self.intake.advance()
        if self.intake.coming is not None:
            self.autoscaler.look()
            try:
                check(self.stages, self.autoscaler.nodes)
            except InsufficientCapacity as error:
                raise ClusterError(str(error)) from None

    def finished(self) -> bool:
        if self.intake.draining:
            working = any(call.kind == "work" for replica in self.fleet.replicas for call in replica.calls)
            return not working and not (len(self.queues) > 1 and self.queues[-1].waiting and self.serves_last())
        return self.queues.held == 0 and self.intake.coming is None

    def drain(self) -> None:
        """Forget the tasks that no stage has begun; those that only the last stage waits for are still served."""
        for queue in self.queues.all[:-1]:
            queue.waiting.clear()
            for replica in queue.replicas:
                calls = [call for call in replica.calls if call.kind == "work"]
                for call in () if self.drained else calls[1:]:
                    self.executor.recall(call)
                for call in calls if self.stop.saving else ():
                    if call not in self.stopped:
                        self.stopped.add(call)
                        self.executor.cancel(call)
        self.drained = True

    def serves_last(self) -> bool:
        """Whether the last stage may begin something. Who tells a run to save does not wait long, and a finished latent
        is safe: a decoder that is only starting would be given hundreds."""
        if not self.stop.saving:
            return True
        self.saving_since = self.executor.now() if self.saving_since is None else self.saving_since
        return self.executor.now() - self.saving_since < SAVING_S

    def timeout_s(self) -> float:
        return max(0.0, min(0.5, self.look_at - self.executor.now()))

    def tell(self) -> None:
        self.reporter.tell(self.queues.all, done=self.done, failed=self.failed, now=self.executor.now())

    # What becomes of a task.

    def finish(self, task: Task, value: Clip | Failure) -> None:
        failed = isinstance(value, Failure)
        if task.safe and isinstance(value, Clip):
            value = replace(value, fallbacks=(*value.fallbacks, SAFE_NOTE.format(task.failures + 1)))
        result = outcome(value, task.reports, attempts=task.failures + (not failed),
                         waited_s=self.executor.now() - task.arrived)
        queue = self.queues[task.stage_index]
        if failed and queue.streak:
            queue.withheld.append(result)
        else:
            self.give(result)
        self.queues.remove(task)

    def give(self, result: Outcome) -> None:
        failed = isinstance(result.value, Failure)
        self.failed += failed
        self.done += not failed
        self.results.append(result)

    def end_streak(self, queue: StageQueue) -> None:
        """The stage works: what failed lately failed by itself."""
        queue.streak.clear()
        for result in queue.withheld:
            self.give(result)
        queue.withheld.clear()

    # Work.

    def dispatch(self, queue: StageQueue) -> None:
        """As many calls in each replica as keep it busy, unless so few tasks are left that another would idle."""
        last = queue.index == len(self.queues) - 1
        if not queue.waiting or self.intake.draining and not (last and queue.index and self.serves_last()):
            return
        if not last and queue.stage.window is None and not self.queues.has_capacity(self.queues[queue.index + 1]):
            return
        ready = queue.ready
        for depth in range(1, queue.stage.depth + 1):
            if depth > 1 and self.intake.unbegun(queue) <= len(ready):
                return
            for replica in ready:
                if not replica.takes(depth, self.executor.now()) or not (tasks := self.intake.take(queue, replica)):
                    continue
                if not replica.calls and self.executor.now() - replica.since > IDLE_S:
                    self.fleet.call(replica, "ping")
                queue.in_flight += len(tasks)
                self.fleet.call(replica, "work", tasks, last)

    def settle(self, call: Call, answer: Answer) -> None:
        replica = call.replica
        if call not in replica.calls:                   # its replica has ended meanwhile
            return
        queue = self.fleet.queue_of(replica)
        if isinstance(answer, Broken) and answer.how in ("died", "hung", "node", "load", "unfit"):
            self.failures.died(replica, answer, call)
            return
        was_first = call is replica.calls[0]
        replica.calls.remove(call)
        replica.since = self.executor.now()
        if replica.calls and was_first:
            replica.calls[0].began = replica.since
        if isinstance(answer, Hello):
            self.fleet.said_hello(replica, answer)
        elif call.kind == "load":
            replica.state = "ready"
            queue.failed_starts = 0
        elif call.kind == "work":
            queue.in_flight -= len(call.tasks)
            if isinstance(answer, Done):
                self.made(queue, replica, call, answer)
            elif isinstance(answer, Broken):
                self.failures.gave_nothing(call, answer)
        if replica.state == "leaving" and not replica.calls:
            self.fleet.end(replica)

    def made(self, queue: StageQueue, replica: Replica, call: Call, answer: Done) -> None:
        replica.store_trouble = 0
        self.measure(queue, replica, call, answer)
        for task, made, value in zip(call.tasks, answer.made, call.values or answer.made, strict=True):
            if isinstance(made, Failure):
                self.failures.charge(task, made, replica)
                continue
            queue.done += 1
            if not answer.report.partly:
                replica.buckets.add(call.tasks[0].request.bucket)
            self.failures.made(task, replica)
            self.end_streak(queue)
            task.reports.append(answer.report)
            task.value = value
            if call.last:
                self.finish(task, value)
            else:
                self.queues.advance(task)
        if answer.report.broken:
            self.failures.died(replica, Broken(how="gpu", reason="its GPU's context is lost"))
        else:
            self.failures.fence(replica)

    def measure(self, queue: StageQueue, replica: Replica, call: Call, answer: Done) -> None:
        """What a value takes in this stage; one that was partly made in an earlier call is no measure."""
        report, request = answer.report, call.tasks[0].request
        if report.partly:
            return
        queue.holds_gpus = queue.holds_gpus or report.held_s > 0
        spent = sum(report.seconds.values())
        pace_s = spent if report.pace_s is None else report.pace_s
        queue.seconds = spent if queue.seconds is None else 0.9 * queue.seconds + 0.1 * spent
        queue.pace_s = pace_s if queue.pace_s is None else 0.9 * queue.pace_s + 0.1 * pace_s
        if not any(isinstance(made, Failure) for made in answer.made):
            self.budget.measured(queue.stage.name, request, spent)
            if request.bucket not in replica.buckets:
                queue.first_s = max(queue.first_s, spent)

    # The machines.

    def look(self) -> None:
        """See to the machines: now and then, and whenever a replica came or went."""
        now = self.executor.now()
        if now >= self.look_at:
            self.look_at = now + LOOK_S
            self.autoscaler.look()
            alive = {node.id for node in self.autoscaler.nodes}
            for replica in self.fleet.replicas:
                if replica.placement.node not in alive:
                    reason = f"node {replica.placement.node[:12]} is gone"
                    self.failures.died(replica, Broken(how="node", reason=reason))
                elif overdue := self.watchdog.overdue(replica, now):
                    self.failures.died(replica, overdue)
            self.check_patience(now)
        self.autoscaler.scale()

    def check_patience(self, now: float) -> None:
        if any(replica.calls for replica in self.fleet.replicas):
            self.busy_at = now
        elif now - self.busy_at > PATIENCE_S:
            waiting = ", ".join(f"{queue.stage.name} {queue.tasks}" for queue in self.queues if queue.tasks)
            raise ClusterError(f"no machine could run a stage for {PATIENCE_S:.0f} s; clips that wait: "
                               f"{waiting}. Add the machines that are gone, then run the same command again")
