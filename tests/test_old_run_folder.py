"""A run folder of an older version is continued: what is published stays, what waited is made again or taken as it is.

goldens/run_folder_c717109 was made by commit c717109, of rows a, b, c and d: a and b are done, c has its latent and d
one step of two when the driver ended.
"""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_folders import ask, render
from test_report_server import serving
from tiny import TINY

import dailies

GOLDENS = Path(__file__).parent / "goldens"
OLD = GOLDENS / "run_folder_c717109"
ROWS = GOLDENS / "run_folder_c717109.csv"


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(OLD, tmp_path / "out")
    return tmp_path / "out"


def prepared(folder: Path, defaults: dailies.Defaults | None = None, rows: Path = ROWS, **options) -> dailies.Run:
    return dailies.prepare(dailies.Manifest.read(str(rows)), dailies.open_store(folder), TINY,
                           weights=dailies.locate_weights(None, TINY), defaults=defaults or dailies.Defaults(),
                           **options)


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


def test_another_precision_than_that_of_c717109_is_refused_by_name(folder):
    with pytest.raises(dailies.DailiesError, match="precision was fp32, is bf16.*Choose another output folder, or "):
        prepared(folder, precision="bf16")


def test_other_defaults_than_those_of_c717109_are_of_what_is_not_done_yet(folder):
    before = pq.read_table(folder / "ledger" / "000001-000000.parquet").to_pylist()
    run = prepared(folder, dailies.Defaults(steps=5))
    assert str(run.change) == ("for rows that do not say, steps was 2, is 5; 2 that are done keep what they were made "
                               "with")
    assert [outcome.value.request.num_steps for outcome in run.render(stages_of(run))] == [5, 5]
    rows = {row["id"]: row for row in dailies.read_ledger(run.store).to_pylist()}
    assert {name: rows[name]["steps"] for name in "abcd"} == {"a": 2, "b": 2, "c": 5, "d": 5}
    assert all(rows[row["id"]]["clip_id"] == row["clip_id"] for row in before)
    for steps in (2, 5):                                # whatever is said on another night
        assert not list(prepared(folder, dailies.Defaults(steps=steps)).render(stages_of(run)))
    assert {row["id"]: row for row in dailies.read_ledger(run.store).to_pylist()} == rows


def test_rows_without_ids_in_a_folder_of_before_are_known_by_their_position(folder, tmp_path):
    """As c717109 named them: the third row was "2", with a seed that followed from that."""
    part, = (folder / "ledger").iterdir()
    table = pq.read_table(part)
    names = {"a": "0", "b": "1"}
    pq.write_table(table.set_column(table.column_names.index("id"), "id", pa.array(
        [names[name] for name in table["id"].to_pylist()])), part)
    lines = [line.split(",", 1)[1] for line in (GOLDENS / "run_folder_c717109.csv").read_text().splitlines()]
    (tmp_path / "rows.csv").write_text("\n".join([*lines, "a blue circle moves left,9,5\n"]))
    run = prepared(folder, rows=tmp_path / "rows.csv")
    assert run.plan.keys()["id"].to_pylist() == list("01234")
    assert len(list(run.render(stages_of(run)))) == 3   # c, d, and what came behind
    assert sorted(dailies.read_ledger(run.store)["id"].to_pylist()) == list("01234")
    fresh = prepared(tmp_path / "new", rows=tmp_path / "rows.csv").plan
    assert {request.clip_id for request in fresh.requests()} == {request.clip_id for request in run.plan.requests()}


def test_a_run_of_c717109_opens_in_every_command_of_the_morning(folder, tmp_path):
    said = ask("status", folder)[1]
    assert (said["done"], said["rows"]) == (2, 4)
    assert ask("verify", folder)[1]["wrong"] == []
    code, said, _ = ask("report", folder)
    assert code == 0 and said["done"] == 2 and (folder / "report" / "index.html").is_file()
    rows = {row["id"]: row for row in dailies.read_ledger(dailies.open_store(folder)).to_pylist()}
    assert len(list(folder.glob("posters/*/*.webp"))) == 2     # of clips that were published before there were any
    (tmp_path / "picks.json").write_text(json.dumps({"format": 1, "picks": [
        {"id": "a", "seed": rows["a"]["seed"], "clip_id": rows["a"]["clip_id"], "decision": "redo",
         "decided_at": "2026-11-30T08:00:00Z"}]}))
    assert ask("pick", folder, "--from", tmp_path / "picks.json")[1]["kept"] == 1
    assert ask("redo", folder, "--picks")[1]["to_make"] == 1
    assert ask("drop", folder, "--where", "id = b")[1]["dropped"] == 1
    run = prepared(folder)
    assert len(list(run.render(stages_of(run)))) == 3           # a again, c and d
    after = {row["id"]: row for row in dailies.read_ledger(run.store).to_pylist()}
    assert sorted(after) == ["a", "c", "d"] and after["a"]["replaces"] == rows["a"]["clip_id"]
    code, said, _ = ask("gc", folder, "--yes")
    assert code == 0 and not {path.stem for path in folder.glob("clips/*/*.mp4")} & {
        rows["a"]["clip_id"], rows["b"]["clip_id"]}
    assert ask("verify", folder)[0] == 0
    (tmp_path / "more.csv").write_text(f"{ROWS.read_text()}e,a blue circle moves left,5,5\n")
    said = ask("plan", tmp_path / "more.csv", "--out", folder, "--model", "tiny", "--device", "cpu")[1]
    assert (said["new"], said["changed"], said["gone"], said["to_make"]) == (1, 0, 0, 1)
    assert render(tmp_path / "more.csv", folder)[1]["rendered"] == 1
    assert ask("retry", folder)[0] == 0 and ask("gc", folder)[1]["objects"] == 0
    with serving(folder) as server:
        assert server.report().figures["done"] == 4
    code, said, _ = render(tmp_path / "more.csv", tmp_path / "new", "--reuse", folder)
    assert code == 0 and said["rendered"] == 2                  # a and b, as they were asked for; c, d and e are there
