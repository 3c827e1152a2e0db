"""A run folder of an older version is continued: what is published stays, what waited is made again or taken as it is.

goldens/run_folder_c717109 was made by commit c717109, of rows a, b, c and d: a and b are done, c has its latent and d
one step of two when the driver ended.
"""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny import TINY

import dailies

GOLDENS = Path(__file__).parent / "goldens"
OLD = GOLDENS / "run_folder_c717109"


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(OLD, tmp_path / "out")
    return tmp_path / "out"


def prepared(folder: Path, defaults: dailies.Defaults | None = None) -> dailies.Run:
    return dailies.prepare(dailies.Manifest.read(str(GOLDENS / "run_folder_c717109.csv")), dailies.open_store(folder),
                           TINY, weights=dailies.locate_weights(None, TINY), defaults=defaults or dailies.Defaults())


def stages_of(run: dailies.Run) -> list[dailies.Stage]:
    return dailies.text_to_video(TINY, None, run.store, TINY.runtime("cpu", run.plan.precision, run.plan.attention))


def test_a_run_of_c717109_is_continued_and_no_clip_of_it_is_made_again(folder):
    clips = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("clips/*/*.mp4")}
    before = pq.read_table(folder / "ledger" / "000001-000000.parquet")
    run = prepared(folder)
    assert run.has_begun and run.change is None
    made = [outcome.value for outcome in run.render(stages_of(run))]
    assert [clip.request.prompt for clip in made] == ["a green triangle moves down", "a red circle moves right"]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in clips} == clips
    ledger = dailies.read_ledger(run.store, ["id", "status", "clip_id", "sha256"])
    assert sorted(ledger["id"].to_pylist()) == ["a", "b", "c", "d"] and {*ledger["status"].to_pylist()} == {"done"}
    assert {*before["sha256"].to_pylist()} < {*ledger["sha256"].to_pylist()}
    assert (folder / "_SUCCESS.json").is_file()
    assert sorted(path.name for path in folder.iterdir()) == ["_SUCCESS.json", "clips", "lease.json", "ledger",
                                                              "posters", "run.json"]


def test_the_clips_of_c717109_are_those_that_are_made_today(folder, tmp_path):
    old, new = prepared(folder), prepared(tmp_path / "new")
    assert list(old.plan.requests()) == list(new.plan.requests())
    latent = json.loads((folder / "run.json").read_text())["identity"]
    assert latent["weights_fingerprint"] == new.plan.weights_fingerprint


def test_other_settings_than_those_of_c717109_are_refused_by_name(folder):
    with pytest.raises(dailies.DailiesError, match="steps was 2, is 5.*Choose another output folder, or repeat"):
        prepared(folder, dailies.Defaults(steps=5))
