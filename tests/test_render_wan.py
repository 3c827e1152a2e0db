"""Manifests rendered by tiny Wan models: the same commands, the same pipeline, another family."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from actors.clip_writer import read_clip
from jobs.cli import main
from model.catalog import CATALOG
from pipeline import cluster, ledger, stages
from pipeline.store import open_store
from wan_tiny import CARDS, WAN_TINY, write_weights

PROGRAM = [sys.executable, str(Path(__file__).parent / "wan_tiny.py")]
ROWS = [{"id": f"row-{number}", "prompt": prompt, "frames": 9} for number, prompt in enumerate(("a red fox", "日本の猫 🦊", "snow &amp; ice"))]


@pytest.fixture
def in_process(monkeypatch):
    """The tiny models in the catalogue; stages one after the other in this process, without Ray."""
    for card in CARDS:
        monkeypatch.setitem(CATALOG, card.name, card)
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: nullcontext())
    monkeypatch.setattr(cluster, "run", lambda steps, requests, **_: stages.run_local(steps, requests))


def manifest(folder, rows=ROWS):
    path = folder / "night.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(out):
    return {row["id"]: row for row in ledger.read(open_store(str(out))).to_pylist()}


def render(capsys, path, out, name, weights, *options):
    code = main(["render", str(path), "--out", str(out), "--model", name, "--weights", str(weights), "--device", "cpu", "--json",
                 *options])
    captured = capsys.readouterr()
    assert captured.out, captured.err
    return code, json.loads(captured.out)


@pytest.mark.parametrize("name", ["wan-tiny", "wan-tiny-a14b"])
def test_prompts_become_clips(name, in_process, tmp_path, capsys):
    write_weights(tmp_path / "weights", CATALOG[name])
    code, said = render(capsys, manifest(tmp_path), tmp_path / "out", name, tmp_path / "weights")
    assert code == 0 and said["done"] == said["rendered"] == 3
    for row in rows_of(tmp_path / "out").values():
        assert (row["status"], row["width"], row["height"], row["frames"], row["fps"]) == ("done", 48, 32, 9, 16.0)
        assert row["guidance"] == CATALOG[name].guidance and row["negative_prompt"] == CATALOG[name].negative_prompt
        assert read_clip((tmp_path / "out/clips" / row["clip_id"][:2] / f"{row['clip_id']}.mp4").read_bytes()).frames == 9
    code, again = render(capsys, manifest(tmp_path), tmp_path / "out", name, tmp_path / "weights")
    assert code == 0 and again["rendered"] == 0


def test_prompts_become_clips_on_ray(tmp_path):
    subprocess.run([*PROGRAM, str(tmp_path / "weights")], check=True, timeout=120)
    done = subprocess.run([*PROGRAM, "render", str(manifest(tmp_path)), "--out", str(tmp_path / "out"), "--model", "wan-tiny",
                           "--weights", str(tmp_path / "weights"), "--device", "cpu", "--samplers", "1", "--json"],
                          capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["done"] == 3
    assert {row["status"] for row in rows_of(tmp_path / "out").values()} == {"done"}


def test_the_plan_of_a_wan_model_tells_its_defaults(in_process, tmp_path, capsys):
    write_weights(tmp_path / "weights", WAN_TINY)
    assert main(["plan", str(manifest(tmp_path, [{"prompt": "a"}, {"prompt": "b", "duration_s": 2.1}])), "--out", str(tmp_path / "out"),
                 "--model", "wan-tiny", "--weights", str(tmp_path / "weights"), "--device", "cpu", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["settings"]["fps"] == 16.0 and said["settings"]["steps"] == 3 and said["settings"]["guidance"] == 5.0
    assert [bucket["frames"] for bucket in said["buckets"]] == [17, 33]
    assert said["roundings"] == [{"note": "2.1 s rounded down to 2 s (33 frames)", "rows": 1}]


def test_a_model_of_images_is_refused_before_anything_is_fetched(in_process, tmp_path, capsys):
    assert main(["render", str(manifest(tmp_path)), "--out", str(tmp_path / "out"), "--model", "wan2.1-i2v-14b"]) == 2
    assert "makes video from an image, and images in rows are not read yet" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
