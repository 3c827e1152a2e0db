"""Writes two manifests beside this file, each prompt a sentence about the demo models' world: prompts.parquet, with
each shape in each colour, and for demo-av sound.parquet: each colour, which is heard as a pitch, large and small.

Run it with  .venv/bin/python examples/make_prompts.py
"""

import math
import random
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dailies.jobs.demo.world import ATTRIBUTES, Scene, sentence_about


def spread(rng: random.Random, named: list[dict[str, str]]) -> list[Scene]:
    """Scenes of which each has what it is named by, and of everything else each value equally often."""
    others = {}
    for name in ATTRIBUTES.keys() - named[0].keys():
        others[name] = [*ATTRIBUTES[name]] * math.ceil(len(named) / len(ATTRIBUTES[name]))
    for name in sorted(others, key=[*ATTRIBUTES].index):
        rng.shuffle(others[name])
    return [Scene(**known, **{name: values[at] for name, values in others.items()}) for at, known in enumerate(named)]


def rows(rng: random.Random, first_seed: int, *by: str) -> list[dict]:
    """A row for each combination of the attributes named, of which the last goes into its id first."""
    scenes = spread(rng, [dict(zip(by, values, strict=True)) for values in product(*map(ATTRIBUTES.get, by))])
    # the last is a column of our own: the ledger has it as user.unseen_in_training
    return [{"id": "-".join(getattr(scene, name) for name in reversed(by)), "prompt": sentence_about(scene, rng),
             "seed": first_seed + at, "unseen_in_training": scene.held_out} for at, scene in enumerate(scenes)]


def manifests() -> dict[str, list[dict]]:
    return {"prompts": rows(random.Random(24), 1000, "shape", "color"),
            "sound": rows(random.Random(12), 2000, "color", "size")}


if __name__ == "__main__":
    for name, described in manifests().items():
        pq.write_table(pa.Table.from_pylist(described), Path(__file__).with_name(f"{name}.parquet"))
