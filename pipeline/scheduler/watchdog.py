"""How long a replica may take, and who is overdue. What waits for the store or for its GPU is not charged for that."""

import math

from dailies.pipeline.scheduler.budget import Budget
from dailies.pipeline.scheduler.executor import Broken, Call, Executor, Replica
from dailies.pipeline.scheduler.progress import Reporter
from dailies.pipeline.scheduler.stage_queue import StageQueues

START_S = 600.0             # a machine may take so long to give a process its resources
LEAST_LIMIT_S = 120.0       # a task may always take so long in a stage, not counting what it waits for the store,
LIMIT = 10                  # and so many times as long as others of its kind
ASKS_S = 60.0               # of one call on a GPU: then it is asked whether another process has that
GPU_HELD_S = 1800.0         # by a process that is not ours, in one piece: steps and clips give it back much sooner


class Watchdog:
    def __init__(self, executor: Executor, queues: StageQueues, budget: Budget, reporter: Reporter,
                 task_timeout_s: float | None):
        """task_timeout_s: of one task in one stage, whatever others took; None: no limit but that."""
        self.executor, self.queues, self.budget, self.reporter = executor, queues, budget, reporter
        self.most_s = task_timeout_s or math.inf

    def overdue(self, replica: Replica, now: float) -> Broken | None:
        """What is to be said of a replica that has taken too long."""
        if replica.state == "starting" and now - replica.since > START_S:
            need = f"{replica.placement.gpus:g} GPU, {replica.placement.cpus:g} CPU"
            return Broken(how="load", reason=f"its machine gave it no room for {START_S:.0f} s; something else may "
                                             f"hold its {need} there (`ray status` shows what)")
        head = replica.calls[0] if replica.calls else None
        if head and head.kind == "work":
            at_work_s, limit_s = now - head.began, self.limit_s(head)
            if at_work_s > limit_s and at_work_s - self.executor.kept_waiting_s(replica) > limit_s:
                reason = f"no answer after {at_work_s:.0f} s, where it may take {limit_s:.0f} s"
                return Broken(how="hung", reason=reason)
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
            self.reporter.note(f"{replica.name}: waits for its GPU, which {who} has had for {seconds:.0f} s")
        return None

    def limit_s(self, call: Call) -> float:
        """Of a call: a multiple of what its like took. The first of a bucket compiles, tunes and warms up."""
        queue, request = self.queues[call.replica.stage_index], call.tasks[0].request
        usual_s = self.budget.seconds(queue.stage.name, request)
        if not usual_s:
            return self.most_s * len(call.tasks)
        if request.bucket not in call.replica.buckets:
            usual_s = max(usual_s, queue.first_s)
        return min(self.most_s, LEAST_LIMIT_S + LIMIT * usual_s) * len(call.tasks)
