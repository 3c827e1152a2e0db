"""Manifests rendered by tiny Wan models: the same commands, the same pipeline, another family."""

import hashlib
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from image_files import BROKEN, deep_grey, encoded, jpeg, palette, pixels, png, see_through
from one_process import main
from PIL import Image
from test_driver import SimulatedExecutor, box, drive
from wan_tiny import CARDS, WAN_TINY, write_weights

from dailies.actors.clip_file import read_clip
from dailies.jobs.bench.pretend import SHARED, pretend_stages
from dailies.model.catalog import CATALOG
from dailies.model.refitted import decode_fallbacks
from dailies.pipeline import stages
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.plan import Plan
from dailies.pipeline.run import ledger
from dailies.pipeline.run.layout import clip_key
from dailies.pipeline.store import open_store

PROGRAM = [sys.executable, str(Path(__file__).parent / "wan_tiny.py")]
ROWS = [{"id": f"row-{number}", "prompt": prompt, "frames": 9}
        for number, prompt in enumerate(("a red fox", "日本の猫 🦊", "snow &amp; ice"))]


@pytest.fixture
def in_process(monkeypatch):
    """The tiny models in the catalogue."""
    for card in CARDS:
        monkeypatch.setitem(CATALOG, card.name, card)


def manifest(folder, rows=ROWS):
    path = folder / "night.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(out):
    return {row["id"]: row for row in ledger.read(open_store(str(out))).to_pylist()}


def render(capsys, path, out, name, weights, *options):
    code = main(["render", str(path), "--out", str(out), "--model", name, "--weights", str(weights), "--device",
                 "cpu", "--json", *options])
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
        assert read_clip((tmp_path / "out" / clip_key(row["clip_id"])).read_bytes()).frames == 9
    code, again = render(capsys, manifest(tmp_path), tmp_path / "out", name, tmp_path / "weights")
    assert code == 0 and again["rendered"] == 0


def test_wan_decodes_in_bf16_where_it_is_asked_to_and_plan_run_and_ledger_say_so(in_process, tmp_path, capsys):
    weights, path = tmp_path / "weights", manifest(tmp_path, ROWS[:1])
    write_weights(weights, WAN_TINY)
    bf16 = ("--decode-precision", "bf16")
    assert render(capsys, path, tmp_path / "own", "wan-tiny", weights)[0] == 0
    assert render(capsys, path, tmp_path / "bf16", "wan-tiny", weights, *bf16)[0] == 0
    [own], [ours] = (rows_of(tmp_path / out).values() for out in ("own", "bf16"))
    assert (own["decode_precision"], ours["decode_precision"]) == (None, "bf16")
    on = CATALOG["wan-tiny"].runtime("cpu", "fp32", decode_precision="bf16")
    instead = decode_fallbacks(on)                      # on a CPU without bf16 products
    assert ours["fallbacks"] == [*own["fallbacks"], *instead]
    assert own["clip_id"] != ours["clip_id"] and own["precision"] == ours["precision"] == "fp32"
    identities = [json.loads((tmp_path / out / "run.json").read_text())["identity"] for out in ("own", "bf16")]
    assert identities[1] == identities[0] | {"decode_precision": "bf16"}
    # a run goes on as it began: with what it keeps, with nothing said, and with its own default said
    for out, options in (("bf16", ()), ("bf16", bf16), ("own", ()), ("own", ("--decode-precision", "fp32"))):
        code, said = render(capsys, path, tmp_path / out, "wan-tiny", weights, *options)
        assert (code, said["rendered"]) == (0, 0)
    what = "--model", "wan-tiny", "--weights", str(weights), "--device", "cpu"
    for out, precision, before, now in (("own", "bf16", "None", "bf16"), ("bf16", "fp32", "bf16", "None")):
        assert main(["render", str(path), "--out", str(tmp_path / out), *what, "--decode-precision", precision]) == 2
        assert f"decode_precision was {before}, is {now}" in capsys.readouterr().err
    assert main(["plan", str(path), "--out", str(tmp_path / "plan"), *what, *bf16]) == 0
    assert "decode_precision bf16" in capsys.readouterr().out


