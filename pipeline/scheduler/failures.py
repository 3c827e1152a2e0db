"""What a failure costs: a task's own exception, a death, a streak, an unfit machine, a lost input, a store that is out.

A task is charged an attempt for an exception of its own, for the death of a process that was working on it, and for
taking too long. One that only waited there, or whose machine was lost, goes back to its queue free of charge. So does
one whose machine failed it (faults.py): that ends the process, and the task is tried on another machine, where there
is one (quarantine.py).

    attempt 1   as planned
    attempt 2   on another replica, where there is one
    attempt 3   in the safe profile: alone, in a quarter of the memory; the clip's fallbacks say so

A replica that fails three different tasks in succession, or three that others then make, is replaced. Where no replica
of a stage makes anything of many different tasks the run ends, and what failed in that time is not held against the
tasks.
"""

from collections.abc import Callable
from dataclasses import replace

from dailies.actors.messages import Failure
from dailies.pipeline.scheduler.autoscaler import Autoscaler
from dailies.pipeline.scheduler.executor import Broken, Call, ClusterError, Replica, Task
from dailies.pipeline.scheduler.placement import can_hold
from dailies.pipeline.scheduler.stage_queue import StageQueue
from dailies.pipeline.store import StoreError

ANSWER_S = 1.0              # within which the answer to a call that is done has arrived, from a process that lives;
DYING_S = 10.0              # from one that dies, which may first write where each of its threads was, on a busy machine
MOST_LOSSES = 10            # of machines under one task, before the task is suspected after all; so many times, too,
                            # the memory of machines that made other tasks before
MOST_FAILED = 3             # different tasks of one replica, in succession or blamed on it: then it is replaced
FIRST_STREAK = 12           # different tasks that fail in one stage, or six for each replica, before it made anything:
LONGEST_STREAK = 1000       # and afterwards, in succession, since a whole bucket may be too large; then the run ends
MOST_DEAD_STARTS = 3        # and one for each replica, of a stage that has none alive; then the run ends
MOST_STORE_TROUBLE = 5      # answers of every replica in succession that the store is unusable; then the run ends
MOVES_AFTER = 3             # such answers of one replica in succession: then it is started on another machine
RESTS_S, LONGEST_REST_S = 0.5, 5.0      # after such an answer, longer each time: credentials may be renewed meanwhile


