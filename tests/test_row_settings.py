"""What it costs to add a row setting or a column of the ledger: an entry in one file, and everything else follows."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dailies.model.catalog import CATALOG
from dailies.model.settings import BY_NAME, FURTHER, SAMPLING, SETTINGS
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.manifest.validation import ManifestError
from dailies.pipeline.plan import Defaults, Plan
from dailies.pipeline.run.ledger_row import TABLE

ROOT = Path(__file__).resolve().parent.parent

# runs dailies with one text of one file of it replaced, before anything is imported
WITH = """
import importlib.util, json, sys
from pathlib import Path

def imported_with(name, old, new):
    spec = importlib.util.find_spec(name)
    source = Path(spec.origin).read_text()
    assert source.count(old) == 1, (name, old)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    exec(compile(source.replace(old, new), spec.origin, "exec"), module.__dict__)
    setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)

def caught(call):
    try:
        call()
    except Exception as error:
        return str(error)

"""


def answer_of(script: str, folder: Path) -> dict:
    env = {"PYTHONPATH": str(ROOT), "HOME": str(folder), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", WITH + script, str(folder)], cwd=folder, capture_output=True,
                          text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_setting_of_one_entry_goes_from_column_flag_and_file_to_plan_request_clip_id_ledger_and_clip(tmp_path):
    rows = ["id,prompt,seed,rescale,loop", "silent,a,1,,", "neutral,a,1,0,false", "own,a,1,2.5,TRUE"]
    (tmp_path / "m.csv").write_text("\n".join(rows))
    (tmp_path / "night.toml").write_text("rescale = 1.5\n")
    found = answer_of("""
imported_with("dailies.model.settings", 'SETTINGS: tuple[Setting, ...] = (', '''SETTINGS: tuple[Setting, ...] = (
    Setting(name="rescale", type=float, low=-1, high=10, neutral=0.0, allowed="a number from -1 to 10"),
    Setting(name="loop", type=bool, neutral=False, allowed="true or false"),
    Setting(name="quality_mode", type=str, max_bytes=8, choices=("fast", "best"), allowed="fast or best"),''')
from dataclasses import replace
from dailies.actors.clip_file import labels, provenance
from dailies.actors.messages import Clip
from dailies.jobs.cli import main
from dailies.jobs.settings import RenderJob
from dailies.model.catalog import CATALOG
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.plan import Defaults, Plan, clip_id_for, hashed, with_another_seed
from dailies.pipeline.run.ledger import Ledger, read
from dailies.pipeline.run.ledger_row import row_of
from dailies.pipeline.store import open_store

folder = Path(sys.argv[1])
plain = CATALOG["demo"]
card = CATALOG["demo"] = replace(plain, settings={"rescale": 0.0, "loop": False})
job = RenderJob.read({"manifest": "m.csv", "out": "o", "loop": True}, folder / "night.toml")
manifest = Manifest.read("m.csv")

def plan_of(card, **said):
    return Plan.make(manifest, card, Defaults(**said), weights_fingerprint="w", precision="fp32")

def requests_of(plan):
    return {row.id: request for request in plan.requests() for row in plan.planned_rows(request.clip_id)}

requests, by_default = requests_of(plan_of(card)), requests_of(plan_of(card, **job.row_defaults()))
own = requests["own"]
store = open_store(folder / "run")
with Ledger.open(store) as ledger:
    ledger.append([row_of(name, Clip(request=request, uri="u", sha256="ab", num_bytes=1, duration_s=1.0))
                   for name, request in requests.items()])
rows = {row["id"]: row for row in read(store).to_pylist()}
(folder / "plain.csv").write_text("id,prompt,seed\\nsilent,a,1\\n")
before = Plan.make(Manifest.read("plain.csv"), plain, weights_fingerprint="w", precision="fp32")
code = main(["plan", "m.csv", "--rescale", "1.5", "--no-loop", "--json"])
print()
print(json.dumps({
    "settings": {name: dict(request.settings) for name, request in requests.items()}, "job": job.row_defaults(),
    "by_default": {name: dict(request.settings) for name, request in by_default.items()},
    "clip_ids": {name: request.clip_id for name, request in requests.items()},
    "before": next(before.requests()).clip_id, "names_itself": clip_id_for(**hashed(own)) == own.clip_id,
    "again": dict(with_another_seed(own).settings),
    "buckets": sorted({request.bucket for request in requests.values()}),
    "ledger": {name: [row["rescale"], row["loop"], row["quality_mode"]] for name, row in rows.items()},
    "provenance": {name: [provenance(request).get("rescale"), provenance(request).get("loop")]
                   for name, request in requests.items()},
    "description": labels(own)["description"], "code": code,
    "refused": caught(lambda: plan_of(plain)), "default": caught(lambda: plan_of(plain, rescale=1.0)),
    "too_much": caught(lambda: plan_of(card, rescale=-2)),
}))
""", tmp_path)
    neutral = {"rescale": 0.0, "loop": False}
    assert found["settings"] == {"silent": neutral, "neutral": neutral, "own": {"rescale": 2.5, "loop": True}}
    assert found["job"] == {"rescale": 1.5, "loop": True}
    assert found["by_default"]["silent"] == {"rescale": 1.5, "loop": True} and found["by_default"]["neutral"] == neutral
    ids = found["clip_ids"]
    assert ids["silent"] == ids["neutral"] == found["before"] != ids["own"] and found["names_itself"]
    assert found["again"] == {"rescale": 2.5, "loop": True}
    assert found["buckets"] == ["64x64x49 24 steps guidance 4", "64x64x49 rescale 2.5 loop True 24 steps guidance 4"]
    assert found["ledger"] == {"silent": [0.0, False, None], "neutral": [0.0, False, None], "own": [2.5, True, None]}
    assert found["provenance"] == {"silent": [None, None], "neutral": [None, None], "own": ["2.5", "True"]}
    assert found["description"].endswith("seed 1, rescale 2.5, loop True, 24 steps, guidance 4, fp32, dense attention")
    assert "row 2, rescale: got 2.5; allowed: nothing: demo has no such setting" in found["refused"]
    assert found["default"] == "rescale must be nothing: demo has no such setting; got 1.0"
    assert found["too_much"] == "rescale must be a number from -1 to 10; got -2" and found["code"] == 0


def test_a_column_of_the_ledger_is_an_entry_and_its_value_in_one_file(tmp_path):
    found = answer_of("""