def test_the_plan_of_a_wan_model_tells_its_defaults(in_process, tmp_path, capsys):
    write_weights(tmp_path / "weights", WAN_TINY)
    assert main(["plan", str(manifest(tmp_path, [{"prompt": "a"}, {"prompt": "b", "duration_s": 2.1}])),
                 "--out", str(tmp_path / "out"),
                 "--model", "wan-tiny", "--weights", str(tmp_path / "weights"), "--device", "cpu", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["settings"]["fps"] == 16.0 and said["settings"]["steps"] == 3 and said["settings"]["guidance"] == 5.0
    assert [bucket["frames"] for bucket in said["buckets"]] == [17, 33]
    assert said["roundings"] == [{"note": "2.1 s rounded down to 2 s (33 frames)", "rows": 1}]


I2V_MODELS = ["wan-tiny-i2v", "wan-tiny-i2v-a14b"]     # with CLIP, and with two experts


def write_images(folder):
    """Rows of every good kind, and what their clips must be."""
    files = {"a.png": png(), "deep/b.jpg": jpeg(orientation=6), "c.webp": encoded(Image.fromarray(pixels()), "webp"),
             "grey.png": encoded(Image.fromarray(pixels()[:, :, 0])), "deep.png": deep_grey(),
             "clear.png": see_through(), "palette.png": palette()}
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return [{"id": name, "prompt": "it moves", "frames": 5, "seed": 1, "image": name} for name in files]


@pytest.mark.parametrize("name", I2V_MODELS)
def test_images_become_clips(name, in_process, tmp_path, capsys):
    write_weights(tmp_path / "weights", CATALOG[name])
    twin = {"id": "twin", "prompt": "it moves", "frames": 5, "seed": 1, "image": "./deep/../a.png"}
    sized = {"id": "sized", "prompt": "it moves", "frames": 5, "seed": 1, "image": "a.png", "resolution": "32x32"}
    path = manifest(tmp_path, [*write_images(tmp_path), twin, sized])
    code, said = render(capsys, path, tmp_path / "out", name, tmp_path / "weights")
    assert (code, said["done"], said["rendered"]) == (0, 9, 8)
    rows = rows_of(tmp_path / "out")
    for row in rows.values():
        size = (32, 32) if row["id"] == "sized" else (32, 48) if row["id"] == "deep/b.jpg" else (48, 32)
        assert (row["status"], (row["width"], row["height"]), row["frames"]) == ("done", size, 5)
        assert ("image 60x40 cropped to 40x40" in row["fallbacks"]) == (row["id"] == "sized")
    assert rows["twin"]["clip_id"] == rows["a.png"]["clip_id"] and len({row["clip_id"] for row in rows.values()}) == 8
    clip = read_clip((tmp_path / "out" / clip_key(rows["a.png"]["clip_id"])).read_bytes())
    assert clip.metadata["image_sha256"] == hashlib.sha256(png()).hexdigest()
    assert len({row["sha256"] for row in rows.values()}) == 8
    code, again = render(capsys, path, tmp_path / "out", name, tmp_path / "weights")
    assert code == 0 and again["rendered"] == 0


def test_two_experts_make_clips_of_images_on_ray(tmp_path):
    subprocess.run([*PROGRAM, "write", "wan-tiny-i2v-a14b", str(tmp_path / "weights")], check=True, timeout=120)
    done = subprocess.run([*PROGRAM, "render", str(manifest(tmp_path, write_images(tmp_path))),
                           "--out", str(tmp_path / "out"), "--model",
                           "wan-tiny-i2v-a14b", "--weights", str(tmp_path / "weights"), "--device", "cpu",
                           "--samplers", "1", "--json"],
                          capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["done"] == 7


def test_a_bad_image_is_its_rows_failure_and_the_rest_renders(in_process, tmp_path, capsys, s3_bucket):
    """Of every kind, in a folder and in a bucket, in one manifest."""
    write_weights(tmp_path / "weights", CATALOG["wan-tiny-i2v"])
    night = tmp_path / "night"
    night.mkdir()
    rows = write_images(night)
    want = {}
    for name, (said, data) in BROKEN.items():
        (night / name).write_bytes(data)
        want[name] = said
    (tmp_path / "outside.png").write_bytes(png())
    (night / "link.png").symlink_to(tmp_path / "outside.png")
    open_store(s3_bucket).put("a.png", png())
    want |= {"../outside.png": "outside the manifest's folder", "link.png": "outside the manifest's folder",
             "gone.png": "no such file", ".hidden.png": "a hidden file",
             "s3://elsewhere/a.png": "--allow-images", f"{s3_bucket}/gone.png": "no such object",
             f"file://{night}/a.png": "neither a path nor s3://"}
    rows += [{"id": str(number), "prompt": "x", "frames": 5, "image": name} for number, name in enumerate(want)]
    rows += [{"id": "none", "prompt": "x", "frames": 5},
             {"id": "s3", "prompt": "x", "frames": 5, "image": f"{s3_bucket}/a.png"}]
    path = manifest(night, rows)
    allowed = ["--allow-images", s3_bucket]
    options = (path, tmp_path / "out", "wan-tiny-i2v", tmp_path / "weights", *allowed)
    assert main(["render", str(path), "--out", str(tmp_path / "out"), "--model", "wan-tiny-i2v",
                 "--weights", str(tmp_path / "weights"), *allowed]) == 2
    assert f"{len(want) + 1} errors" in capsys.readouterr().err and not (tmp_path / "out").exists()
    code, said = render(capsys, *options, "--skip-invalid")
    assert (code, said["done"], said["failed"]) == (3, 8, len(want) + 1)
    ledger = rows_of(tmp_path / "out")
    for number, why in enumerate(want.values()):
        assert ledger[str(number)]["error_type"] == "invalid" and why in ledger[str(number)]["error"]
    assert "image: got nothing" in ledger["none"]["error"] and ledger["s3"]["status"] == "done"
    assert render(capsys, *options, "--skip-invalid")[1]["rendered"] == 0


def test_an_image_that_changes_under_a_run_is_its_rows_failure_and_another_run_afterwards(in_process, tmp_path, capsys,
                                                                                          monkeypatch):
    write_weights(tmp_path / "weights", CATALOG["wan-tiny-i2v"])
    path = manifest(tmp_path, write_images(tmp_path)[:3])
    run_local = stages.run_local

    def meddle(steps, requests):
        (tmp_path / "a.png").write_bytes(png(41, 60))
        (tmp_path / "c.webp").unlink()
        return run_local(steps, requests)

    monkeypatch.setattr(stages, "run_local", meddle)
    code, said = render(capsys, path, tmp_path / "out", "wan-tiny-i2v", tmp_path / "weights")
    assert (code, said["done"], said["failed"]) == (3, 1, 2)
    errors = {row["id"]: row["error"] for row in rows_of(tmp_path / "out").values() if row["status"] == "failed"}
    assert "a.png has changed since this run was planned" in errors["a.png"]
    assert "c.webp: no such file" in errors["c.webp"]
    (tmp_path / "c.webp").write_bytes(encoded(Image.fromarray(pixels()), "webp"))
    assert render(capsys, path, tmp_path / "out", "wan-tiny-i2v", tmp_path / "weights")[0] == 2
    (tmp_path / "a.png").write_bytes(png())
    assert main(["retry", str(tmp_path / "out"), "--json"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(stages, "run_local", run_local)
    assert render(capsys, path, tmp_path / "out", "wan-tiny-i2v", tmp_path / "weights")[1]["done"] == 3


def test_rows_are_ordered_and_batched_so_that_experts_change_rarely(tmp_path):
    """The plan and the driver on a simulated GPU; a batch is one turn of each expert (test_wan_actors.py)."""
    rows = [{"prompt": f"prompt {number}", "resolution": ("480p", "720p")[number % 2], "steps": 40 - number // 2 % 2}
            for number in range(160)]
    card = CATALOG["wan2.2-t2v-a14b"]
    plan = Plan.make(Manifest.read(str(manifest(tmp_path, rows))), card, weights_fingerprint="w" * 64, precision="bf16")
    executor = SimulatedExecutor(box(1), {"encode": 1.0, "sample": 600.0, "publish": 20.0})
    drive(executor, pretend_stages(gpus=SHARED, batch=card.clips_per_turn), plan.requests())
    batches = [[task.request.bucket for task in call.tasks] for _, _, call in executor.worked["sample"]]
    assert sum(map(len, batches)) == 160 and all(len(set(batch)) == 1 for batch in batches)
    assert len(batches) <= 160 / card.clips_per_turn + 4    # the first are not waited for; each bucket has a last
    assert sum(one[0] != other[0] for one, other in pairwise(batches)) == 3


def test_the_plan_of_a_model_of_images_tells_them_and_their_shapes(in_process, tmp_path, capsys):
    write_weights(tmp_path / "weights", CATALOG["wan-tiny-i2v"])
    command = ["plan", str(manifest(tmp_path, write_images(tmp_path))), "--out", str(tmp_path / "out"),
               "--model", "wan-tiny-i2v", "--weights", str(tmp_path / "weights"), "--device", "cpu"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "7 rows, 7 images, 7 clips with wan-tiny-i2v" in said
    assert "6 x 48x32, 5 frames" in said and "1 x 32x48, 5 frames" in said