class FailurePolicy:
    def __init__(self, autoscaler: Autoscaler, finish: Callable[[Task, Failure], None], max_attempts: int):
        """finish: called with what a task ends as that is not tried again."""
        self.autoscaler, self.finish, self.max_attempts = autoscaler, finish, max_attempts
        self.fleet, self.quarantine, self.reporter = autoscaler.fleet, autoscaler.quarantine, autoscaler.reporter
        self.queues, self.now = autoscaler.queues, autoscaler.now

    # Of a task.

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
        self.reporter.note(f"{replica.name}: attempt {task.failures} at clip {task.request.clip_id[:12]} failed: "
                           f"{failure.error_type}: {failure.error}")
        task.avoid = replica
        queue.waiting.insert(len(queue.replicas), task)     # behind others, which show whether the stage works at all

    def check_streak(self, queue: StageQueue, failure: Failure) -> None:
        most = LONGEST_STREAK if queue.done else max(FIRST_STREAK, 2 * MOST_FAILED * len(queue.replicas))
        if len(queue.streak) >= most:
            raise ClusterError(f"stage {queue.stage.name} made nothing of {len(queue.streak)} different clips in "
                               f"succession, on any of its workers; none of them is charged. The last one: "
                               f"{failure.error_type}: {failure.error}. See to the machines or the model; if it is the "
                               "clips, take them out or put others before them (priority). Then run the same command "
                               "again")

    def lost(self, task: Task, queue: StageQueue, reason: str) -> bool:
        """Count a loss that is not the task's fault. False, and it has failed, once they are too many to believe it."""
        task.losses += 1
        if task.losses <= MOST_LOSSES:
            return True
        self.finish(task, Failure(
            request=task.request, stage=queue.stage.name, error_type="WorkerDied",
            error=f"{task.losses} machines or inputs were lost under it, lately: {reason}"))
        return False

    def gave_nothing(self, call: Call, answer: Broken) -> None:
        """The replica goes on, and nobody is charged: an input is gone, the store is out, or the call was cancelled."""
        queue = self.fleet.queue_of(call.replica)
        for task in reversed(call.tasks):
            if answer.how == "input":
                self.reporter.lost_inputs += 1
                if self.lost(task, queue, answer.reason):
                    self.queues.restart(task)
            else:
                queue.waiting.appendleft(task)
        if answer.how == "store":
            self.no_store(queue, call.replica, answer)

    # Of a replica.

    def made(self, task: Task, replica: Replica) -> None:
        """What failed before was not the replica's doing; and where this task failed before, it was that one's."""
        replica.failed.clear()
        self.quarantine.made(replica)
        if task.avoid not in (None, replica):
            task.avoid.blamed.add(task.request.clip_id)
            self.fence(task.avoid)

    def fence(self, replica: Replica) -> None:
        """Replace a replica that cannot do what others can."""
        if replica.state == "ready" and max(len(replica.failed), len(replica.blamed)) >= MOST_FAILED:
            in_succession = len(replica.failed) >= MOST_FAILED
            what = "failed in succession" if in_succession else "failed here and were made elsewhere"
            self.reporter.note(f"{replica.name}: replaced by a new process: {MOST_FAILED} different clips {what}")
            self.fleet.leave(replica)

    def died(self, replica: Replica, answer: Broken, call: Call | None = None) -> None:
        """A process is gone, and its first call pays. If another may have done it, all are suspects and none pays.

        call: that has met what is wrong with the machine.
        """
        queue, calls, state, now = self.fleet.queue_of(replica), list(replica.calls), replica.state, self.now()
        if answer.how == "node":
            self.autoscaler.shun(replica.placement.node)
        at_work_s = now - calls[0].began if calls else 0.0
        self.fleet.end(replica)
        self.reporter.note(f"{replica.name}: {what_became_of(answer)}: {answer.reason}")
        answered_s = DYING_S if answer.how == "died" else ANSWER_S
        certain = len(calls) == 1 or queue.stage.concurrency == 1 and at_work_s > answered_s
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

    def start_failed(self, queue: StageQueue, answer: Broken) -> None:
        """If another replica lives, try again later. If none does, the run ends after a few tries."""
        queue.failed_starts += 1
        if not queue.ready and queue.failed_starts >= MOST_DEAD_STARTS + len(queue.replicas):
            raise ClusterError(f"stage {queue.stage.name} cannot start: {answer.reason}")
        queue.not_before = self.now() + min(600.0, 0.25 * 2.0 ** queue.failed_starts)

    # Of a machine, and of the store.

    def failed_by_machine(self, task: Task, queue: StageQueue, replica: Replica, answer: Broken) -> None:
        """Back to its queue, behind the others, which show whether they can be made there. Free of charge, unless it
        is a matter of memory, and machines that made others had none for it again and again."""
        if not answer.sure:
            task.alone = True
            if replica.buckets and not self.lost(task, queue, answer.reason):
                return
        queue.waiting.append(task)

    def unfit(self, queue: StageQueue, replica: Replica, answer: Broken, what: str) -> None:
        """Leave that machine alone for a while. The run ends where none is left for the stage."""
        self.quarantine.failed(replica, answer, self.now())
        fitting = [node for node in self.autoscaler.nodes if can_hold(node, queue.stage)]
        if any(other.state != "leaving" for other in queue.replicas) or not fitting:
            return
        if not self.quarantine.left(queue.stage, fitting):
            told = self.quarantine.told(queue.stage.name, fitting).rstrip(".")
            raise ClusterError(f"stage {queue.stage.name} cannot {what}: {told}. No clip is charged for it, and "
                               "the same command continues")

    def no_store(self, queue: StageQueue, replica: Replica, answer: Broken) -> None:
        """The run ends where no replica has the store; where others may have it, this one is started elsewhere."""
        now = self.now()
        if now < replica.rests_until:                   # another call met the same trouble
            return
        replica.store_trouble += 1
        replica.rests_until = now + min(LONGEST_REST_S, RESTS_S * 2.0 ** (replica.store_trouble - 1))
        left = self.quarantine.left(queue.stage, self.autoscaler.nodes)
        elsewhere = any(node.id != replica.placement.node for node in left)
        if replica.store_trouble >= MOVES_AFTER and elsewhere:
            self.died(replica, replace(answer, how="unfit"))
        elif all(other.store_trouble >= MOST_STORE_TROUBLE for other in queue.replicas):
            raise StoreError(answer.reason)


def what_became_of(answer: Broken) -> str:
    return {"died": "it died", "hung": "ended", "node": "its machine was lost", "load": "it could not start",
            "gpu": "replaced", "unfit": "ended, since its machine cannot do its work now"}[answer.how]


def worker_died(task: Task, queue: StageQueue, answer: Broken, replica: Replica) -> Failure:
    hung = answer.how == "hung"
    return Failure(request=task.request, stage=queue.stage.name, error_type="TimedOut" if hung else "WorkerDied",
                   error=answer.reason if hung else f"its process ended at work: {answer.reason}", worker=replica.name)
