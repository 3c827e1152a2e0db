"""What no current row names is listed, and deleted when a person says so; nothing else is."""

import os
import shutil
import threading
import time

import pytest
from run_folders import ask, contents, render, write
from test_redo import ROWS, rows_of

from dailies.pipeline.run.layout import clip_key, poster_key
from dailies.pipeline.run.lease import Lease, LeaseError
from dailies.pipeline.store import open_store


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """A run with an old take, a changed row and a dropped one, all of whose clips are still there."""
    folder = tmp_path_factory.mktemp("night")
    manifest = write(folder / "night.jsonl", ROWS)
    assert render(manifest, folder / "out", "--keep-latents")[0] == 0
    assert ask("redo", folder / "out", "--where", "id = row-0")[1]["to_make"] == 1
    write(manifest, [ROWS[0], ROWS[1] | {"prompt": "a cat"}, *ROWS[2:]])
    assert render(manifest, folder / "out", "--changed", "render", "--keep-latents")[1]["rendered"] == 2
    assert ask("drop", folder / "out", "--where", "id = row-2")[1]["dropped"] == 1
    return folder


@pytest.fixture
def out(night, tmp_path):
    return shutil.copytree(night / "out", tmp_path / "out")


def test_old_takes_and_what_belongs_to_them_are_listed_and_then_deleted_and_nothing_else(out, night, tmp_path):
    current = {row["clip_id"] for row in rows_of(out).values()}
    mine = ["clips/of-mine.mp4", "clips/ab/copy.mp4", "notes.txt", "posters/mine.webp", ".tmp/mine", "probe-mine"]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("x")
    stale, fresh = out / ".tmp" / ("a" * 32), out / ".tmp" / ("b" * 32)
    for path in (stale, fresh):
        path.write_text("x")
    os.utime(stale, (time.time() - 10**6,) * 2)
    before = contents(out)
    code, answer, _ = ask("gc", out)
    assert code == 0 and not answer["deleted"] and contents(out) == before
    listed = set(answer["keys"])
    code, answer, _ = ask("gc", out, "--yes")
    assert code == 0 and answer["deleted"] and set(answer["keys"]) == listed
    gone = {str(path.relative_to(out)) for path in before.keys() - contents(out).keys()}
    assert gone == listed and {key for key in gone if key.startswith("clips/")} == {
        clip_key(clip_id) for clip_id in
        {path.stem for path in (night / "out").glob("clips/*/*.mp4")} - current}
    assert len(listed) == 3 * 3 + 1 and f".tmp/{'a' * 32}" in listed     # clip, poster and latent of each
    assert all((out / name).exists() for name in mine) and fresh.exists()
    assert {path.stem for path in (out / "clips").rglob("*.mp4")} - {"of-mine", "copy"} == current
    assert all((out / poster_key(clip_id)).exists() for clip_id in current)
    assert ask("gc", out)[1]["objects"] == 0 and ask("verify", out)[0] == 0
    (out / "clips/ab/copy.mp4").unlink()
    assert render(night / "night.jsonl", out)[1]["rendered"] == 0       # an old take is not missed
    assert ask("status", out)[1]["finished"]


def test_what_was_replaced_or_dropped_is_owed_to_nobody_and_what_gc_deleted_is_shown_no_more(out):
    names = ["done", "pending", "unrecorded", "without_poster", "rows"]

    def said(command, names):
        answer = ask(command, out)[1]
        return [answer[name] for name in names]

    assert said("report", names) == [5, 0, 0, 0, 6]         # with the take that row-0 had
    assert said("verify", ["unrecorded", "replaced"]) == [0, 3]
    assert ask("gc", out, "--yes")[0] == 0
    assert said("report", names) == [5, 0, 0, 0, 5]
    assert said("verify", ["unrecorded", "replaced"]) == [0, 0]
    assert ask("redo", out, "--where", "id = row-1")[1]["to_make"] == 1
    assert said("report", names) == [5, 1, 0, 0, 5]


def test_a_clip_that_was_published_before_its_row_is_left_for_the_next_render(tmp_path):
    manifest = write(tmp_path / "m.jsonl", ROWS[:2])
    assert render(manifest, tmp_path / "out", "--limit", 1)[0] == 4
    for path in (tmp_path / "out" / "ledger").iterdir():
        path.unlink()                                   # as if its driver had been killed
    assert ask("gc", tmp_path / "out", "--yes")[1]["objects"] == 0
    assert render(manifest, tmp_path / "out")[1]["adopted"] == 1


def test_nothing_is_deleted_while_a_driver_works_and_who_waits_comes_after_it(out, monkeypatch):
    monkeypatch.setattr(Lease, "POLL_S", 0.02)
    store, before = open_store(out), contents(out)
    with Lease.take(store) as lease:
        code, answer, _ = ask("gc", out, "--yes")
        assert code == 5 and "another driver works on this run" in answer["error"]
        found = []
        waiting = threading.Thread(target=lambda: found.append(ask_quietly(store)))
        waiting.start()
        time.sleep(0.2)
        lease.renew()
        time.sleep(0.2)
        assert not found and {path: data for path, data in contents(out).items() if path.name != "lease.json"} == {
            path: data for path, data in before.items() if path.name != "lease.json"}
    waiting.join(10)
    assert found == ["mine"]


def ask_quietly(store):
    with Lease.take(store, queue=True) as lease:
        lease.check()
        return "mine"


def test_who_has_lost_the_folder_deletes_nothing_more(out, monkeypatch):
    from dailies.pipeline.run import sweep
    store = open_store(out)
    deleted = []
    with Lease.take(store) as lease, pytest.raises(LeaseError):
        for found in sweep.sweep(store, lease):
            deleted.append(found)
            lease.lost = "another"
    assert len(deleted) == 1
