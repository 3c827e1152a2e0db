"""The fastest way to run a transformer on a GPU: as measured on one of its kind, or as its architecture suggests.

What was measured is in ways.json, which jobs/gpu/ways.py makes of the kit's results: per GPU, the milliseconds of a
forward of models of one width, in each precision and attention. A way that loses there is never chosen.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dailies.model.card import ModelCard

AUTO = "auto"                                           # what a person says who wants the fastest
MEASURED = Path(__file__).with_name("ways.json")
WORTH = 0.02                                            # a way that gains less is not worth leaving the default
NEAR = 1.5                                              # widths further apart than this factor say nothing

# Where nobody has measured. Matrix units decide: INT8 products are twice (Ampere, Hopper) or four times (GeForce, L4,
# L40) as fast as bf16's, and missing in what Triton makes for data-centre Blackwell. On Hopper cuDNN's attention is 1.2
# times as fast as ours with INT8 logits, and INT8 layers gain at widths 1536 and 5120 (an H200, 2026-11-29).
BY_ARCHITECTURE: dict[tuple[int, int], tuple[str, str]] = {
    (8, 0): ("int8", "dense"), (8, 6): ("int8", "sage"), (8, 9): ("int8", "sage"), (9, 0): ("int8", "dense"),
    (10, 0): ("bf16", "dense"), (10, 3): ("bf16", "dense"), (12, 0): ("int8", "sage")}
# as Ray names the GPU of a node
CAPABILITIES = {"A100": (8, 0), "A10G": (8, 6), "A40": (8, 6), "L4": (8, 9), "L40": (8, 9), "L40S": (8, 9),
                "H100": (9, 0), "H200": (9, 0), "GH200": (9, 0), "B200": (10, 0), "GB200": (10, 0), "B300": (10, 3)}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str                                           # "NVIDIA H200", or as Ray names it, "H200"
    capability: tuple[int, int] | None                  # None: not known


@dataclass(frozen=True, kw_only=True)
class Way:
    precision: str
    attention: str
    because: str


def fastest(card: ModelCard, gpu: Gpu | None, *, precision: str | None = None, attention: str | None = None) -> Way:
    """What `auto` is for this model on this GPU; gpu None is a CPU.  precision, attention: what is settled already.

    Sparse attention is a way only of models that were tuned for it: for others it is not the same picture.
    """
    default = precision or card.precision_on("cpu" if gpu is None else "cuda"), attention or card.attentions[0]
    ways = [(one, other) for one in ([precision] if precision else [p for p in card.precisions if p != "fp32"])
            for other in ([attention] if attention else allowed(card))]
    if gpu is None:
        return Way(precision=default[0], attention=default[1], because="the model's own: on a CPU nothing was measured")
    found = _measured(gpu.name, card)
    if found is not None:
        known = {way: found["ms"][" ".join(way)] for way in ways if " ".join(way) in found["ms"]}
        if known:
            best = min(known, key=known.__getitem__)
            if default in known and known[best] > (1 - WORTH) * known[default]:
                best = default
            return Way(precision=best[0], attention=best[1], because=(
                f"the fastest of {len(known)} ways measured on {found['gpu']} on {found['on']} with {found['model']}: "
                f"{known[best]:,.0f} ms a forward"
                + (f", {known[default]:,.0f} in {' and '.join(default)}" if default in known and best != default
                   else "")))
    suggested = by_architecture(card, gpu)
    way = precision or suggested[0], attention or suggested[1]
    return Way(precision=way[0], attention=way[1], because=(
        f"what {gpu.name} should be fastest with by its architecture; nobody has measured this width of model on it"))


def allowed(card: ModelCard) -> list[str]:
    return [attention for attention in card.attentions if attention != "sparse" or card.tuned_for_sparse]


def by_architecture(card: ModelCard, gpu: Gpu) -> tuple[str, str]:
    default = card.precision_on("cuda"), card.attentions[0]
    precision, attention = BY_ARCHITECTURE.get(gpu.capability or (0, 0), default)
    return (precision if precision in card.precisions else default[0],
            attention if attention in allowed(card) else default[1])


def _measured(gpu: str, card: ModelCard) -> Mapping[str, Any] | None:
    """Of this GPU, the model of the nearest width that is tuned for sparse attention where this one is; None: none."""
    def distance(entry: Mapping[str, Any]) -> float:
        return abs(math.log(entry["width"] / card.width))
    entries = [entry for entry in table() if entry["tuned"] == card.tuned_for_sparse
               and (entry["gpu"] == gpu or entry["gpu"].removeprefix("NVIDIA ") == gpu)
               and distance(entry) <= math.log(NEAR)]
    return min(entries, key=distance, default=None)


@cache
def table() -> Sequence[Mapping[str, Any]]:
    """[{gpu, on, versions, model, width, tokens, tuned, ms: {"int8 dense": 12.3}}]"""
    return json.loads(MEASURED.read_text(encoding="utf-8"))
