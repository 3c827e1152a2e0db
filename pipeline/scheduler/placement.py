"""Which replicas of which stage to start, where, and who makes room. Pure functions: resources in, decisions out.

GPUs are hard: a replica's share lies on one GPU (or on whole GPUs), and shares of one GPU never exceed it. CPU cores
are soft: a node may promise half a core more than it has, since light stages mostly wait.

A share of a GPU is a share of its memory. Its time is one, and whoever is on it takes turns: a second replica of a
stage there would have no time of its own, so there is never one. Replicas of other stages fill it: where every GPU has
a sampler and a decoder, none of them waits, whatever the ratio of their seconds, and sampling and decoding have all of
the time there is (`most_per_s`).
"""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from dailies.pipeline.stages import Stage

SPARE_CPUS = 0.5            # promised beyond a node's cores: on 2 cores 2 samplers and the publisher run side by side
EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine that is alive, with all it has (not what is free)."""

    id: str
    cpus: float
    gpus: float = 0.0
    host: str = ""
    gpu: str = ""                                       # the kind, as Ray names it

    @property
    def cpu_share(self) -> float:
        """What to ask the node's own scheduler for, per core that a stage needs."""
        return self.cpus / (self.cpus + SPARE_CPUS)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One replica of a stage on a node, and what it takes there."""

    stage: str
    node: str
    gpus: float
    cpus: float
    devices: tuple[str, ...] = ()       # the node's names of the GPUs that it got; empty: not known yet


class InsufficientCapacity(ValueError):
    """The machines cannot run the pipeline, however they are divided."""


class Capacity:
    """What is free: per node its cores, and each GPU by itself, because a share cannot be put together from two."""

    def __init__(self, nodes: Sequence[Node], placements: Sequence[Placement],
                 barred: Collection[tuple[str, str]] = ()):
        """barred: stage and node of each pair of which there is to be no replica."""
        self.barred = barred
        self.nodes = {node.id: node for node in nodes}
        self.cpus = {node.id: node.cpus + SPARE_CPUS if node.cpus else 0.0 for node in nodes}
        self.gpus = {node.id: [1.0] * int(node.gpus) for node in nodes}
        self.slot_of: dict[str, dict[str, int]] = defaultdict(dict)      # node -> a GPU's name there -> its slot
        self.held: list[tuple[Placement, list[int]]] = []
        # known slots first, guesses fill the rest
        for placement in sorted(placements, key=lambda placement: not placement.devices):
            if placement.node in self.nodes:
                self.take(placement)

    def take(self, placement: Placement) -> None:
        self.cpus[placement.node] -= placement.cpus
        gpus, names = self.gpus[placement.node], self.slot_of[placement.node]
        if placement.devices:
            for device in placement.devices:
                names.setdefault(device, len(names))
            slots = [names[device] for device in placement.devices if names[device] < len(gpus)]
        else:
            slots = self.likely_slots(placement)
        for slot in slots:
            gpus[slot] -= min(1.0, placement.gpus)
        self.held.append((placement, slots))

    def likely_slots(self, placement: Placement) -> list[int]:
        """The GPUs that a replica has which has not told them yet."""
        return (self.slots(placement.node, placement.gpus, placement.stage)
                or self.slots(placement.node, placement.gpus) or [])

    def slots(self, node: str, gpus: float, stage: str | None = None) -> list[int] | None:
        """The GPUs of a node that such a replica would get, the fullest that fit first; None: it does not fit.

        stage: none of those that have a replica of this stage.
        """
        need = min(1.0, gpus)
        taken = {slot for placement, slots in self.held if (placement.node, placement.stage) == (node, stage)
                 for slot in slots}
        fitting = [slot for slot, free in enumerate(self.gpus[node]) if free >= need - EPSILON and slot not in taken]
        fitting.sort(key=lambda slot: self.gpus[node][slot])
        count = round(max(1.0, gpus)) if gpus else 0
        return fitting[:count] if len(fitting) >= count else None

    def node_for(self, stage: Stage) -> str | None:
        """The node where a replica fits and leaves the fewest GPUs free; None where it fits nowhere."""
        fitting = [node for node in self.nodes if self.nodes[node].cpus and self.cpus[node] >= stage.cpus - EPSILON
                   and (stage.name, node) not in self.barred and self.slots(node, stage.gpus, stage.name) is not None]
        return min(fitting, key=lambda node: (sum(self.gpus[node]), -self.cpus[node]), default=None)

    def placement(self, stage: Stage, node: str) -> Placement:
        return Placement(stage=stage.name, node=node, gpus=stage.gpus, cpus=stage.cpus)


def can_hold(node: Node, stage: Stage) -> bool:
    """Whether a replica of the stage fits on the node if it has nothing else to do."""
    return Capacity([node], []).node_for(stage) is not None


def check(stages: Sequence[Stage], nodes: Sequence[Node]) -> None:
    """Raise InsufficientCapacity unless the stages that stay fit side by side, and each that gives its resources back
    fits alone."""
    stay = [stage for stage in stages if stage.window is None]
    for group in (stay, *([stage] for stage in stages if stage.window is not None)):
        capacity = Capacity(nodes, [])
        for stage in by_size(group):
            node = capacity.node_for(stage)
            if node is None:
                need = ", ".join(f"{stage.name} {stage.gpus:g} GPU {stage.cpus:g} CPU" for stage in group)
                have = ", ".join(f"{node.host or node.id[:8]} {node.gpus:g} GPU {node.cpus:g} CPU" for node in nodes)
                raise InsufficientCapacity(f"stage {stage.name} fits on no machine. Needed at once: {need}. "
                             f"There is: {have or 'nothing'}. Add a machine that has that much, or ask for less "
                             "(--threads-per-sampler)")
            capacity.take(capacity.placement(stage, node))


def scale_up(stages: Sequence[Stage], nodes: Sequence[Node], placements: Sequence[Placement], *,
             limits: Mapping[str, int], seconds: Mapping[str, float], held: Collection[str] | None = None,
             barred: Collection[tuple[str, str]] = ()) -> list[Placement]:
    """The replicas to start now, in order.

    barred: as Capacity takes it.
    limits: the most replicas of a stage that have work; 0 for a stage that gave its resources back.
    seconds: after which a replica takes the next value, for the stages that have been measured.
    held: of these the stages that were seen to take a GPU's time; None: all.
    First one replica of each stage (`Stage.replicas` of them where that is set), those that give back before all
    others, and nobody else until they have their place. Then each next replica goes to the stage that holds the others
    back, until it fits nowhere. At last, of the stages that share GPUs and take their time, one beside every replica
    of another: a GPU whose sampler has a decoder beside it is never idle. One that only lies in a GPU's memory keeps
    nobody from it, and a process is dear to start.
    """
    capacity = Capacity(nodes, placements, barred)
    count = {stage.name: sum(placement.stage == stage.name for placement in placements) for stage in stages}
    new: list[Placement] = []

    def add(stage: Stage) -> bool:
        node = capacity.node_for(stage)
        if node is None:
            return False
        new.append(capacity.placement(stage, node))
        capacity.take(new[-1])
        count[stage.name] += 1
        return True

    def wanted(stage: Stage) -> int:
        return min(limits[stage.name], stage.replicas or limits[stage.name])

    for stage in sorted(by_size(stages), key=lambda stage: stage.window is None):
        while count[stage.name] < min(wanted(stage), stage.replicas or 1):
            if not add(stage):
                if stage.window is not None and not count[stage.name]:
                    return new
                break
    cost = value_seconds(stages, seconds)
    while open_stages := [stage for stage in stages if wanted(stage)]:
        slowest = min(open_stages, key=lambda stage: count[stage.name] / cost[stage.name])
        if count[slowest.name] >= wanted(slowest) or not add(slowest):
            break
    held = seconds.keys() if held is None else held
    for stage in stages:
        while (stage.shares_gpus and stage.window is None and stage.name in held
               and count[stage.name] < wanted(stage) and add(stage)):
            pass
    return new


def free_capacity(stage: Stage, nodes: Sequence[Node], placements: Sequence[Placement],
                  keep: Sequence[Placement] = ()) -> list[Placement]:
    """The fewest placements, on one node and none of `keep`, that must end so that a replica of the stage fits; or
    none, where none would do."""
    capacity = Capacity(nodes, placements)
    replicas = defaultdict(int)
    for placement in placements:
        replicas[placement.stage] += 1
    best: list[Placement] = []
    for node in nodes:
        here = [(placement, slots) for placement, slots in capacity.held
                if placement.node == node.id and not any(placement is kept for kept in keep)]
        # the stage with the most replicas misses one least; the larger replica makes more room
        here.sort(key=lambda held: (-replicas[held[0].stage], -held[0].gpus, -held[0].cpus))
        ended = freed_on(node, stage, capacity, here)
        if ended and (not best or len(ended) < len(best)):
            best = ended
    return best


def freed_on(node: Node, stage: Stage, capacity: Capacity, here: list[tuple[Placement, list[int]]]) -> list[Placement]:
    """The fewest of `here`, placements with the slots of their GPUs, whose end lets the stage fit on this node."""
    need, count = min(1.0, stage.gpus), round(max(1.0, stage.gpus)) if stage.gpus else 0
    options: list[tuple[int, list[Placement]]] = []
    for slot, free in enumerate(capacity.gpus[node.id]):
        leaving: list[Placement] = []
        alone = [placement for placement, slots in here
                 if slot in slots and free + min(1.0, placement.gpus) >= need - EPSILON]
        if alone and free < need - EPSILON:             # the smallest that is enough: a decoder is back sooner
            leaving.append(min(alone, key=lambda placement: placement.gpus))
            free += min(1.0, leaving[0].gpus)
        for placement, slots in here:
            if free >= need - EPSILON:
                break
            if slot in slots and not any(placement is other for other in leaving):
                leaving.append(placement)
                free += min(1.0, placement.gpus)
        if free >= need - EPSILON:
            options.append((len(leaving), leaving))
    options.sort(key=lambda option: option[0])
    if len(options) < count:
        return []
    ended: list[Placement] = []
    for _, leaving in options[:count]:
        ended += [placement for placement in leaving if not any(placement is other for other in ended)]
    free_cpus = capacity.cpus[node.id] + sum(placement.cpus for placement in ended)
    for placement, _ in here:
        if free_cpus >= stage.cpus - EPSILON:
            break
        if not any(placement is other for other in ended):
            ended.append(placement)
            free_cpus += placement.cpus
    return ended if free_cpus >= stage.cpus - EPSILON else []


def most_per_s(stages: Sequence[Stage], placements: Sequence[Placement], *, held_s: Mapping[str, float],
               pace_s: Mapping[str, float]) -> float:
    """Values per second that these replicas can make, if none of them ever waits for anything but a GPU.

    held_s: of a GPU's time per value, by stage; pace_s: after which a replica of it takes the next value, at best.
    Whatever stages one picks, their GPU time must come from the GPUs on which they have a replica; and where that holds
    for every choice, there is a division of the GPUs' time that reaches it (Hall's theorem, for flows).
    placements: with `devices`.
    """
    names = [stage.name for stage in stages if any(placement.stage == stage.name for placement in placements)]
    on_gpus = [name for name in names if held_s.get(name)]
    rates = [sum(placement.stage == name for placement in placements) / pace_s[name]
             for name in names if pace_s.get(name)]
    for size in range(1, len(on_gpus) + 1):
        for chosen in combinations(on_gpus, size):
            gpus = {(placement.node, device) for placement in placements if placement.stage in chosen
                    for device in placement.devices}
            rates.append(len(gpus) / sum(held_s[name] for name in chosen))
    return min(rates, default=math.inf)


def by_size(stages: Sequence[Stage]) -> list[Stage]:
    return sorted(stages, key=lambda stage: (-stage.gpus, -stage.cpus))


def value_seconds(stages: Sequence[Stage], measured: Mapping[str, float]) -> dict[str, float]:
    """Seconds per value of every stage: measured, or a guess: ten times as many in the largest as in any other, and a
    hundred times as many as in one whose work is shared."""
    main = max(stages, key=lambda stage: (stage.key is None, stage.gpus, stage.cpus))
    ratio = {stage.name: 1 if stage is main else 10 if stage.key is None else 100 for stage in stages}
    guesses = [ratio[name] * seconds for name, seconds in measured.items()]
    largest = measured.get(main.name) or max(guesses, default=1.0)
    return {name: max(EPSILON, measured.get(name, largest / ratio[name])) for name in ratio}