imported_with("dailies.pipeline.run.ledger_row", '"path": STRING, ', '"audio_lufs": MEASURE, "path": STRING, ')
import pyarrow as pa
from dailies.pipeline.run.ledger import COLUMNS, Ledger, parquet_bytes, read
from dailies.pipeline.run.layout import part_key
from dailies.pipeline.store import open_store

store = open_store(Path(sys.argv[1]) / "run")
before = pa.table({"id": ["old"], "seed": [1], "status": ["done"]})
store.create(part_key(1, 0), parquet_bytes(before))
with Ledger.open(store) as ledger:
    ledger.append([{"id": "new", "seed": 1, "status": "done", "audio_lufs": -23.0}])
print(json.dumps([read(store, ["id", "audio_lufs"]).to_pylist(), str(COLUMNS.field("audio_lufs").type)]))
""", tmp_path)
    assert found == [[{"id": "old", "audio_lufs": None}, {"id": "new", "audio_lufs": -23.0}], "double"]


def test_every_name_has_one_meaning():
    names = [setting.name for setting in SETTINGS]
    assert len(names) == len({*names}) == len(BY_NAME)
    own = {name for name in TABLE if name not in {setting.name for setting in SAMPLING}}
    assert not own & {setting.name for setting in FURTHER}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_setting_says_what_it_allows(setting):
    assert setting.allowed and (setting.type is str or setting.type is bool or setting.low < setting.high)
    assert setting.type is not str or setting.max_bytes
    assert re.fullmatch(r"[a-z][a-z0-9_]*", setting.name)
    # one that some models alone take leaves the names of clips that were made before it
    assert setting.by_name or setting.field or setting.neutral is not None


SOUNDING = replace(CATALOG["demo"], name="sounding", settings={
    "audio": True, "video_guidance": 4.0, "audio_guidance": 7.0, "modality_guidance": 3.0, "stg": 1.0})


def planned(folder, card, *rows, **said):
    (folder / "m.csv").write_text("\n".join(rows) + "\n")
    return Plan.make(Manifest.read(str(folder / "m.csv")), card, Defaults(**said), weights_fingerprint="w",
                     precision="fp32")


def test_guidance_of_the_picture_has_two_names_with_models_of_sound(tmp_path):
    plan = planned(tmp_path, SOUNDING, "id,prompt,seed,guidance,video_guidance", "silent,a,1,,", "one,a,1,2,",
                   "other,a,1,,2", "both,a,1,2,2.0")
    found = {row.id: (request.guidance, request.settings["video_guidance"], request.clip_id)
             for request in plan.requests() for row in plan.planned_rows(request.clip_id)}
    assert found["silent"][:2] == (4.0, 4.0) and found["one"][:2] == (2.0, 2.0)
    assert found["one"] == found["other"] == found["both"]
    by_default = planned(tmp_path, SOUNDING, "id,prompt,video_guidance", "silent,a,", "own,a,2", guidance=5.0)
    assert sorted((request.guidance, request.settings["video_guidance"]) for request in by_default.requests()) == [
        (2.0, 2.0), (5.0, 5.0)]


def test_two_guidances_of_one_picture_are_refused(tmp_path):
    with pytest.raises(ManifestError, match="video_guidance: got 3.*what guidance says, whose other name it is"):
        planned(tmp_path, SOUNDING, "prompt,guidance,video_guidance", "a,2,3")
    with pytest.raises(ValueError, match="another name for guidance with sounding.*got 3 and 2"):
        planned(tmp_path, SOUNDING, "prompt", "a", guidance=2.0, video_guidance=3.0)


def test_of_a_silent_model_silence_may_be_asked_and_sound_may_not(tmp_path):
    silent = planned(tmp_path, CATALOG["demo"], "prompt,seed,audio", "a,1,false")
    plain = planned(tmp_path, CATALOG["demo"], "prompt,seed", "a,1")
    assert [r.clip_id for r in silent.requests()] == [r.clip_id for r in plain.requests()]
    with pytest.raises(ManifestError, match="audio: got True; allowed: nothing or false: demo makes no sound"):
        planned(tmp_path, CATALOG["demo"], "prompt,audio", "a,true")
    with pytest.raises(ManifestError, match="stg: got 1.*nothing: demo has no such setting"):
        planned(tmp_path, CATALOG["demo"], "prompt,stg", "a,1")


def test_sound_counts_in_the_clips_name_where_there_is_none(tmp_path):
    plan = planned(tmp_path, SOUNDING, "prompt,seed,audio", "a,1,", "a,1,true", "a,1,false")
    with_it, without = plan.requests()
    assert (with_it.settings["audio"], without.settings["audio"]) == (True, False)
    assert "audio" not in with_it.identity() and without.identity()["audio"] is False
    assert "audio False" in without.bucket
