"""How many replicas each stage has, and where: they follow the machines, the work, and who holds whom back."""

import math
from collections import defaultdict

from dailies.pipeline.scheduler.fleet import Fleet
from dailies.pipeline.scheduler.intake import Intake
from dailies.pipeline.scheduler.placement import EPSILON, Capacity, Node, Placement, free_capacity, scale_up
from dailies.pipeline.scheduler.progress import Reporter
from dailies.pipeline.scheduler.quarantine import Quarantine
from dailies.pipeline.scheduler.stage_queue import StageQueue

COUNT_S = 1.0               # between two counts of the GPUs that are held
SHUN_S = 10.0               # a machine that was lost gets nothing, though the cluster may still list it


class Autoscaler:
    def __init__(self, fleet: Fleet, intake: Intake, quarantine: Quarantine, reporter: Reporter):
        self.fleet, self.intake, self.quarantine, self.reporter = fleet, intake, quarantine, reporter
        self.queues, self.now = fleet.queues, fleet.executor.now
        self.nodes: list[Node] = []
        self.shunned_until: dict[str, float] = {}       # by node
        self.count_at = -math.inf

    def look(self) -> None:
        """At the machines that there are now."""
        self.nodes, self.fleet.changed = self.fleet.executor.nodes(), True

    def shun(self, node: str) -> None:
        self.shunned_until[node] = self.now() + SHUN_S

    def usable(self) -> list[Node]:
        return [node for node in self.nodes if self.shunned_until.get(node.id, 0.0) <= self.now()]

    def scale(self) -> None:
        """Start what fits, and make room for a stage that has tasks and no replica; where anything has changed."""
        if not self.fleet.changed:
            return
        self.fleet.changed = False
        self.fleet.plan(self.new(self.fleet.placements, self.limits()))
        for queue in self.queues:
            if queue.waiting and not queue.replicas and self.limits()[queue.stage.name]:
                self.make_room(queue)

    def new(self, placements: list[Placement], limits: dict[str, int]) -> list[Placement]:
        """What could be started beside these."""
        pace_s = {queue.stage.name: queue.pace_s for queue in self.queues if queue.pace_s is not None}
        return scale_up([queue.stage for queue in self.queues], self.usable(), placements, limits=limits,
                        seconds=pace_s, held={queue.stage.name for queue in self.queues if queue.holds_gpus},
                        barred=self.quarantine.barred(self.now()))

    def limits(self) -> dict[str, int]:
        """The most replicas of each stage that would have work."""
        limits = {}
        for queue in self.queues:
            if not queue.open or self.intake.draining and queue is not self.queues[-1]:
                limits[queue.stage.name] = 0
            elif self.now() < queue.not_before:
                limits[queue.stage.name] = len(queue.replicas)
            elif self.intake.more:
                limits[queue.stage.name] = 10**9
            else:
                unmade = self.intake.unbegun(queue) + queue.in_flight
                limits[queue.stage.name] = math.ceil(unmade / queue.stage.batch)
        return limits

    def make_room(self, queue: StageQueue) -> None:
        """Others leave for a stage that has tasks and no place; the last of a stage only for the first stage."""
        first = self.queues[0]
        if queue is not first and first.stage.window is not None and first.open and first.replicas:
            return                                      # it will give its place back by itself
        staying = [replica for replica in self.fleet.replicas if replica.state != "leaving"]
        staying.sort(key=lambda replica: replica.state == "ready")
        placements = [replica.placement for replica in staying]
        barred = self.quarantine.barred(self.now())
        nodes = [node for node in self.usable() if (queue.stage.name, node.id) not in barred]
        if Capacity(nodes, placements).node_for(queue.stage) is not None:
            return                                      # it has: who leaves is on the way
        keep = [] if queue is first else [other.replicas[-1].placement for other in self.queues
                                          if other.replicas and other.tasks]
        leaving = free_capacity(queue.stage, nodes, placements, keep)
        for replica in staying:
            if any(replica.placement is placement for placement in leaving):
                self.reporter.note(f"{replica.name}: makes room for {queue.stage.name}")
                self.fleet.leave(replica)

    def tend_window(self) -> None:
        """The stage that works ahead gives its resources back when enough is ready, and returns when that runs low."""
        queue = self.queues[0]
        if queue.stage.window is None:
            return
        draining, ahead, more = self.intake.draining, self.queues.ahead(queue), self.intake.more
        if queue.open:
            idle = not (queue.in_flight if draining else queue.tasks)
            if idle and (not more or not self.queues.has_capacity(queue) and self.someone_gains(queue)):
                queue.open = False
                if queue.replicas:
                    self.reporter.note(f"{queue.stage.name}: {ahead if more else 'all'} clips are ready; it "
                                       + ("pauses and leaves its place to the others" if more else "has ended"))
                for replica in list(queue.replicas):
                    self.fleet.leave(replica)
        elif (queue.tasks or more) and ahead <= self.queues.window(queue) // 4 and not draining:
            queue.open = self.fleet.changed = True
            self.reporter.note(f"{queue.stage.name}: {ahead} clips are ready; it goes on")

    def someone_gains(self, queue: StageQueue) -> bool:
        placements = [replica.placement for other in self.queues if other is not queue for replica in other.replicas]
        return bool(self.new(placements, self.limits() | {queue.stage.name: 0}))

    def count_gpus(self, last: bool = False) -> None:
        """Tell the budget of the GPUs that have a process of ours; each counts whole, because it is paid whole."""
        now = self.now()
        if now < self.count_at and not last:
            return
        self.count_at = now + COUNT_S
        shares: dict[str, float] = defaultdict(float)
        devices: dict[str, set[str]] = defaultdict(set)
        for replica in self.fleet.replicas:
            if replica.state != "planned" and replica.placement.gpus:
                shares[replica.placement.node] += replica.placement.gpus
                devices[replica.placement.node].update(replica.placement.devices)
        held = sum(max(len(devices[node]), math.ceil(share - EPSILON)) for node, share in shares.items())
        self.intake.budget.spend(held, now)
