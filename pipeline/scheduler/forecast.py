"""How long a night will take: from what clips have cost, where replicas would start, and how they share the GPUs."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from dailies.pipeline.scheduler.placement import Capacity, Node, check, most_per_s, scale_up
from dailies.pipeline.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of one value in one stage."""

    held_s: float                       # with its device to itself
    beside_s: float = 0.0               # before and after that in the same process: fetching, saving
    pool_s: float = 0.0                 # in a process of the stage's pool

    def pace_s(self, stage: Stage) -> float:
        """After which a replica takes the next value, at best; as Worker.pace_s has it measured."""
        whole = self.held_s + self.beside_s + self.pool_s
        pool_s = self.pool_s / stage.processes if stage.processes else 0.0
        return max(self.held_s, pool_s, whole / stage.concurrency)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    seconds: float                      # from the first prompt to the last clip; not what processes take to start
    gpu_hours: float                    # of GPUs that are held
    clips_per_hour: float               # when all are at work
    replicas: Mapping[str, int]         # by stage


def forecast(stages: Sequence[Stage], nodes: Sequence[Node], costs: Mapping[str, Cost], clips: int,
             encoded: int | None = None) -> Forecast:
    """costs: of every stage.  encoded: distinct prompts; None: as many as clips.  Raises InsufficientCapacity.

    The first stage's GPU time is everybody's: it works ahead, where it is wanted.
    """
    check(stages, nodes)
    pace_s = {stage.name: costs[stage.name].pace_s(stage) for stage in stages}
    open_end = {stage.name: 0 if stage.window is not None else 10**9 for stage in stages}
    limits = {name: min(limit, clips) for name, limit in open_end.items()}
    capacity, placements = Capacity(nodes, []), []
    for placement in scale_up(stages, nodes, [], limits=limits, seconds=pace_s):
        placements.append(replace(placement, devices=tuple(map(str, capacity.likely_slots(placement)))))
        capacity.take(placements[-1])
    gpus = {(placement.node, device) for placement in placements for device in placement.devices}
    share = (clips if encoded is None else encoded) / max(1, clips)
    ahead = [stage for stage in stages if stage.window is not None]
    everywhere = [capacity.placement(stage, node) for stage in ahead if stage.gpus for node, _ in gpus]
    placements += [replace(placement, devices=(device,))
                   for placement, (_, device) in zip(everywhere, gpus, strict=False)]
    held_s = {stage.name: costs[stage.name].held_s * (share if stage in ahead else 1.0)
              for stage in stages if stage.gpus}
    paces = {name: pace for name, pace in pace_s.items() if name not in {stage.name for stage in ahead}}
    per_s = most_per_s(stages, placements, held_s=held_s, pace_s=paces)
    first_s = sum(cost.held_s + cost.beside_s + cost.pool_s for cost in costs.values())
    fewest = min((sum(placement.stage == name for placement in placements) for name in paces), default=1) or 1
    seconds = first_s + max(0, clips - fewest) / per_s if clips else 0.0
    return Forecast(seconds=seconds, gpu_hours=len(gpus) * seconds / 3600,
                    clips_per_hour=0.0 if math.isinf(per_s) else 3600 * per_s,
                    replicas={stage.name: sum(placement.stage == stage.name for placement in placements)
                            for stage in stages if stage not in ahead})


def rows_by_work(rows: Iterable[Mapping[str, Any]]) -> dict[float, list[Mapping[str, Any]]]:
    """Those of the ledger's rows that were measured; rows: done, with width, height, frames, steps and seconds."""
    by_work: dict[float, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["sample_s"] is not None:
            by_work[work_of(row)].append(row)
    return by_work


def measured_costs(stages: Sequence[Stage], by_work: Mapping[float, Sequence[Mapping[str, Any]]],
                   bucket: Mapping[str, Any]) -> dict[str, Cost]:
    """What a clip of this bucket costs in each stage: the medians of the bucket's ledger rows, or of the bucket nearest
    to it in work, that much more or less.

    by_work: of rows_by_work, not empty.  bucket: width, height, frames, steps.
    """
    wanted = work_of(bucket)
    nearest = min(by_work, key=lambda work: abs(math.log(work / wanted)))
    more = wanted / nearest

    def seconds(name: str) -> float:
        found = [row[name] for row in by_work[nearest] if row.get(name) is not None]
        return median(found) if found else 0.0

    spent, pool_s = {}, {}
    for stage in stages:
        pooled = {step.name or stage.name for step in stage.then}
        alone = {step.name or stage.name for step in stage.steps} - pooled      # a few steps fetch for the pool's name
        times = 1.0 if stage.key else more              # what a key shares is of a prompt, whatever the clip
        spent[stage.name], pool_s[stage.name] = (times * sum(seconds(f"{name}_s") for name in names)
                                                 for names in (alone, pooled))
    whole_s = sum(spent.values())
    share = min(1.0, (more * seconds("gpu_s") or whole_s) / (whole_s or 1.0))   # on CPUs all; on GPUs the sum counts
    return {name: Cost(held_s=share * spent[name], beside_s=(1 - share) * spent[name], pool_s=pool_s[name])
            for name in spent}


def work_of(said: Mapping[str, Any]) -> float:
    return float(said["width"] * said["height"] * said["frames"] * said["steps"])
