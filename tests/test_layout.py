"""Every key of a run folder is spelt in one file, with its inverse."""

import ast
import re
from pathlib import Path

from dailies.pipeline.run import layout
from dailies.pipeline.run.layout import (
    EMBEDDINGS,
    INTERMEDIATES,
    clip_id_in,
    clip_key,
    epoch_of,
    intermediate_key,
    intermediate_of,
    manifest_key,
    manifest_number,
    part_key,
    retried_key,
)

ROOT = Path(__file__).resolve().parent.parent
NAME = "ab" * 32


def test_each_key_says_what_it_is_of_and_no_other_does():
    assert clip_id_in(clip_key(NAME)) == NAME and epoch_of(part_key(12, 3)) == 12
    assert manifest_number(manifest_key(7, "x")) == 7
    assert all(intermediate_of(intermediate_key(folder, NAME)) == NAME for folder in INTERMEDIATES)
    for key in (f"clips/zz/{NAME}.mp4", f"clips/{NAME}.mp4", "clips/ab/ab.webp", f"copy/clips/ab/{NAME}.mp4"):
        assert clip_id_in(key) is None
    for key in (f"embeddings/zz/{NAME}.safetensors", "latents/ab/ab.safetensors", f"other/ab/{NAME}.safetensors",
                f"embeddings/ab/{NAME}.safetensors/x"):
        assert intermediate_of(key) is None
    assert epoch_of("ledger/thesis.parquet") is None and manifest_number("manifests/of-mine.json") == 0


def test_what_is_made_lies_below_what_is_known_to_be_a_runs():
    keys = [clip_key(NAME), part_key(1, 0), retried_key(NAME), manifest_key(1, NAME),
            intermediate_key(EMBEDDINGS, NAME)]
    assert {key.split("/")[0] for key in keys} < layout.TOP
    assert part_key(9, 0) < part_key(10, 0) < part_key(10, 1) and manifest_key(9, "b") < manifest_key(10, "a")


def test_no_other_file_spells_a_key():
    keys = re.compile(r"(run|lease|_SUCCESS)\.json|seal\.key|(clips|latents|embeddings|ledger|retried|manifests)/.*",
                      re.S)
    spelt = [f"{path.relative_to(ROOT)}:{node.lineno}: {node.value[:40]}"
             for folder in ("model", "actors", "pipeline", "jobs") for path in sorted((ROOT / folder).rglob("*.py"))
             if path.name != "layout.py" for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Constant) and isinstance(node.value, str) and keys.fullmatch(node.value)]
    assert not spelt, "\n".join(["say it with pipeline/run/layout.py:", *spelt])
