"""The replicas that run: started, given calls, ended. What an ended one had not begun goes back to its queue."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

from dailies.pipeline.scheduler.executor import Call, Executor, Hello, Replica, Task
from dailies.pipeline.scheduler.placement import Placement
from dailies.pipeline.scheduler.stage_queue import StageQueue, StageQueues


class Fleet:
    def __init__(self, executor: Executor, queues: StageQueues):
        self.executor, self.queues = executor, queues
        self.serials, self.names = count(1), count(1)
        self.changed = True                             # one came or went since replicas were last placed

    @property
    def replicas(self) -> list[Replica]:
        return [replica for queue in self.queues for replica in queue.replicas]

    @property
    def placements(self) -> list[Placement]:
        return [replica.placement for replica in self.replicas]

    def queue_of(self, replica: Replica) -> StageQueue:
        return self.queues[replica.stage_index]

    def call(self, replica: Replica, kind: str, tasks: Sequence[Task] = (), last: bool = False) -> None:
        call = Call(replica=replica, kind=kind, serial=next(self.serials), tasks=list(tasks), last=last,
                    safe=any(task.safe for task in tasks), began=self.executor.now())
        replica.calls.append(call)
        self.executor.submit(call)

    def plan(self, placements: Sequence[Placement]) -> None:
        """Replicas to start there."""
        for placement in placements:
            queue = next(queue for queue in self.queues if queue.stage.name == placement.stage)
            name = f"{placement.stage}-{next(self.names)}"
            queue.replicas.append(Replica(name=name, stage=queue.stage, stage_index=queue.index, placement=placement))
        self.start_planned()

    def start_planned(self) -> None:
        """On each node the larger shares of a GPU first: the node fills its GPUs in the order they come."""
        largest: dict[str, float] = {}
        for replica in self.replicas:
            if replica.state in ("planned", "starting"):
                node = replica.placement.node
                largest[node] = max(replica.placement.gpus, largest.get(node, 0.0))
        for replica in self.replicas:
            gpus = replica.placement.gpus
            if replica.state == "planned" and (not gpus or gpus >= largest[replica.placement.node]):
                replica.state, replica.since = "starting", self.executor.now()
                replica.started = replica.since
                self.executor.start(replica)
                self.call(replica, "hello")
                self.call(replica, "load")

    def said_hello(self, replica: Replica, answer: Hello) -> None:
        """It runs, and has its GPUs: the next smaller shares may be started there."""
        replica.placement = replace(replica.placement, devices=answer.devices)
        replica.state = "loading"
        self.start_planned()

    def end(self, replica: Replica) -> None:
        self.queue_of(replica).replicas.remove(replica)
        if replica.state != "planned":
            self.executor.end(replica)
        replica.calls.clear()
        replica.state, self.changed = "ended", True

    def leave(self, replica: Replica) -> None:
        """End a replica between two calls: what has not begun there goes elsewhere."""
        if replica.state != "ready" or not replica.calls:
            tasks = [task for call in replica.calls for task in call.tasks]
            queue = self.queue_of(replica)
            queue.in_flight -= len(tasks)
            queue.waiting.extendleft(reversed(tasks))
            self.end(replica)
            return
        replica.state = "leaving"
        for call in list(replica.calls)[1:]:
            self.executor.recall(call)
