"""A row that the run folder knows and that asks for something else: refused by name, made again, or kept."""

import shutil

import pytest
from run_folders import ask, clips_of, contents, render, rendered, write

from dailies.pipeline.run import ledger
from dailies.pipeline.store import open_store

ROWS = [{"id": f"row-{number}", "prompt": f"a fox {number}", "frames": 5} for number in range(4)]


def rows_of(out, **options):
    return {row["id"]: row for row in ledger.read(open_store(out), **options).to_pylist()}


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    return rendered(ROWS, tmp_path_factory.mktemp("night"))


@pytest.fixture
def out(night, tmp_path):
    return shutil.copytree(night / "out", tmp_path / "out")


@pytest.fixture
def changed(tmp_path):
    """Two rows ask for something else, one is new, one gone."""
    rows = [ROWS[0] | {"prompt": "a cat"}, ROWS[1] | {"steps": 1}, ROWS[2], {"id": "new", "prompt": "new", "frames": 5}]
    return write(tmp_path / "changed.jsonl", rows)


def test_it_is_refused_by_name_and_nothing_is_written(out, changed):
    before = contents(out)
    for command in ("render", "plan"):
        code, answer, _ = ask(command, changed, "--out", out, "--model", "tiny", "--device", "cpu")
        assert code == 2 and "other content of 2 rows: 'row-0', 'row-1' (by id)" in answer["error"]
        assert "1 are done, 1 new; 1 that are there are not in this manifest" in answer["error"]
    assert contents(out) == before


def test_twenty_of_many_are_named(tmp_path):
    rows = [{"id": f"row-{number}", "prompt": "a fox", "seed": 1, "frames": 5} for number in range(30)]
    assert render(write(tmp_path / "m.jsonl", rows), tmp_path / "out")[1]["rendered"] == 1
    write(tmp_path / "m.jsonl", [row | {"prompt": "a cat"} for row in rows])
    code, answer, _ = render(tmp_path / "m.jsonl", tmp_path / "out")
    assert code == 2 and "'row-19' and 10 more (by id)" in answer["error"] and "row-20" not in answer["error"]


def test_it_is_made_again_in_place_of_what_is_there(out, changed):
    before, clips = rows_of(out), clips_of(out)
    said = ask("plan", changed, "--out", out, "--model", "tiny", "--device", "cpu", "--changed", "render")[1]
    assert (said["new"], said["done"], said["changed"], said["gone"], said["to_make"]) == (1, 1, 2, 1, 3)
    code, answer, _ = render(changed, out, "--changed", "render", "--limit", 1)
    assert code == 4 and answer["rendered"] == 1 and answer["pending"] == 2
    code, answer, _ = render(changed, out)              # half-way, and not said again
    assert code == 2 or answer["rendered"] == 1
    code, answer, _ = render(changed, out, "--changed", "render")
    assert code == 0 and answer["done"] == 4
    after = rows_of(out)
    assert sorted(after) == ["new", "row-0", "row-1", "row-2", "row-3"]
    for name in ("row-0", "row-1"):
        assert after[name]["replaces"] == before[name]["clip_id"] != after[name]["clip_id"]
    assert after["row-2"]["clip_id"] == before["row-2"]["clip_id"] and after["row-2"]["replaces"] is None
    assert clips.items() < clips_of(out).items() and len(clips_of(out)) == 7        # the old ones stay, until gc
    assert render(changed, out)[1]["rendered"] == 0
    status = ask("status", out)[1]
    assert (status["done"], status["pending"], status["clips"], status["finished"]) == (5, 0, 5, True)
    assert ask("verify", out)[1]["clips"] == 5


def test_it_is_kept(out, changed):
    before = rows_of(out)
    said = ask("plan", changed, "--out", out, "--model", "tiny", "--device", "cpu", "--changed", "keep")[1]
    assert (said["new"], said["done"], said["changed"], said["gone"], said["to_make"]) == (1, 3, 2, 1, 1)
    code, answer, _ = render(changed, out, "--changed", "keep")
    assert code == 0 and answer["rendered"] == 1
    after = rows_of(out)
    assert all(after[name]["clip_id"] == row["clip_id"] for name, row in before.items()) and len(after) == 5
    assert render(changed, out)[1]["rendered"] == 0     # as it was said of this manifest
    assert ask("status", out)[1]["finished"]


def test_other_defaults_change_no_row_and_are_of_what_is_new(out, tmp_path):
    before = rows_of(out)
    more = write(tmp_path / "more.jsonl", [*ROWS, {"id": "new", "prompt": "a bird", "frames": 5}])
    code, answer, _ = render(more, out, "--steps", 3)
    assert code == 0 and answer["rendered"] == 1
    assert "for rows that do not say, steps was 2, is 3; 4 that are done keep" in answer["notes"][0]
    after = rows_of(out)
    assert {name: row["steps"] for name, row in after.items()} == dict.fromkeys(before, 2) | {"new": 3}
    for options in ((), ("--steps", 3), ("--guidance", 1)):
        assert render(more, out, *options)[1]["rendered"] == 0
    own = write(tmp_path / "own.jsonl", [ROWS[0] | {"steps": 3}])       # it says so itself
    assert render(own, out, "--steps", 3)[0] == 2
    status = ask("status", out)[1]
    assert status["finished"] and sum(bucket["done"] for bucket in status["buckets"]) == 5
