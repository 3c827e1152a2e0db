"""A whole run with a tiny model: what it leaves, and that it can be stopped, continued and repeated anywhere.

Most tests run the pipeline's definition in this process (`run_local`), where seconds count; some start Ray.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny  # noqa: F401  adds the model to the catalogue
from one_process import ENGINE, main

from dailies.actors import clip_writer
from dailies.actors.clip_file import read_clip
from dailies.actors.decoder import Decoder
from dailies.jobs import cli
from dailies.model.family import NonFiniteSound
from dailies.pipeline.run import ledger
from dailies.pipeline.run.bookkeeper import Bookkeeper
from dailies.pipeline.run.intermediates import unsealed
from dailies.pipeline.run.layout import clip_key
from dailies.pipeline.run.lease import Lease
from dailies.pipeline.run.saved_steps import SavedSteps
from dailies.pipeline.run.seal import seal_of
from dailies.pipeline.stages import run_local
from dailies.pipeline.store import open_store

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = [sys.executable, str(ROOT / "tests/tiny.py")]
PROMPTS = ["a red fox", "日本の猫 🦊", "مرحبا", "e\u0301 combining", "tab\tand\nnewline", "a \x1b[31mred\x1b[0m fox"]
ROWS = [
    *({"id": f"row-{number}", "prompt": prompt, "frames": 5, "mood": "calm"} for number, prompt in enumerate(PROMPTS)),
    {"id": "twin-a", "prompt": "a twin", "seed": 7, "frames": 5, "mood": "glad"},
    {"id": "twin-b", "prompt": "a twin", "seed": 7, "frames": 5, "mood": "sad"},
    {"id": "three", "prompt": "three samples", "seed": 2**62, "samples": 3, "frames": 9},
]
NUM_CLIPS, NUM_ROWS = 10, 11


def write_manifest(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def no_work(monkeypatch):
    """Any attempt to reach Ray fails the test."""
    def refuse(*_, **__):
        raise AssertionError("there was nothing to do, and Ray was asked for")
    monkeypatch.setattr(ENGINE, "connect", refuse)


def ask(capsys, *arguments):
    """Exit code and the JSON answer of one command in this process."""
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    print(captured.out, captured.err)                   # seen when the test fails
    return code, json.loads(captured.out)


def render(capsys, manifest, out, *options):
    code, answer = ask(capsys, "render", manifest, "--out", out, "--model", "tiny", "--device", "cpu", *options)
    assert answer["exit_code"] == code
    return code, answer


def rows_of(out):
    return {(row["id"], row["seed"]): row for row in ledger.read(open_store(out)).to_pylist()}


def clips_of(out):
    """Key -> SHA-256 of every object under clips/."""
    store = open_store(out)
    return {info.key: hashlib.sha256(store.get(info.key)).hexdigest() for info in store.list("clips/")}


def assert_whole(out, num_rows=NUM_ROWS, num_clips=NUM_CLIPS):
    """One object per clip, one ledger row per manifest row and sample, every hash right, nothing left over."""
    rows, clips = rows_of(out), clips_of(out)
    assert len(rows) == num_rows and len(clips) == num_clips
    assert {row["status"] for row in rows.values()} == {"done"}
    for row in rows.values():
        assert clips[clip_key(row["clip_id"])] == row["sha256"]
    store = open_store(out)
    assert {info.key.split("/")[0] for info in store.list()} == {"run.json", "lease.json", "_SUCCESS.json", "clips",
                                                                 "posters", "ledger", "manifests"}
    assert json.loads(store.get("lease.json"))["released"]
    said = json.loads(store.get("_SUCCESS.json"))
    assert (said["rows"], said["done"], said["failed"]) == (num_rows, num_rows, 0)
    parts = [pq.read_table(Path(out) / info.key) for info in store.list("ledger/")] if "://" not in str(out) else []
    assert sum(part.num_rows for part in parts) in (0, num_rows)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of ROWS, rendered once for this file by Ray with one sampler; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    manifest = write_manifest(folder / "night.jsonl")
    program = subprocess.run([*PROGRAM, "render", manifest, "--out", folder / "out", "--model", "tiny",
                              "--samplers", "1"], capture_output=True, text=True, timeout=600, cwd=folder)
    assert program.returncode == 0, program.stderr
    return folder, program


@pytest.fixture
def again(finished, tmp_path):
    """A copy of the finished run, and its manifest."""
    shutil.copytree(finished[0] / "out", tmp_path / "out")
    return finished[0] / "night.jsonl", tmp_path / "out"


# What a run leaves.

def test_a_run_leaves_one_object_per_clip_and_one_row_per_manifest_row(finished):
    assert_whole(finished[0] / "out")
    rows = rows_of(finished[0] / "out")
    assert sorted(seed - 2**62 for name, seed in rows if name == "three") == [0, 1, 2]
    assert rows["twin-a", 7]["clip_id"] == rows["twin-b", 7]["clip_id"]
    assert (rows["twin-a", 7]["user.mood"], rows["twin-b", 7]["user.mood"]) == ("glad", "sad")
    for row in rows.values():
        assert row["attempts"] == 1 and row["worker"] and row["device"] == "cpu" and row["fallbacks"] == []
        assert all(row[f"{step}_s"] > 0 for step in ("sample", "decode", "publish")) and row["peak_memory_bytes"] > 0


def test_every_clip_is_a_video_that_says_what_it_was_made_from(finished):
    out = finished[0] / "out"
    for (_name, seed), row in rows_of(out).items():
        found = read_clip((out / clip_key(row["clip_id"])).read_bytes())
        assert (found.width, found.height, found.frames, found.fps) == (40, 24, row["frames"], 24.0)
        assert (found.metadata["seed"], found.metadata["clip_id"]) == (str(seed), row["clip_id"])
        assert found.metadata["prompt"] == row["prompt"].replace("\x1b", "\u241b")
    assert {row["prompt"] for row in rows_of(out).values()} == {row["prompt"] for row in ROWS}


def test_the_summary_names_what_a_person_wants_to_know_and_no_prompt_reaches_the_terminal(finished):
    folder, program = finished
    assert f"{folder}/out: 11 rows done, 0 failed, 0 pending; 10 clips rendered in" in program.stdout
    assert "1 row asks for a clip that another row asks for too: rendered once" in program.stderr
    assert "\x1b" not in program.stdout + program.stderr and "Traceback" not in program.stderr


def test_run_json_says_what_was_rendered_and_holds_no_secret(finished):
    run = json.loads((finished[0] / "out/run.json").read_text())
    assert (run["rows"], run["planned_rows"], run["clips"], run["duplicates"]) == (9, 11, 10, 1)
    assert run["identity"]["model"] == "tiny" and run["identity"]["precision"] == "fp32"
    assert run["versions"]["torch"] and run["job"]["samplers"] == 1


def test_status_and_verify_need_the_run_folder_alone(finished, capsys):
    out = str(finished[0] / "out")
    code, said = ask(capsys, "status", out)
    assert code == 0
    assert (said["done"], said["failed"], said["pending"], said["finished"]) == (11, 0, 0, True)
    assert [bucket["done"] for bucket in said["buckets"]] == [7, 3]
    assert main(["status", out]) == 0 and "11 of 11 rows done" in capsys.readouterr().out
    code, said = ask(capsys, "verify", out)
    assert code == 0
    assert (said["clips"], said["wrong"], said["unrecorded"]) == (10, [], 0)


# Doing it again.

def test_a_second_run_does_nothing(again, capsys, no_work):
    manifest, out = again
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    code, answer = render(capsys, manifest, out)
    assert code == 0 and (answer["rendered"], answer["adopted"], answer["done"]) == (0, 0, 11)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def forget(out, names):
    """Remove these rows from the ledger; returns their clips."""
    forgotten = set()
    for path in (out / "ledger").iterdir():
        table = pq.read_table(path)
        keep = [name not in names for name in table["id"].to_pylist()]
        forgotten |= {clip_id for clip_id, stays in zip(table["clip_id"].to_pylist(), keep, strict=True) if not stays}
        pq.write_table(table.filter(keep), path)
    return forgotten


def test_three_clips_and_rows_that_were_deleted_are_rendered_again_and_no_other(again, capsys):
    manifest, out = again
    before = clips_of(out)
    for clip_id in forget(out, {"row-0", "row-2", "row-4"}):
        (out / clip_key(clip_id)).unlink()
    assert len(clips_of(out)) == 7
    others = {path: path.stat().st_mtime_ns for path in (out / "clips").rglob("*.mp4")}
    code, answer = render(capsys, manifest, out)
    assert code == 0 and (answer["rendered"], answer["adopted"]) == (3, 0)
    assert clips_of(out) == before                      # by another process, without Ray: the same bytes
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert_whole(out)


def test_rows_that_were_lost_are_written_again_without_rendering(again, capsys, no_work):
    manifest, out = again
    forget(out, {"row-1", "twin-b", "three"})
    kept = rows_of(out)
    code, answer = render(capsys, manifest, out)
    assert code == 0 and (answer["rendered"], answer["adopted"]) == (0, 5)
    rows = rows_of(out)
    assert_whole(out)
    assert rows["twin-a", 7] == kept["twin-a", 7]       # its twin's row is new, its own is not
    assert rows["twin-b", 7]["worker"] is None and rows["twin-b", 7]["user.mood"] == "sad"


def test_another_run_is_refused_and_named(again, capsys, no_work, tmp_path):
    manifest, out = again
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, answer = render(capsys, manifest, out, "--precision", "bf16")
    assert code == 2 and "precision was fp32, is bf16" in answer["error"] and "holds another run" in answer["error"]
    changed = write_manifest(tmp_path / "changed.jsonl", [ROWS[0] | {"prompt": "a blue fox"}, *ROWS[1:]])
    for command in ("render", "plan"):
        code, answer = ask(capsys, command, changed, "--out", out, "--model", "tiny", "--device", "cpu")
        assert code == 2 and "other content of 1 row: 'row-0'" in answer["error"]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_folder_with_a_foreign_run_json_is_left_alone(capsys, no_work, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.json").write_text('{"mine": 1}')
    code, answer = render(capsys, write_manifest(tmp_path / "m.jsonl"), tmp_path / "out")
    assert code == 2 and "not one that dailies wrote" in answer["error"]


def test_a_limit_is_of_this_command_and_the_same_command_makes_the_next(capsys, tmp_path):
    manifest, out = write_manifest(tmp_path / "night.jsonl"), tmp_path / "out"
    code, answer = render(capsys, manifest, out, "--limit", 4)
    assert code == 4 and (answer["rendered"], answer["left_by_limit"]) == (4, 6) and answer["pending"] >= 6
    assert not (out / "_SUCCESS.json").exists()
    assert main(["render", str(manifest), "--out", str(out), "--model", "tiny", "--limit", "4"]) == 4
    assert "Stopped at --limit 4; the same command makes the next 2." in capsys.readouterr().out
    assert ask(capsys, "status", str(out))[1]["pending_clips"] == 2
    code, answer = render(capsys, manifest, out, "--limit", 4)
    assert code == 0 and (answer["rendered"], answer["left_by_limit"]) == (2, 0)
    assert_whole(out)


def test_a_run_folder_grows_by_what_is_new_and_nothing_is_made_twice(again, capsys, tmp_path):
    manifest, out = again
    before = clips_of(out)

    def totals():
        return [ask(capsys, "status", out)[1][name] for name in ("done", "failed", "pending", "clips", "pending_clips")]

    turned = write_manifest(tmp_path / "turned.jsonl", ROWS[::-1])     # the same rows in other bytes, in another order
    code, answer = render(capsys, turned, out)
    assert code == 0 and (answer["rendered"], answer["adopted"], answer["done"]) == (0, 0, 11)
    assert not any("has changed" in note for note in answer["notes"])
    assert len(list((out / "manifests").iterdir())) == 2                # what was given; the first, and this

    new = [{"id": "new", "prompt": "a new fox", "frames": 5}, ROWS[6] | {"id": "triplet"}, {"id": "bad", "prompt": ""}]
    grown = write_manifest(tmp_path / "grown.jsonl", [*ROWS, *new])
    code, answer = ask(capsys, "plan", grown, "--out", out, "--model", "tiny", "--skip-invalid")
    assert (answer["to_make"], answer["found_published"], answer["pending"]) == (1, 1, 3)
    assert answer["notes"][0].startswith("the manifest has changed: 9 rows then, 12 now.")
    code, answer = render(capsys, grown, out, "--skip-invalid")
    assert code == 3 and (answer["rendered"], answer["adopted"], answer["done"], answer["failed"]) == (1, 1, 13, 1)
    assert clips_of(out).items() > before.items() and totals() == [13, 1, 0, 11, 0]

    fewer = write_manifest(tmp_path / "fewer.jsonl", [*ROWS[:2], {"id": "bad", "prompt": "mended", "frames": 5}])
    code, answer = render(capsys, fewer, out, "--limit", 1)
    assert code == 0 and (answer["rendered"], answer["rows"], answer["done"]) == (1, 3, 3)
    rows = rows_of(out)
    assert len(rows) == 14 and {row["status"] for row in rows.values()} == {"done"}     # what is gone has stayed
    assert "invalid" in {row["id"]: row["earlier_errors"] for row in rows.values()}["bad"][0]
    assert totals() == [14, 0, 0, 12, 0]
    assert sum(bucket["done"] for bucket in ask(capsys, "status", out)[1]["buckets"]) == 12
    assert ask(capsys, "verify", out)[0] == 0
    code, answer = render(capsys, grown, out, "--skip-invalid")          # and back
    assert code == 3 and (answer["rendered"], answer["done"], answer["failed"]) == (0, 13, 1)


def test_a_run_whose_json_knows_only_the_file_goes_on_with_the_same_rows(again, capsys, no_work, tmp_path):
    manifest, out = again
    run = json.loads((out / "run.json").read_text())
    run.pop("rows_digest")
    (out / "run.json").write_text(json.dumps(run))
    for name in (manifest, write_manifest(tmp_path / "turned.jsonl", ROWS[::-1])):
        code, answer = render(capsys, name, out)
        assert code == 0 and (answer["rendered"], answer["done"]) == (0, 11)
        assert not any("has changed" in note for note in answer["notes"])


def test_a_gpu_that_is_not_here_is_refused_before_anything_is_written(capsys, no_work, tmp_path, monkeypatch):
    import torch

    from dailies.jobs import usage
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for files in ((), (str(tmp_path),)):                # no driver; a driver that torch cannot use
        monkeypatch.setattr(usage, "GPU_FILES", files)
        for command in ("render", "plan"):
            code, answer = ask(capsys, command, write_manifest(tmp_path / "m.jsonl"), "--out", tmp_path / "out",
                               "--model", "tiny", "--device", "cuda")
            assert code == 2 and "no GPU here that can be used" in answer["error"] and not (tmp_path / "out").exists()


def test_keep_latents_keeps_one_per_clip(capsys, tmp_path):
    manifest, out = write_manifest(tmp_path / "night.jsonl", ROWS[:2]), tmp_path / "out"
    assert render(capsys, manifest, out, "--keep-latents")[0] == 0
    assert len(list((out / "latents").rglob("*.safetensors"))) == 2
    assert not list((out / "embeddings").rglob("*.safetensors"))


# One driver.

def test_a_second_driver_is_refused_and_nothing_is_touched(again, capsys, no_work):
    manifest, out = again
    forget(out, {"row-0"})
    (out / "_SUCCESS.json").unlink()
    with Lease.take(open_store(out)):
        before = {path: path.stat().st_mtime_ns for path in (out / "ledger").iterdir()}
        for command in (["render", manifest, "--out", out, "--model", "tiny"], ["retry", out]):
            code, answer = ask(capsys, *command)
            assert code == 5 and "another driver works on this run: pid" in answer["error"]
        assert {path: path.stat().st_mtime_ns for path in (out / "ledger").iterdir()} == before
    assert render(capsys, manifest, out)[1]["adopted"] == 1
    assert_whole(out)


def test_a_driver_that_lost_the_run_folder_writes_no_row_and_stops(capsys, tmp_path, monkeypatch):
    manifest, out = write_manifest(tmp_path / "night.jsonl"), tmp_path / "out"
    whole = clip_writer.write_mp4

    def robbed(path, frames, rate):
        whole(path, frames, rate)
        monkeypatch.setattr(clip_writer, "write_mp4", whole)
        (out / "lease.json").write_text('{"id": "other"}')
        monkeypatch.setattr(Lease, "LEASE_S", 0.0)      # so that this driver looks before it writes

    monkeypatch.setattr(clip_writer, "write_mp4", robbed)
    code, answer = ask(capsys, "render", manifest, "--out", out, "--model", "tiny")
    assert code == 5 and "no longer this driver's" in answer["error"]
    assert published(out) == 1 and rows_of(out) == {}
    code, answer = render(capsys, manifest, out, "--take-over")
    assert code == 0 and (answer["rendered"], answer["adopted"]) == (NUM_CLIPS - 1, 1)
    assert_whole(out)


# When rows fail.

BAD = [*ROWS[:2], {"id": "bad", "prompt": "a", "steps": 0, "mood": "wild"}, {"id": "worse", "prompt": ""}]


def test_invalid_rows_end_as_failed_rows_and_cost_nobody_else(capsys, tmp_path):
    manifest, out = write_manifest(tmp_path / "night.jsonl", BAD), tmp_path / "out"
    assert render(capsys, manifest, out)[0] == 2 and not out.exists()
    for rendered in (2, 0):
        code, answer = render(capsys, manifest, out, "--skip-invalid")
        assert code == 3 and (answer["rendered"], answer["done"], answer["failed"]) == (rendered, 2, 2)
    rows = rows_of(out)
    assert rows["bad", None]["error_type"] == "invalid" and "steps: got 0" in rows["bad", None]["error"]
    assert rows["bad", None]["user.mood"] == "wild" and len(rows) == 4
    assert json.loads((out / "_SUCCESS.json").read_text())["failed"] == 2
    assert ask(capsys, "retry", out)[1]["pending_again"] == 0
    assert main(["render", str(manifest), "--out", str(out), "--model", "tiny", "--skip-invalid"]) == 3
    said = capsys.readouterr().out
    assert "2 rows of the manifest could not be used" in said and "retry" not in said
    assert f"The clips are in {out}/clips/, as {out}/clips/" in said and f"dailies report {out}" in said


def test_a_failed_row_stays_failed_until_it_is_put_back(capsys, tmp_path, monkeypatch):
    manifest, out = write_manifest(tmp_path / "night.jsonl", ROWS[:4]), tmp_path / "out"
    whole = clip_writer.write_mp4

    def broken(path, frames, rate):
        if frames.request.prompt == PROMPTS[1]:
            raise OSError("no space \x1b[31m left")
        whole(path, frames, rate)

    monkeypatch.setattr(clip_writer, "write_mp4", broken)
    code, answer = render(capsys, manifest, out)
    assert code == 3 and (answer["done"], answer["failed"]) == (3, 1)
    assert answer["failures"][0]["error_type"] == "OSError" and answer["failures"][0]["stage"] == "publish"
    assert len(list((out / "latents").rglob("*.safetensors"))) == 1     # of the failed clip: not to be sampled again
    monkeypatch.setattr(clip_writer, "write_mp4", whole)
    assert render(capsys, manifest, out)[1]["rendered"] == 0

    assert ask(capsys, "retry", out, "--where", "error_type=Other")[1]["pending_again"] == 0
    assert ask(capsys, "retry", out, "--where", "error_type=OSError", "--where", "id=row-1")[1]["pending_again"] == 1
    assert not (out / "_SUCCESS.json").exists()
    code, answer = render(capsys, manifest, out)
    assert code == 0 and answer["rendered"] == 1
    assert_whole(out, 4, 4)


def black(monkeypatch, is_black):
    """Decoding gives black frames for these requests."""
    whole = Decoder.__call__

    def decode(self, batch):
        return [replace(frames, rgb=frames.rgb * (not is_black(frames.request))) for frames in whole(self, batch)]
    monkeypatch.setattr(Decoder, "__call__", decode)


def test_a_clip_that_the_gate_refuses_fails_its_row_and_the_ledger_says_why(capsys, tmp_path, monkeypatch):
    manifest, out = write_manifest(tmp_path / "night.jsonl", ROWS[:3]), tmp_path / "out"
    black(monkeypatch, lambda request: request.prompt == PROMPTS[1])
    code, answer = render(capsys, manifest, out)
    assert code == 3 and (answer["done"], answer["failed"]) == (2, 1) and published(out) == 2
    failure, = answer["failures"]
    assert failure["error_type"] == "Rejected" and "every frame is black" in failure["error"]
    rows = {row["id"]: row for row in rows_of(out).values()}
    assert [rows[name]["quality.verdict"] for name in ("row-0", "row-1", "row-2")] == ["ok", "black", "ok"]
    assert rows["row-1"]["quality.brightness"] == 0 and rows["row-1"]["quality.psnr_db"] is None
    assert rows["row-0"]["quality.brightness"] > 0 and rows["row-0"]["quality.psnr_db"] > 20
    assert rows["row-0"]["quality.seed"] is None


def test_a_row_may_ask_for_another_seed_where_its_clip_is_refused(capsys, tmp_path, monkeypatch):
    asked = {"prompt": "a fox", "frames": 5, "seed": 7}
    manifest = write_manifest(tmp_path / "night.jsonl", [
        asked | {"id": "again", "on_reject": "reseed"}, asked | {"id": "once", "on_reject": "fail"},
        asked | {"id": "never", "prompt": "night", "on_reject": "reseed"},
        {"id": "good", "prompt": "day", "frames": 5}])
    black(monkeypatch, lambda request: request.seed == 7 or request.prompt == "night")
    code, answer = render(capsys, manifest, tmp_path / "out")
    assert code == 3 and (answer["done"], answer["failed"], answer["pending"], answer["rendered"]) == (2, 2, 0, 2)
    rows = {row["id"]: row for row in rows_of(tmp_path / "out").values()}
    assert {name: row["status"] for name, row in rows.items()} == {"again": "done", "once": "failed", "never": "failed",
                                                                   "good": "done"}
    again = rows["again"]
    assert again["seed"] == 7 and again["quality.seed"] not in (7, None) and again["quality.verdict"] == "ok"
    assert again["fallbacks"] == [f"rejected with seed 7, and made with seed {again['quality.seed']}"]
    found = read_clip((tmp_path / "out" / clip_key(again["clip_id"])).read_bytes())
    assert found.metadata["seed"] == str(again["quality.seed"]) and found.metadata["clip_id"] == again["clip_id"]
    assert rows["once"]["quality.seed"] is None and rows["never"]["quality.seed"] != 7
    assert (tmp_path / "out/_SUCCESS.json").exists() and ask(capsys, "verify", tmp_path / "out")[0] == 0
    assert render(capsys, manifest, tmp_path / "out")[1]["rendered"] == 0

    # a manifest with a row more: what was made with another seed is no other content
    more = write_manifest(tmp_path / "more.jsonl", [*map(json.loads, manifest.read_text().splitlines()),
                                                    {"id": "late", "prompt": "day", "frames": 9}])
    code, answer = render(capsys, more, tmp_path / "out")
    assert code == 3 and (answer["rendered"], answer["done"], answer["failed"]) == (1, 3, 2)

    # the clip of the other seed is the one that a row with that seed would have got
    told = write_manifest(tmp_path / "told.jsonl", [asked | {"seed": again["quality.seed"]}])
    assert render(capsys, told, tmp_path / "told")[0] == 0
    assert clips_of(tmp_path / "told").items() <= clips_of(tmp_path / "out").items()


def test_sound_that_is_no_number_is_made_with_another_seed_as_pictures_are(capsys, tmp_path, monkeypatch):
    whole = Decoder.__call__

    def decode(self, batch):
        if batch[0].request.seed == 7:
            raise NonFiniteSound("NaN")
        return whole(self, batch)
    monkeypatch.setattr(Decoder, "__call__", decode)
    rows = [{"id": "a", "prompt": "a fox", "frames": 5, "seed": 7, "on_reject": "reseed"}]
    assert render(capsys, write_manifest(tmp_path / "night.jsonl", rows), tmp_path / "out")[0] == 0
    assert rows_of(tmp_path / "out")["a", 7]["quality.seed"] not in (7, None)


def test_a_run_that_ends_before_the_other_seeds_clip_chooses_it_again(capsys, tmp_path, monkeypatch):
    rows = [{"id": "a", "prompt": "a fox", "frames": 5, "seed": 7, "on_reject": "reseed"}]
    manifest, out = write_manifest(tmp_path / "night.jsonl", rows), tmp_path / "out"
    black(monkeypatch, lambda request: request.seed == 7)
    with monkeypatch.context() as broken:
        passes = iter([run_local])
        broken.setattr(ENGINE, "run", lambda steps, requests, **_: next(passes)(steps, requests))
        with pytest.raises(StopIteration):
            main(["render", str(manifest), "--out", str(out), "--model", "tiny"])
    assert rows_of(out) == {} and not (out / "_SUCCESS.json").exists()
    assert render(capsys, manifest, out)[0] == 0
    assert len(clips_of(out)) == 1 and rows_of(out)["a", 7]["quality.verdict"] == "ok"


def test_what_a_person_reads_of_a_failure_has_no_control_characters(capsys, tmp_path, monkeypatch):
    manifest = write_manifest(tmp_path / "night.jsonl", ROWS[:1])

    def broken(path, frames, rate):
        raise OSError("no space \x1b[31m left")

    monkeypatch.setattr(clip_writer, "write_mp4", broken)
    assert main(["render", str(manifest), "--out", str(tmp_path / "out"), "--model", "tiny"]) == 3
    captured = capsys.readouterr()
    assert r"row-0: OSError in publish: no space \x1b[31m left" in captured.out
    assert f"dailies retry {tmp_path}/out" in captured.out and "could not be used" not in captured.out
    assert not (tmp_path / "out/_SUCCESS.json").exists() and "\x1b" not in captured.out + captured.err


def test_verify_lists_what_is_missing_changed_and_undecodable(again, capsys):
    _, out = again
    rows = list(rows_of(out).values())
    clips = [out / clip_key(row["clip_id"]) for row in rows[:3]]
    clips[0].unlink()
    clips[1].write_bytes(clips[1].read_bytes() + b"x")
    clips[2].write_bytes(b"no video")
    for path in (out / "ledger").iterdir():             # its hash is right, its content is not
        table = pq.read_table(path).to_pylist()
        for row in table:
            if row["clip_id"] == rows[2]["clip_id"]:
                row |= {"sha256": hashlib.sha256(b"no video").hexdigest(), "bytes": len(b"no video")}
        pq.write_table(pq.read_table(path).from_pylist(table), path)
    (out / "clips/zz").mkdir()
    (out / "clips/zz/stray.mp4").write_bytes(b"")
    code, said = ask(capsys, "verify", str(out))
    assert code == 3
    problems = {found["clip_id"]: found["problem"] for found in said["wrong"]}
    assert problems[rows[0]["clip_id"]] == "missing"
    assert problems[rows[1]["clip_id"]].startswith("changed")
    assert problems[rows[2]["clip_id"]].startswith("undecodable")
    assert len(problems) == 3 and said["unrecorded"] == 1


# The store.

def test_the_same_bytes_come_out_in_a_bucket(finished, capsys, s3_bucket):
    code, answer = render(capsys, finished[0] / "night.jsonl", f"{s3_bucket}/night")
    assert code == 0 and answer["rendered"] == NUM_CLIPS
    assert clips_of(f"{s3_bucket}/night") == clips_of(finished[0] / "out")
    assert_whole(f"{s3_bucket}/night")
    assert ask(capsys, "verify", f"{s3_bucket}/night")[0] == 0
    assert b"testing" not in open_store(f"{s3_bucket}/night").get("run.json")


def test_a_bucket_that_is_not_there_is_exit_5_and_named(capsys, no_work, s3_bucket, tmp_path):
    code, answer = render(capsys, write_manifest(tmp_path / "m.jsonl"), "s3://no-such-bucket-here/x")
    assert code == 5 and "no-such-bucket-here" in answer["error"]


# With Ray, in a process of its own.

@contextmanager
def started(manifest, out, *options):
    """The program, which ends with the block at the latest; Ray's processes end with it."""
    with subprocess.Popen([*PROGRAM, "render", manifest, "--out", out, "--model", "tiny", "--device", "cpu", *options],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        try:
            yield program
        finally:
            program.kill()


def test_two_samplers_make_the_bytes_that_one_makes(finished, tmp_path):
    with started(finished[0] / "night.jsonl", tmp_path / "out", "--samplers", "2", "--json") as program:
        stdout, stderr = program.communicate(timeout=600)
    assert program.returncode == 0, stderr
    assert json.loads(stdout)["rendered"] == NUM_CLIPS
    assert clips_of(tmp_path / "out") == clips_of(finished[0] / "out")
    assert_whole(tmp_path / "out")


def wait_for(condition, program, timeout_s=300):
    ends = time.monotonic() + timeout_s
    while not condition():
        assert program.poll() is None, program.stderr.read()
        assert time.monotonic() < ends
        time.sleep(0.05)


def published(out):
    return len(list((out / "clips").rglob("*.mp4"))) if out.exists() else 0


def test_control_c_finishes_what_was_begun_and_the_same_command_continues(tmp_path, capsys):
    rows = [{"prompt": f"fox {number}", "frames": 97} for number in range(20)]
    manifest, out = write_manifest(tmp_path / "night.jsonl", rows), tmp_path / "out"
    with started(manifest, out, "--samplers", "1") as program:
        wait_for(lambda: published(out) >= 2, program)
        program.send_signal(signal.SIGINT)
        _, stderr = program.communicate(timeout=300)
    assert program.returncode == 130 and "Stopping" in stderr and "Traceback" not in stderr
    done = published(out)
    assert 2 <= done < 20 and len(rows_of(out)) == done and not (out / "_SUCCESS.json").exists()
    code, answer = render(capsys, manifest, out)
    assert code == 0 and answer["rendered"] == 20 - done
    assert_whole(out, 20, 20)


def test_sigterm_in_the_middle_of_a_long_clip_costs_no_step(tmp_path, capsys, monkeypatch):
    rows = [{"prompt": "a red circle moves left on a gray background", "frames": 49, "steps": 200}]
    manifest, out = write_manifest(tmp_path / "night.jsonl", rows), tmp_path / "out"
    store, saved = open_store(str(out)), []
    for patience_s in (1, 2, 4, 8):                     # the sampler may still load its weights
        with started(manifest, out, "--model", "demo", "--samplers", "1") as program:
            wait_for(lambda: any(store.list("embeddings/")), program)
            time.sleep(patience_s)
            program.send_signal(signal.SIGTERM)
            stdout, stderr = program.communicate(timeout=300)
        assert program.returncode == 130 and "what is being sampled is saved" in stderr and "Traceback" not in stderr
        assert "the same command continues" in stdout and json.loads(store.get("lease.json"))["released"]
        assert rows_of(out) == {} and not any(store.list("latents/"))
        if saved := list(store.list("steps/")):
            break
    step = int(unsealed(store.get(saved[0].key), saved[0].key, seal_of(store, fresh=False))[1]["step"])
    assert 0 < step < 200 and len(saved) == 1

    done = []
    monkeypatch.setattr(SavedSteps, "done", lambda self, step, state: done.append(step))
    assert render(capsys, manifest, out, "--model", "demo")[0] == 0
    assert done == list(range(step + 1, 201))
    assert_whole(out, 1, 1)
    assert render(capsys, manifest, tmp_path / "straight", "--model", "demo")[0] == 0
    assert clips_of(out) == clips_of(tmp_path / "straight") and len(done) == 400 - step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_work_has_begun_gives_the_lease_back(number, tmp_path, capsys, monkeypatch):
    manifest, out = write_manifest(tmp_path / "night.jsonl", [{"prompt": "a fox", "frames": 5}]), tmp_path / "out"
    handler = signal.getsignal(number)
    monkeypatch.setattr(Bookkeeper, "todo", lambda self: os.kill(os.getpid(), number))
    code, answer = render(capsys, manifest, out)
    assert code == 130 and answer["error"] == "Interrupted; the same command continues."
    assert json.loads((out / "lease.json").read_text())["released"]
    assert signal.getsignal(number) is handler


def test_what_a_driver_left_that_was_killed_while_it_tried_the_store_is_cleared(tmp_path, capsys):
    manifest, out = write_manifest(tmp_path / "night.jsonl", [{"prompt": "a fox", "frames": 5}]), tmp_path / "out"
    store = open_store(str(out))
    left, of_another_driver = "probe-0123456789abcdef", "probe-fedcba9876543210"
    for key in (left, of_another_driver, "probe-of-a-person"):
        store.put(key, b"first")
    an_hour_from_now = time.time() + 3600
    os.utime(out / of_another_driver, (an_hour_from_now, an_hour_from_now))
    assert render(capsys, manifest, out)[0] == 0
    assert [info.key for info in store.list("probe-")] == [of_another_driver, "probe-of-a-person"]


def test_only_what_a_run_has_made_is_removed_at_its_end(tmp_path, capsys):
    """Names as intermediates have them, of 64 hexadecimal digits; nothing is removed through a link, nothing else at
    all."""
    manifest, out = write_manifest(tmp_path / "night.jsonl", [{"prompt": "a fox", "frames": 5}]), tmp_path / "out"
    victim = tmp_path / "victim"
    victim.mkdir()
    persisted = f"ab/ab{'0' * 62}.safetensors"
    for folder in ("embeddings", "steps", "latents"):
        for name in (persisted, f"zz/{persisted[3:]}", "ab/thesis.txt", "thesis.safetensors", "ab/ab.safetensors"):
            (out / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (out / folder / name).write_bytes(b"x")
    assert render(capsys, manifest, out)[0] == 0
    for folder in ("embeddings", "steps", "latents"):
        assert sorted(str(path.relative_to(out / folder)) for path in (out / folder).rglob("*") if path.is_file()) == \
            ["ab/ab.safetensors", "ab/thesis.txt", "thesis.safetensors", f"zz/{persisted[3:]}"]
    (victim / "ab").mkdir()
    (victim / persisted).write_bytes(b"x")
    for place in (".tmp", "embeddings", "steps", "latents", "clips", "ledger", "steps/zz", "latents/ab"):
        out = tmp_path / place.replace("/", "-")
        (out / place).parent.mkdir(parents=True)
        (out / place).symlink_to(victim)
        assert render(capsys, manifest, out)[0] == 2, place
        assert [path.name for path in victim.rglob("*") if path.is_file()] == [persisted.rpartition("/")[2]]


def test_a_run_that_reaches_its_deadline_ends_with_4_and_the_next_night_continues(tmp_path, capsys):
    rows = [{"prompt": f"fox {number}", "frames": 5} for number in range(8)]
    manifest, out = write_manifest(tmp_path / "night.jsonl", rows), tmp_path / "out"
    until = (datetime.now() + timedelta(seconds=2)).isoformat()        # Ray and the models take longer to start
    code = cli.main(["render", str(manifest), "--out", str(out), "--model", "tiny", "--until", until, "--max-cost", "1",
                     "--price", "2", "--device", "cpu"])
    captured = capsys.readouterr()
    assert code == 4 and "0 rows done, 0 failed, 8 pending" in captured.out
    assert "The same command continues" in captured.out
    assert "No clip is begun that would not be done by" in captured.err and "0.50 GPU hours" in captured.err
    assert "a run on CPUs holds no GPU" in captured.err and not (out / "_SUCCESS.json").exists()
    code, answer = render(capsys, manifest, out, "--until", "03:00")
    assert code == 0 and answer["rendered"] == 8 and answer["gpu_hours"] == 0
    assert_whole(out, 8, 8)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_driver_that_is_killed_at_any_moment_loses_and_repeats_nothing(kills, tmp_path, capsys):
    num = 12 if kills == 2 else 60
    rows = [{"id": str(number), "prompt": f"fox {number}", "frames": 73} for number in range(num)]
    manifest, out = write_manifest(tmp_path / "night.jsonl", rows), tmp_path / "out"
    rng = random.Random(kills)
    seen: dict[str, int] = {}
    for _ in range(kills):
        until = min(num - 1, published(out) + rng.randint(0, num // kills))
        with started(manifest, out) as program:
            wait_for(lambda: published(out) >= until or program.poll() is not None, program)
            time.sleep(rng.random() / 4)
        for path in (out / "clips").rglob("*.mp4"):
            assert seen.setdefault(path.name, path.stat().st_ino) == path.stat().st_ino     # never published again
    code, answer = render(capsys, manifest, out)
    assert code == 0 and answer["done"] == num
    for path in (out / "clips").rglob("*.mp4"):
        assert seen.get(path.name, path.stat().st_ino) == path.stat().st_ino
    assert_whole(out, num, num)
    assert Counter(row["clip_id"] for row in rows_of(out).values()).most_common(1)[0][1] == 1
