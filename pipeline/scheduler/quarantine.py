"""Which machines cannot do a stage's work, since when and why, and when they are tried again.

What failed there once is tried there again after a while, each time later: a disk that another program had filled may
have room again. After MOST_FAULTS in succession, or one that no new process would mend, the machine is out for that
stage: the night goes on without it, and ends where no other is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dailies.pipeline.scheduler.executor import Broken, Replica
from dailies.pipeline.scheduler.placement import Node, can_hold
from dailies.pipeline.stages import Stage

MOST_FAULTS = 3             # of one machine and stage, with nothing made there in between
AGAIN_S, LATEST_S = 10.0, 3600.0        # until it is tried again: twice as long each time
_SHOWN = 3                   # machines whose faults are told


@dataclass(kw_only=True)
class Fault:
    count: int
    at: float
    until: float
    answer: Broken


class Quarantine:
    def __init__(self) -> None:
        self.faults: dict[tuple[str, str], Fault] = {}  # by stage and node

    def failed(self, replica: Replica, answer: Broken, now: float) -> None:
        """A machine failed a replica. What several replicas met there at once counts once."""
        key = replica.stage.name, replica.placement.node
        found = self.faults.get(key)
        if found and replica.started <= found.at:
            return
        count = MOST_FAULTS if answer.lasting or answer.how == "load" else 1
        if found:
            count = max(count, found.count + 1)
        self.faults[key] = Fault(count=count, at=now, until=now + min(LATEST_S, AGAIN_S * 2.0 ** (count - 1)),
                                 answer=answer)

    def made(self, replica: Replica) -> None:
        """The replica has made a value: what was wrong there before it was started is mended."""
        key = replica.stage.name, replica.placement.node
        if self.faults and (found := self.faults.get(key)) and replica.started > found.at:
            del self.faults[key]

    def barred(self, now: float) -> set[tuple[str, str]]:
        """Stage and node of each pair that is to be left alone."""
        return {key for key, fault in self.faults.items() if fault.until > now}

    def is_out(self, stage: str, node: str) -> bool:
        fault = self.faults.get((stage, node))
        return fault is not None and fault.count >= MOST_FAULTS

    def left(self, stage: Stage, nodes: Sequence[Node]) -> list[Node]:
        """The machines that may still do the stage's work."""
        return [node for node in nodes if can_hold(node, stage) and not self.is_out(stage.name, node.id)]

    def told(self, stage: str, nodes: Sequence[Node]) -> str:
        """What is wrong with the machines that are out, and what to do."""
        hosts: dict[str, list[str]] = {}                # by what is wrong there
        for node in nodes:
            if self.is_out(stage, node.id):
                hosts.setdefault(self.faults[stage, node.id].answer.reason, []).append(node.host or node.id[:12])
        if len(hosts) == 1:
            return next(iter(hosts))
        said = [f"{', '.join(names[:_SHOWN])}: {reason}" for reason, names in list(hosts.items())[:_SHOWN]]
        return "; ".join([*said, *([f"and {len(hosts) - _SHOWN} more"] if len(hosts) > _SHOWN else [])])
