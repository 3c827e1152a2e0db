"""Writes prompts.parquet beside this file: each shape of the demo model's world in each colour, in a sentence.

Run it with  .venv/bin/python examples/make_prompts.py
"""

import random
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dailies.jobs.demo.world import ATTRIBUTES, Scene, sentence_about


def rows() -> list[dict]:
    rng = random.Random(24)
    pairs = list(product(ATTRIBUTES["shape"], ATTRIBUTES["color"]))
    others = {}
    for name in ("background", "direction", "size", "speed"):          # each value equally often
        others[name] = list(ATTRIBUTES[name]) * (len(pairs) // len(ATTRIBUTES[name]))
        rng.shuffle(others[name])
    described = []
    for at, (shape, color) in enumerate(pairs):
        scene = Scene(shape=shape, color=color, **{name: values[at] for name, values in others.items()})
        # the last is a column of our own: the ledger has it as user.unseen_in_training
        described.append({"id": f"{color}-{shape}", "prompt": sentence_about(scene, rng), "seed": 1000 + at,
                          "unseen_in_training": scene.held_out})
    return described


if __name__ == "__main__":
    pq.write_table(pa.Table.from_pylist(rows()), Path(__file__).with_name("prompts.parquet"))
