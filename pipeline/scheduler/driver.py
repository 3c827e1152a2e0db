"""The driver's book: which task waits where, who works on it, what comes next, and what a death costs.

It knows no Ray: an `Executor` starts processes, hands them calls and brings back answers (cluster.py has the real one).
It holds a window of tasks, never the whole night, so its memory is bounded.

A task is charged an attempt for an exception of its own, for the death of a process that was working on it, and for
taking too long. One that only waited there, or whose machine was lost, goes back to its queue free of charge. So does
one whose machine failed it (faults.py): that ends the process, and the task is tried on another machine, where there is
one (quarantine.py).

    attempt 1   as planned
    attempt 2   on another replica, where there is one
    attempt 3   in the safe profile: alone, in a quarter of the memory; the clip's fallbacks say so

A replica that fails three different tasks in succession, or three that others then make, is replaced. Where no replica of a
stage makes anything of many different tasks the run ends, and what failed in that time is not held against the tasks.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from dailies.actors.messages import Clip, Failure, Request
from dailies.pipeline.scheduler.budget import Budget
from dailies.pipeline.scheduler.executor import Answer, Broken, Call, Done, Executor, Hello, Replica, Task
from dailies.pipeline.scheduler.placement import (
    EPSILON,
    Capacity,
    InsufficientCapacity,
    Node,
    can_hold,
    check,
    free_capacity,
    scale_up,
)
from dailies.pipeline.scheduler.quarantine import Quarantine
from dailies.pipeline.scheduler.stage_queue import StageQueue, StageQueues
from dailies.pipeline.stages import Outcome, Stage, outcome
from dailies.pipeline.store.store import StoreError

LOOK_S = 2.0                # between two looks at the machines
COUNT_S = 1.0               # between two counts of the GPUs that are held
SHUN_S = 10.0               # a machine that was lost gets nothing, though the cluster may still list it
IDLE_S = 2.0                # after which a process is asked whether it lives before it gets a task
ANSWER_S = 1.0              # within which the answer to a call that is done has arrived
PATIENCE_S = 600.0          # nothing runs and nothing can be started: then the run ends
MOST_LOSSES = 10            # of machines under one task, before the task is suspected after all; so many times, too,
                            # the memory of machines that made other tasks before
MOST_FAILED = 3             # different tasks of one replica, in succession or blamed on it: then it is replaced
FIRST_STREAK = 12           # different tasks that fail in one stage, or six for each replica, before it made anything: and
LONGEST_STREAK = 1000       # afterwards, in succession, since a whole bucket may be too large; then the run ends
ASKS_S = 60.0               # of one call on a GPU: then it is asked whether another process has that
GPU_HELD_S = 1800.0         # by a process that is not ours, in one piece: steps and clips give it back much sooner
SAVING_S = 10.0             # in which a run that is told to save may still publish what is sampled
LEAST_LIMIT_S = 120.0       # a task may always take so long in a stage, not counting what it waits for the store,
LIMIT = 10                  # and so many times as long as others of its kind
MOST_DEAD_STARTS = 3        # and one for each replica, of a stage that has none alive; then the run ends
MOST_STORE_TROUBLE = 5      # answers of every replica in succession that the store is unusable; then the run ends
MOVES_AFTER = 3             # such answers of one replica in succession: then it is started on another machine
RESTS_S, LONGEST_REST_S = 0.5, 5.0      # after such an answer, longer each time: credentials may be renewed meanwhile
SAFE_NOTE = "made in attempt {}, in the safe profile: alone, in a quarter of the memory"


class ClusterError(RuntimeError):
    """The cluster cannot run this pipeline; the message says what to do."""


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


@dataclass(frozen=True, kw_only=True)
class StageProgress:
    name: str
    replicas: int                 # ready to work
    starting: int
    queued: int
    in_flight: int
    done: int
    seconds: float | None       # per value, lately


@dataclass(frozen=True, kw_only=True)
class Progress:
    stages: tuple[StageProgress, ...]
    done: int                   # requests that ended as a Clip
    failed: int
    notes: tuple[str, ...]      # what happened since the last Progress: hand-overs, deaths, retries


class Driver:
    def __init__(self, executor: Executor, stages: Sequence[Stage], requests: Iterable[Request], *, max_attempts: int = 3,
                 task_timeout_s: float | None = None, on_progress: Callable[[Progress], None] | None = None,
                 progress_every_s: float = 0.5, stop: Stop | None = None, budget: Budget | None = None):
        self.executor, self.max_attempts, self.task_timeout_s = executor, max_attempts, task_timeout_s
        self.on_progress, self.progress_every_s, self.stop = on_progress, progress_every_s, stop or Stop()
        self.budget = budget or Budget()
        self.stages, self.queues = list(stages), StageQueues(stages)
        self.requests = iter(requests)
        self.coming: Request | None = None              # the next request: None when there is none
        self.results: list[Outcome] = []
        self.done = self.failed = 0
        self.notes: list[str] = []
        self.lost_inputs = 0                            # since the last Progress
        self.nodes: list[Node] = []
        self.shunned_until: dict[str, float] = {}       # by node
        self.quarantine = Quarantine()
        self.serials = count(1)
        self.names = count(1)
        self.look_at = self.tell_at = self.count_at = -math.inf
        self.busy_at = executor.now()                       # when something last ran
        self.changed, self.drained = True, False
        self.saving_since: float | None = None
        self.stopped: set[Call] = set()                 # that were at work, and asked to stop where they can

    def outcomes(self) -> Iterator[Outcome]:
        try:
            self.coming = next(self.requests, None)
            if self.coming is not None:
                self.nodes = self.executor.nodes()
                try:
                    check(self.stages, self.nodes)
                except InsufficientCapacity as error:
                    raise ClusterError(str(error)) from None
            while not self.stop.at_once:
                self.count_gpus()
                if self.draining:
                    self.drain()
                self.fill()
                self.tend_windows()
                self.look()
                for queue in reversed(self.queues):     # what is nearly done first
                    self.dispatch(queue)
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
            self.count_gpus(last=True)
            for queue in self.queues:
                for replica in list(queue.replicas):
                    self.end(replica)
            self.tell(last=True)

    @property
    def draining(self) -> bool:
        return self.stop.draining or self.budget.is_over

    def finished(self) -> bool:
        if self.draining:
            working = any(call.kind == "work" for queue in self.queues for replica in queue.replicas for call in replica.calls)
            return not working and not (len(self.queues) > 1 and self.queues[-1].waiting and self.serves_last())
        return self.queues.held == 0 and self.coming is None

    def drain(self) -> None:
        """Forget the tasks that no stage has begun; those that only the last stage waits for are still served."""
        for queue in self.queues[:-1]:
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

    # Tasks in and out.

    def fill(self) -> None:
        """Take requests until the first queue is long enough."""
        first = self.queues[0]
        while self.coming is not None and not self.draining and self.queues.has_capacity(first):
            if self.budget.has_limit and not self.budget.fits(self.path_s(first, self.coming), self.executor.now()):
                self.budget.left_out += 1
                self.coming = next(self.requests, None)
                continue
            task = Task(request=self.coming, arrived=self.executor.now())
            self.coming = next(self.requests, None)
            self.queues.add(task)

    def finish(self, task: Task, value: Clip | Failure) -> None:
        failed = isinstance(value, Failure)
        if task.safe and not failed:
            value = replace(value, fallbacks=(*value.fallbacks, SAFE_NOTE.format(task.failures + 1)))
        result = outcome(value, task.reports, attempts=task.failures + (not failed), waited_s=self.executor.now() - task.arrived)
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
        if not queue.waiting or self.draining and not (last and queue.index and self.serves_last()):
            return
        if not last and queue.stage.window is None and not self.queues.has_capacity(self.queues[queue.index + 1]):
            return
        ready = queue.ready
        for depth in range(1, queue.stage.depth + 1):
            if depth > 1 and self.unbegun(queue) <= len(ready):
                return
            for replica in ready:
                if len(replica.calls) >= depth or replica.calls and any(task.shares_none for task in replica.calls[-1].tasks):
                    continue
                if replica.rests_until > self.executor.now():
                    continue
                while (tasks := queue.take(replica)) and not (last and queue.index) and not self.fits(queue, replica, tasks):
                    self.budget.left_out += len(tasks)
                    for task in tasks:
                        self.queues.remove(task)
                if not tasks:
                    continue
                if not replica.calls and self.executor.now() - replica.since > IDLE_S:
                    self.call(replica, "ping")
                queue.in_flight += len(tasks)
                self.call(replica, "work", tasks, last)

    def fits(self, queue: StageQueue, replica: Replica, tasks: Sequence[Task]) -> bool:
        """Whether tasks can become clips within the budget if this replica gets them now."""
        if not self.budget.has_limit:
            return True
        request, name, now = tasks[0].request, queue.stage.name, self.executor.now()
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

    def unbegun(self, queue: StageQueue) -> float:
        """Tasks that this stage has still to begin."""
        return self.queues.unbegun(queue) if self.coming is None or self.draining else math.inf

    def call(self, replica: Replica, kind: str, tasks: Sequence[Task] = (), last: bool = False) -> None:
        call = Call(replica=replica, kind=kind, serial=next(self.serials), tasks=list(tasks), last=last,
                    safe=any(task.safe for task in tasks), began=self.executor.now())
        replica.calls.append(call)
        self.executor.submit(call)

    def settle(self, call: Call, answer: Answer) -> None:
        replica = call.replica
        if call not in replica.calls:                      # its replica has ended meanwhile
            return
        queue = self.queues[replica.stage_index]
        if isinstance(answer, Broken) and answer.how in ("died", "hung", "node", "load", "unfit"):
            self.died(replica, answer, call)
            return
        was_first = call is replica.calls[0]
        replica.calls.remove(call)
        replica.since = self.executor.now()
        if replica.calls and was_first:
            replica.calls[0].began = replica.since
        if isinstance(answer, Hello):
            replica.placement = replace(replica.placement, devices=answer.devices)
            replica.state = "loading"
            self.start_planned()
        elif call.kind == "load":
            replica.state = "ready"
            queue.failed_starts = 0
        elif call.kind == "work":
            queue.in_flight -= len(call.tasks)
            if isinstance(answer, Done):
                self.made(queue, replica, call, answer)
            else:
                self.gave_nothing(queue, replica, call, answer)
        if replica.state == "leaving" and not replica.calls:
            self.end(replica)

    def made(self, queue: StageQueue, replica: Replica, call: Call, answer: Done) -> None:
        spent = sum(answer.report.seconds.values())
        pace_s = spent if answer.report.pace_s is None else answer.report.pace_s
        replica.store_trouble = 0
        bucket, whole = call.tasks[0].request.bucket, not answer.report.partly
        if whole:
            queue.seconds = spent if queue.seconds is None else 0.9 * queue.seconds + 0.1 * spent
            queue.pace_s = pace_s if queue.pace_s is None else 0.9 * queue.pace_s + 0.1 * pace_s
        if whole and not any(isinstance(made, Failure) for made in answer.made):
            self.budget.measured(queue.stage.name, call.tasks[0].request, spent)
            if bucket not in replica.buckets:
                queue.first_s = max(queue.first_s, spent)
        for task, made, value in zip(call.tasks, answer.made, call.values or answer.made, strict=True):
            if isinstance(made, Failure):
                self.charge(task, made, replica)
                continue
            queue.done += 1
            if whole:
                replica.buckets.add(bucket)
            replica.failed.clear()
            self.quarantine.made(replica)
            self.end_streak(queue)
            if task.avoid not in (None, replica):
                task.avoid.blamed.add(task.request.clip_id)
                self.fence(task.avoid)
            task.reports.append(answer.report)
            task.value = value
            if call.last:
                self.finish(task, value)
            else:
                self.queues.advance(task)
        if answer.report.broken:
            self.died(replica, Broken(how="gpu", reason="its GPU's context is lost"))
        else:
            self.fence(replica)

    def gave_nothing(self, queue: StageQueue, replica: Replica, call: Call, answer: Broken) -> None:
        for task in reversed(call.tasks):
            if answer.how == "input":
                self.lost_inputs += 1
                if self.lost(task, queue, answer.reason):
                    self.queues.restart(task)
            else:
                queue.waiting.appendleft(task)
        if answer.how == "store":
            self.no_store(queue, replica, answer)

    def no_store(self, queue: StageQueue, replica: Replica, answer: Broken) -> None:
        """The run ends where no replica has the store; where others may have it, this one is started elsewhere."""
        now = self.executor.now()
        if now < replica.rests_until:                      # another call met the same trouble
            return
        replica.store_trouble += 1
        replica.rests_until = now + min(LONGEST_REST_S, RESTS_S * 2.0 ** (replica.store_trouble - 1))
        elsewhere = [node for node in self.quarantine.left(queue.stage, self.nodes) if node.id != replica.placement.node]
        if replica.store_trouble >= MOVES_AFTER and elsewhere:
            self.died(replica, replace(answer, how="unfit"))
        elif all(other.store_trouble >= MOST_STORE_TROUBLE for other in queue.replicas):
            raise StoreError(answer.reason)

    def charge(self, task: Task, failure: Failure, replica: Replica) -> None:
        """An attempt is used up: again, elsewhere if there is another replica, or never again."""
        task.failures += 1
        queue = self.queues[task.stage_index]
        if not failure.about_row:
            if task.avoid in (None, replica):
                replica.failed.add(task.request.clip_id)
            else:                                       # it fails there and here: that is its own doing
                task.avoid.failed.discard(task.request.clip_id)
            queue.streak.add(task.request.clip_id)
            self.check_streak(queue, failure)
        if task.failures >= self.max_attempts:
            self.finish(task, failure)
            return
        self.note(f"{replica.name}: attempt {task.failures} at clip {task.request.clip_id[:12]} failed: "
                  f"{failure.error_type}: {failure.error}")
        task.avoid = replica
        queue.waiting.insert(len(queue.replicas), task)        # behind others, which show whether the stage works at all

    def check_streak(self, queue: StageQueue, failure: Failure) -> None:
        most = LONGEST_STREAK if queue.done else max(FIRST_STREAK, 2 * MOST_FAILED * len(queue.replicas))
        if len(queue.streak) >= most:
            raise ClusterError(f"stage {queue.stage.name} made nothing of {len(queue.streak)} different clips in succession, "
                               f"on any of its workers; none of them is charged. The last one: {failure.error_type}: "
                               f"{failure.error}. See to the machines or the model; if it is the clips, take them out or "
                               "put others before them (priority). Then run the same command again")

    def fence(self, replica: Replica) -> None:
        """Replace a replica that cannot do what others can."""
        if replica.state == "ready" and max(len(replica.failed), len(replica.blamed)) >= MOST_FAILED:
            what = "failed in succession" if len(replica.failed) >= MOST_FAILED else "failed here and were made elsewhere"
            self.note(f"{replica.name}: replaced by a new process: {MOST_FAILED} different clips {what}")
            self.leave(replica)

    def lost(self, task: Task, queue: StageQueue, reason: str) -> bool:
        """Count a loss that is not the task's fault. False, and it has failed, once there are too many to believe it."""
        task.losses += 1
        if task.losses <= MOST_LOSSES:
            return True
        self.finish(task, Failure(
            request=task.request, stage=queue.stage.name, error_type="WorkerDied",
            error=f"{task.losses} machines or inputs were lost under it, lately: {reason}"))
        return False

    # Processes.

    def died(self, replica: Replica, answer: Broken, call: Call | None = None) -> None:
        """A process is gone, and its first call pays. If another may have done it, all are suspects and none pays.

        call: that has met what is wrong with the machine.
        """
        queue, calls, state, now = self.queues[replica.stage_index], list(replica.calls), replica.state, self.executor.now()
        if answer.how == "node":
            self.shunned_until[replica.placement.node] = now + SHUN_S
        at_work_s = now - calls[0].began if calls else 0.0
        self.end(replica)
        self.note(f"{replica.name}: {what_became_of(replica, answer)}: {answer.reason}")
        certain = len(calls) == 1 or queue.stage.concurrency == 1 and at_work_s > ANSWER_S
        for position, each in reversed(list(enumerate(calls))):
            for task in reversed(each.tasks):
                queue.in_flight -= 1
                if answer.how in ("died", "hung"):
                    task.alone = task.alone or position == 0 or not certain
                if each is call and answer.how == "unfit":
                    self.failed_by_machine(task, queue, replica, answer)
                elif position == 0 and answer.how in ("died", "hung") and certain:
                    self.charge(task, worker_died(task, queue, answer, replica), replica)
                elif position or answer.how not in ("died", "node") or self.lost(task, queue, answer.reason):
                    queue.waiting.appendleft(task)
        if answer.how in ("unfit", "load"):
            self.unfit(queue, replica, answer, "start" if state in ("starting", "loading") else "work on any machine")
        elif state in ("starting", "loading") and answer.how != "node":
            self.start_failed(queue, answer)

    def failed_by_machine(self, task: Task, queue: StageQueue, replica: Replica, answer: Broken) -> None:
        """Back to its queue, behind the others, which show whether they can be made there. Free of charge, unless it is
        a matter of memory, and machines that made others had none for it again and again."""
        if not answer.sure:
            task.alone = True
            if replica.buckets and not self.lost(task, queue, answer.reason):
                return
        queue.waiting.append(task)

    def unfit(self, queue: StageQueue, replica: Replica, answer: Broken, what: str) -> None:
        """Leave that machine alone for a while. The run ends where none is left for the stage."""
        self.quarantine.failed(replica, answer, self.executor.now())
        fitting = [node for node in self.nodes if can_hold(node, queue.stage)]
        if any(other.state != "leaving" for other in queue.replicas) or not fitting:
            return
        if not self.quarantine.left(queue.stage, fitting):
            told = self.quarantine.told(queue.stage.name, fitting).rstrip(".")
            raise ClusterError(f"stage {queue.stage.name} cannot {what}: {told}. No clip is charged for it, and "
                               "the same command continues")

    def start_failed(self, queue: StageQueue, answer: Broken) -> None:
        """If another replica lives, try again later. If none does, the run ends after a few tries."""
        queue.failed_starts += 1
        if not queue.ready and queue.failed_starts >= MOST_DEAD_STARTS + len(queue.replicas):
            raise ClusterError(f"stage {queue.stage.name} cannot start: {answer.reason}")
        queue.not_before = self.executor.now() + min(600.0, 0.25 * 2.0 ** queue.failed_starts)

    def end(self, replica: Replica) -> None:
        self.queues[replica.stage_index].replicas.remove(replica)
        if replica.state != "planned":
            self.executor.end(replica)
        replica.calls.clear()
        replica.state, self.changed = "ended", True

    def leave(self, replica: Replica) -> None:
        """End a replica between two calls: what has not begun there goes elsewhere."""
        if replica.state != "ready" or not replica.calls:
            tasks = [task for call in replica.calls for task in call.tasks]
            queue = self.queues[replica.stage_index]
            queue.in_flight -= len(tasks)
            queue.waiting.extendleft(reversed(tasks))
            self.end(replica)
            return
        replica.state = "leaving"
        for call in list(replica.calls)[1:]:
            self.executor.recall(call)

    def tend_windows(self) -> None:
        """The stage that works ahead gives its resources back when enough is ready, and returns when that runs low."""
        queue = self.queues[0]
        if queue.stage.window is None:
            return
        draining, ahead = self.draining, self.queues.ahead(queue)
        more = self.coming is not None and not draining
        if queue.open:
            idle = not (queue.in_flight if draining else queue.tasks)
            if idle and (not more or not self.queues.has_capacity(queue) and self.someone_gains(queue)):
                queue.open = False
                if queue.replicas:
                    self.note(f"{queue.stage.name}: {ahead if more else 'all'} clips are ready; it "
                              + ("pauses and leaves its place to the others" if more else "has ended"))
                for replica in list(queue.replicas):
                    self.leave(replica)
        elif (queue.tasks or more) and ahead <= self.queues.window(queue) // 4 and not draining:
            queue.open = self.changed = True
            self.note(f"{queue.stage.name}: {ahead} clips are ready; it goes on")

    def someone_gains(self, queue: StageQueue) -> bool:
        placements = [replica.placement for other in self.queues if other is not queue for replica in other.replicas]
        return bool(scale_up(self.stages, self.usable(), placements,
                                    limits=self.limits() | {queue.stage.name: 0}, seconds=self.seconds(),
                                    barred=self.quarantine.barred(self.executor.now())))

    def limits(self) -> dict[str, int]:
        """The most replicas of each stage that would have work."""
        limits = {}
        for queue in self.queues:
            if not queue.open or self.draining and queue is not self.queues[-1]:
                limits[queue.stage.name] = 0
            elif self.executor.now() < queue.not_before:
                limits[queue.stage.name] = len(queue.replicas)
            elif self.coming is not None and not self.draining:
                limits[queue.stage.name] = 10**9
            else:
                limits[queue.stage.name] = math.ceil((self.unbegun(queue) + queue.in_flight) / queue.stage.batch)
        return limits

    def usable(self) -> list[Node]:
        return [node for node in self.nodes if self.shunned_until.get(node.id, 0.0) <= self.executor.now()]

    def seconds(self) -> dict[str, float]:
        return {queue.stage.name: queue.pace_s for queue in self.queues if queue.pace_s is not None}

    def look(self) -> None:
        """See to the machines: now and then, and whenever a replica came or went."""
        now = self.executor.now()
        if now >= self.look_at:
            self.look_at, self.changed = now + LOOK_S, True
            self.nodes = self.executor.nodes()
            alive = {node.id for node in self.nodes}
            for replica in self.replicas():
                if replica.placement.node not in alive:
                    self.died(replica, Broken(how="node", reason=f"node {replica.placement.node[:12]} is gone"))
                elif overdue := self.overdue(replica, now):
                    self.died(replica, overdue)
            if any(replica.calls for replica in self.replicas()):
                self.busy_at = now
            elif now - self.busy_at > PATIENCE_S:
                waiting = ", ".join(f"{queue.stage.name} {queue.tasks}" for queue in self.queues if queue.tasks)
                raise ClusterError(f"no machine could run a stage for {PATIENCE_S:.0f} s; clips that wait: "
                                   f"{waiting}. Add the machines that are gone, then run the same command again")
        if self.changed:
            self.changed = False
            self.scale_up()

    def overdue(self, replica: Replica, now: float) -> Broken | None:
        """What is to be said of a replica that has taken too long."""
        if replica.state == "starting" and now - replica.since > PATIENCE_S:
            need = f"{replica.placement.gpus:g} GPU, {replica.placement.cpus:g} CPU"
            return Broken(how="load", reason=f"its machine gave it no room for {PATIENCE_S:.0f} s; something else may "
                                             f"hold its {need} there (`ray status` shows what)")
        head = replica.calls[0] if replica.calls else None
        if head and head.kind == "work":
            at_work_s, limit_s = now - head.began, self.limit_s(head)
            if at_work_s > limit_s and at_work_s - self.executor.kept_waiting_s(replica) > limit_s:
                return Broken(how="hung", reason=f"no answer after {at_work_s:.0f} s, where it may take {limit_s:.0f} s")
            return self.kept_from_gpu(replica, now)
        return None

    def kept_from_gpu(self, replica: Replica, now: float) -> Broken | None:
        """Tell of another process that has a replica's GPU, and give up on one that keeps it."""
        if not replica.placement.gpus or now - max(replica.calls[0].began, replica.asked_at) < ASKS_S:
            return None
        replica.asked_at = now
        who, seconds = self.executor.waits_for(replica) or ("", 0.0)
        if seconds > GPU_HELD_S:
            return Broken(how="unfit", reason=f"{who} has had its GPU for {seconds:.0f} s. End it, or use another GPU")
        if seconds > ASKS_S:
            self.note(f"{replica.name}: waits for its GPU, which {who} has had for {seconds:.0f} s")
        return None

    def limit_s(self, call: Call) -> float:
        """How long a call may take: a multiple of what its like took. The first of a bucket compiles, tunes and warms up."""
        queue, request = self.queues[call.replica.stage_index], call.tasks[0].request
        usual_s, most_s = self.budget.seconds(queue.stage.name, request), self.task_timeout_s or math.inf
        if not usual_s:
            return most_s * len(call.tasks)
        if request.bucket not in call.replica.buckets:
            usual_s = max(usual_s, queue.first_s)
        return min(most_s, LEAST_LIMIT_S + LIMIT * usual_s) * len(call.tasks)

    def scale_up(self) -> None:
        for placement in scale_up(self.stages, self.usable(), [replica.placement for replica in self.replicas()],
                                    limits=self.limits(), seconds=self.seconds(),
                                    barred=self.quarantine.barred(self.executor.now())):
            queue = next(queue for queue in self.queues if queue.stage.name == placement.stage)
            name = f"{placement.stage}-{next(self.names)}"
            queue.replicas.append(Replica(name=name, stage=queue.stage, stage_index=queue.index, placement=placement))
        self.start_planned()
        for queue in self.queues:
            if queue.waiting and not queue.replicas and self.limits()[queue.stage.name]:
                self.free_capacity(queue)

    def free_capacity(self, queue: StageQueue) -> None:
        """A stage with tasks has no replica and no place: others leave, but the last of a stage only for the first stage."""
        first = self.queues[0]
        if queue is not first and first.stage.window is not None and first.open and first.replicas:
            return                                      # it will give its place back by itself
        staying = [replica for replica in self.replicas() if replica.state != "leaving"]
        staying.sort(key=lambda replica: replica.state == "ready")
        placements = [replica.placement for replica in staying]
        barred = self.quarantine.barred(self.executor.now())
        nodes = [node for node in self.usable() if (queue.stage.name, node.id) not in barred]
        if Capacity(nodes, placements).node_for(queue.stage) is not None:
            return                                      # it has: who leaves is on the way
        keep = [] if queue is first else [other.replicas[-1].placement for other in self.queues if other.replicas and other.tasks]
        leaving = free_capacity(queue.stage, nodes, placements, keep)
        for replica in staying:
            if any(replica.placement is placement for placement in leaving):
                self.note(f"{replica.name}: makes room for {queue.stage.name}")
                self.leave(replica)

    def start_planned(self) -> None:
        """Start replicas, on each node the larger shares of a GPU first: the node fills its GPUs in the order they come."""
        largest: dict[str, float] = {}
        for replica in self.replicas():
            if replica.state in ("planned", "starting"):
                largest[replica.placement.node] = max(replica.placement.gpus, largest.get(replica.placement.node, 0.0))
        for replica in self.replicas():
            if replica.state == "planned" and (not replica.placement.gpus or replica.placement.gpus >= largest[replica.placement.node]):
                replica.state, replica.since = "starting", self.executor.now()
                replica.started = replica.since
                self.executor.start(replica)
                self.call(replica, "hello")
                self.call(replica, "load")

    def count_gpus(self, last: bool = False) -> None:
        """Tell the budget of the GPUs that have a process of ours; each counts whole, because it is paid whole."""
        now = self.executor.now()
        if now < self.count_at and not last:
            return
        self.count_at = now + COUNT_S
        shares: dict[str, float] = defaultdict(float)
        devices: dict[str, set[str]] = defaultdict(set)
        for replica in self.replicas():
            if replica.state != "planned" and replica.placement.gpus:
                shares[replica.placement.node] += replica.placement.gpus
                devices[replica.placement.node].update(replica.placement.devices)
        self.budget.spend(sum(max(len(devices[node]), math.ceil(share - EPSILON))
                              for node, share in shares.items()), now)

    def replicas(self) -> list[Replica]:
        return [replica for queue in self.queues for replica in queue.replicas]

    # What a person sees.

    def note(self, text: str) -> None:
        if self.on_progress:
            self.notes.append(text)

    def tell(self, last: bool = False) -> None:
        now = self.executor.now()
        if not self.on_progress or now < self.tell_at and not last:
            return
        self.tell_at = now + self.progress_every_s
        if self.lost_inputs:
            self.note(f"what an earlier stage made is gone for {self.lost_inputs} clips, and is made again")
            self.lost_inputs = 0
        notes, self.notes = tuple(self.notes), []
        self.on_progress(Progress(stages=tuple(self.stage_progress(queue) for queue in self.queues), done=self.done,
                                  failed=self.failed, notes=notes))

    def stage_progress(self, queue: StageQueue) -> StageProgress:
        ready = len(queue.ready)
        return StageProgress(name=queue.stage.name, replicas=ready, starting=len(queue.replicas) - ready, done=queue.done,
                             queued=len(queue.waiting) + queue.sharing, in_flight=queue.in_flight, seconds=queue.seconds)


def what_became_of(replica: Replica, answer: Broken) -> str:
    return {"died": "it died", "hung": "ended", "node": "its machine was lost", "load": "it could not start",
            "gpu": "replaced", "unfit": "ended, since its machine cannot do its work now"}[answer.how]


def worker_died(task: Task, queue: StageQueue, answer: Broken, replica: Replica) -> Failure:
    hung = answer.how == "hung"
    return Failure(request=task.request, stage=queue.stage.name, error_type="TimedOut" if hung else "WorkerDied",
                   error=answer.reason if hung else f"its process ended at work: {answer.reason}", worker=replica.name)
