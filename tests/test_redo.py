"""Another take of a clip that is done: made by the next render whatever its manifest says, and it replaces the one
before; rows that are taken out; clips of other runs that need not be made."""

import hashlib
import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_folders import ask, clips_of, render, rendered, write
from test_report import column

from dailies.pipeline.run import ledger
from dailies.pipeline.run.redo import NewSeed
from dailies.pipeline.run.where import MAX_DEPTH, BadFilter, Filter
from dailies.pipeline.store import NotFound, open_store

ROWS = [*({"id": f"row-{number}", "prompt": f"a fox {number}", "frames": 5, "mood": mood}
          for number, mood in enumerate(("sad", "glad", "it's"))),
        {"id": "three", "prompt": "three", "frames": 5, "seed": 10, "samples": 3, "keep": 1,
         "keep_by": "quality.brightness", "mood": "calm"}]


def rows_of(out, **options):
    return {(row["id"], row["seed"]): row for row in ledger.read(open_store(out), **options).to_pylist()}


def decide(out, *decisions, decided_by="ada"):
    picks = [{"id": row["id"], "seed": row["seed"], "clip_id": row["clip_id"], "decision": decision,
              "decided_at": datetime.now(UTC).isoformat()} for row, decision in decisions]
    (out.parent / "picks.json").write_text(json.dumps({"format": 1, "picks": picks, "decided_by": decided_by}))
    return ask("pick", out, "--from", out.parent / "picks.json")


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    return rendered(ROWS, tmp_path_factory.mktemp("night"))


@pytest.fixture
def out(night, tmp_path):
    return shutil.copytree(night / "out", tmp_path / "out")


def test_a_decision_is_columns_of_the_ledger_until_the_row_has_another_clip(out, night):
    before = rows_of(out)
    fox = before["row-0", next(seed for name, seed in before if name == "row-0")]
    strange = fox | {"clip_id": "f" * 64}
    code, answer, _ = decide(out, (fox, "pick"), (strange, "reject"))
    assert code == 0 and (answer["kept"], answer["not_here"], answer["pick"]) == (1, 1, 1)
    said = rows_of(out)["row-0", fox["seed"]]
    assert (said["decision"], said["decided_by"], said["note"]) == ("pick", "ada", "")
    assert {row["decision"] for row in rows_of(out).values()} == {"pick", None}
    table = ledger.read(open_store(out), ["id", "decision"])
    assert table.column_names == ["id", "decision"] and table.num_rows == 6
    changed = write(out.parent / "changed.jsonl", [ROWS[0] | {"prompt": "a cat"}, *ROWS[1:]])
    assert render(changed, out, "--changed", "render")[0] == 0
    assert rows_of(out)["row-0", fox["seed"]]["decision"] is None


def test_what_a_person_wants_made_again_is_made_with_another_seed_and_replaces_what_was_there(out, night, tmp_path):
    before, clips = rows_of(out), clips_of(out)
    fox, middle = (row for key, row in before.items() if key[0] == "row-0" or key == ("three", 11))
    decide(out, (fox, "redo"), (middle, "redo"), (before["three", 10], "reject"))
    code, answer, _ = ask("redo", out, "--picks")
    assert code == 0 and (answer["to_make"], answer["waiting"], answer["refused"]) == (2, 0, [])
    assert ask("redo", out, "--picks")[1]["to_make"] == 0               # they wait already
    assert rows_of(out).keys() == before.keys() and not (out / "_SUCCESS.json").exists()    # nothing is replaced yet
    counted = ["rows", "done", "pending", "takes", "finished"]
    assert [ask("status", out)[1][name] for name in counted] == [6, 4, 2, 2, False]

    # the manifest knows of neither, and of one row not at all
    manifest = write(tmp_path / "one.jsonl", ROWS[1:2])
    code, answer, _ = render(manifest, out)
    assert code == 0 and (answer["rendered"], answer["pending"]) == (2, 0)
    after = rows_of(out)
    assert len(after) == 6 and clips.items() < clips_of(out).items() and len(clips_of(out)) == 8
    taken = {row["replaces"]: row for row in after.values() if row["replaces"]}
    assert taken.keys() == {fox["clip_id"], middle["clip_id"]}
    new = taken[fox["clip_id"]]
    assert (new["seed"], new["take_of"]) == (fox["seed"] + 1, fox["seed"])
    assert (new["prompt"], new["user.mood"]) == (fox["prompt"], "sad")
    assert new["decision"] is None and new["sha256"] == hashlib.sha256(
        (out / new["path"]).read_bytes()).hexdigest() != fox["sha256"]
    assert taken[middle["clip_id"]]["seed"] == 13       # 12 is a sample of its own
    everything = rows_of(out, every_take=True)
    assert len(everything) == 8 and everything["three", 11]["decision"] == "redo"
    status = ask("status", out)[1]
    assert (status["rows"], status["done"], status["takes"], status["finished"]) == (6, 6, 0, True)
    assert ask("verify", out)[1]["clips"] == 6
    assert render(night / "night.jsonl", out)[1]["rendered"] == 0       # the first manifest brings nothing back
    assert rows_of(out) == after and (out / "_SUCCESS.json").exists()

    # the clip is the one that a row with that seed would have got
    told = write(tmp_path / "told.jsonl", [ROWS[0] | {"seed": new["seed"]}])
    assert render(told, tmp_path / "told")[0] == 0
    assert rows_of(tmp_path / "told")["row-0", new["seed"]]["clip_id"] == new["clip_id"]
    # and once more: a take of a take
    assert ask("redo", out, "--where", "id = row-0", "--seed", "+5")[1]["to_make"] == 1
    assert render(manifest, out)[1]["rendered"] == 1
    last, = (row for key, row in rows_of(out).items() if key[0] == "row-0")
    assert (last["seed"], last["take_of"], last["replaces"]) == (fox["seed"] + 6, fox["seed"], new["clip_id"])


def test_rows_that_say_the_same_and_count_their_seeds_get_clips_that_none_of_them_has(tmp_path):
    rows = [{"id": name, "prompt": "a fox", "frames": 5, "seed": seed} for seed, name in enumerate("abc")]
    night = rendered(rows, tmp_path)
    out = night / "out"
    code, answer, _ = ask("redo", out, "--where", "id = a", "--seed", "2")
    assert answer["to_make"] == 0 and answer["refused"] == ["a, seed 0: another row has the clip of that seed"]
    assert ask("redo", out, "--where", "id in (a, b)")[1]["to_make"] == 2
    assert render(next(night.glob("*.jsonl")), out)[1]["rendered"] == 2
    assert sorted((name, seed) for name, seed in rows_of(out)) == [("a", 3), ("b", 4), ("c", 2)]
    assert len({row["clip_id"] for row in rows_of(out, every_take=True).values()}) == 5


def test_an_earlier_take_that_a_person_picked_counts_again(out, night, tmp_path):
    """Where the newer one is picked too, both are wanted, and what counts stays."""
    before = rows_of(out)
    fox, hare = (row for (name, _), row in before.items() if name in ("row-0", "row-1"))
    ask("redo", out, "--where", "id in (row-0, row-1)")
    assert render(night / "night.jsonl", out)[1]["rendered"] == 2
    new = {row["id"]: row for row in rows_of(out).values() if row["replaces"]}
    decide(out, (fox, "pick"), (new["row-0"], "reject"), (hare, "pick"), (new["row-1"], "pick"))
    assert ask("redo", out, "--revert", "--where", "user.mood = glad")[1]["reverted"] == 0
    code, answer, _ = ask("redo", out, "--revert")
    assert code == 0 and (answer["reverted"], answer["refused"]) == (1, [])
    after = rows_of(out)
    assert after["row-0", fox["seed"]] == fox | {"replaces": new["row-0"]["clip_id"]} | {
        name: after["row-0", fox["seed"]][name] for name in ("decision", "decided_at", "decided_by", "note")}
    assert len(after) == 6 and ("row-0", new["row-0"]["seed"]) not in after and ("row-1", hare["seed"]) not in after
    assert ask("redo", out, "--revert")[1]["reverted"] == 0             # once is enough
    assert (out / "_SUCCESS.json").exists() and ask("verify", out)[0] == 0
    assert render(night / "night.jsonl", out)[1]["rendered"] == 0
    said = ask("plan", night / "night.jsonl", "--out", out, "--model", "tiny", "--device", "cpu")[1]
    assert (said["done"], said["changed"], said["gone"], said["to_make"]) == (6, 0, 0, 0)
    # and made again once more: with a seed that neither had
    assert ask("redo", out, "--where", "id = row-0")[1]["to_make"] == 1
    assert render(night / "night.jsonl", out)[1]["rendered"] == 1
    assert ("row-0", fox["seed"] + 2) in rows_of(out)
    assert ask("gc", out, "--yes")[1]["objects"] == 6   # clip and poster of two takes of row-0 and of one of row-1
    code, answer, _ = ask("redo", out, "--revert")      # it was picked, and is gone
    assert answer["reverted"] == 0 and "row-0" in answer["refused"][0] and "not there any more" in answer["refused"][0]


def test_what_is_asked_for_is_foretold_and_what_was_dropped_waits_in_no_bucket(out, night):
    ask("redo", out, "--where", "id = row-0")
    ask("drop", out, "--where", "id = row-1")
    _, said, _ = ask("plan", night / "night.jsonl", "--out", out, "--model", "tiny", "--device", "cpu")
    assert said["to_make"] == said["forecast"]["clips"] == 1
    buckets = ask("status", out)[1]["buckets"]
    assert all(bucket["pending"] == 0 for bucket in buckets)


def test_a_row_that_asks_for_something_else_by_now_gets_no_take_of_what_it_was(out, tmp_path):
    assert ask("redo", out, "--where", "id = row-0")[1]["to_make"] == 1
    changed = write(tmp_path / "changed.jsonl", [ROWS[0] | {"prompt": "a cat"}])
    code, answer, _ = render(changed, out, "--changed", "render")
    assert code == 0 and answer["rendered"] == 1
    row, = (row for key, row in rows_of(out).items() if key[0] == "row-0")
    assert row["prompt"] == "a cat" and ask("status", out)[1]["pending"] == 0


def test_a_new_seed_is_none_that_the_row_has_however_many_samples_a_ledger_tells_of():
    assert [NewSeed(step=step).after(11, {11, 14, 16}, 10, 3) for step in (1, 2, 3, 5)] == [13, 13, 17, 21]
    assert NewSeed(step=3).after(0, {0}, 0, 2**31) == 2**31 + 1
    assert NewSeed().after(2**63 - 3, {2**63 - 3}, 2**63 - 3, 2) == 2**63 - 1
    assert NewSeed().after(2**63 - 2, set(), 2**63 - 2, 2) is None
    assert NewSeed(step=0, seed=12).after(10, {10}, 10, 3) is None


@pytest.mark.parametrize("forged, said", [
    ({"frames": 10**6}, "frames must be 1 to"), ({"width": 10**5}, "must be"), ({"steps": 10**6}, "steps must be"),
    ({"prompt": "another"}, "clip_id is not that"), ({"prompt": "x" * 9000}, "prompt must be text of 1 to"),
    ({"prompt": None}, "does not say prompt"), ({"image_sha256": "0" * 64}, "image is not among those")])
def test_a_forged_take_is_not_made(forged, said, out, night):
    ask("redo", out, "--where", "id = row-0")
    part = sorted((out / "ledger").iterdir())[-1]
    table = pq.read_table(part)
    for name, value in forged.items():
        at = table.column_names.index(name)
        field = table.schema.field(at)
        table = table.set_column(at, field, pa.array([value] * table.num_rows, field.type))
    pq.write_table(table, part)
    code, answer, _ = render(night / "night.jsonl", out)
    assert answer["rendered"] == 0 and any(said in note for note in answer["notes"]), answer["notes"]
    assert len(rows_of(out)) == 6 and all(row["status"] == "done" for row in rows_of(out).values())


def test_a_damaged_take_is_put_back_and_made_again_and_the_one_before_does_not_come_back(out, night):
    ask("redo", out, "--where", "id = row-0")
    assert render(night / "night.jsonl", out)[1]["rendered"] == 1
    new, = (row for row in rows_of(out).values() if row["replaces"])
    path = out / new["path"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    assert ask("verify", out, "--repair")[1]["pending_again"] == 1
    assert [key for key in rows_of(out) if key[0] == "row-0"] == []
    assert render(night / "night.jsonl", out)[1]["rendered"] == 1 and path.read_bytes() == whole
    again, = (row for key, row in rows_of(out).items() if key[0] == "row-0")
    assert (again["replaces"], again["take_of"]) == (new["replaces"], new["take_of"])


def test_a_row_that_is_dropped_is_gone_and_not_made_again(out, night):
    code, answer, _ = ask("drop", out, "--where", "user.mood = sad or seed = 11")
    assert code == 0 and answer["dropped"] == 2 and (out / "_SUCCESS.json").exists()
    assert len(rows_of(out)) == 4 and len(clips_of(out)) == 6
    assert render(night / "night.jsonl", out)[1]["rendered"] == 0
    counted = ["rows", "done", "pending", "dropped", "finished"]
    assert [ask("status", out)[1][name] for name in counted] == [4, 4, 0, 2, True]
    assert ask("drop", out, "--where", "user.mood = sad")[1]["dropped"] == 0
    more = write(out.parent / "more.jsonl", [*ROWS, {"id": "new", "prompt": "new", "frames": 5}])
    assert render(more, out)[1]["rendered"] == 1
    status = ask("status", out)[1]
    assert (status["rows"], status["done"], status["pending"], status["finished"]) == (5, 5, 0, True)


def test_of_samples_the_best_is_selected_and_all_are_published(out):
    samples = [row for key, row in rows_of(out).items() if key[0] == "three"]
    best = max(samples, key=lambda row: row["quality.brightness"])
    assert [row["clip_id"] for row in samples if row["selected"]] == [best["clip_id"]]
    assert all(row["selected"] is None for key, row in rows_of(out).items() if key[0] != "three")
    assert sum(filter(None, ledger.read(open_store(out), ["selected"])["selected"].to_pylist())) == 1
    ask("report", out)
    assert sorted(column(out / "report", "selected"), key=str) == [0, 0, 1, None, None, None]


def test_an_earlier_take_is_no_sample_to_select(out, night):
    before, = (row for row in rows_of(out).values() if row["selected"])
    assert ask("redo", out, "--where", f"clip_id = {before['clip_id']}")[1]["to_make"] == 1
    assert render(night / "night.jsonl", out)[1]["rendered"] == 1
    now, = (row for row in rows_of(out).values() if row["selected"])
    every = {row["clip_id"]: row["selected"] for row in rows_of(out, every_take=True).values()}
    assert every.pop(before["clip_id"]) is None and [name for name in every if every[name]] == [now["clip_id"]]


@pytest.mark.parametrize("row, said", [
    ({"keep": 1}, "keep beside keep_by"), ({"keep_by": "quality.motion"}, "keep_by beside keep"),
    ({"keep": 2, "keep_by": "quality.motion"}, "at most samples"), ({"keep": 1, "keep_by": "prompt"}, "quality.motion"),
    ({"keep": 1, "keep_by": "quality.x; drop"}, "quality.motion")])
def test_what_is_kept_is_asked_for_whole(row, said, tmp_path):
    code, answer, _ = render(write(tmp_path / "m.jsonl", [{"prompt": "a"} | row]), tmp_path / "out")
    assert code == 2 and said in answer["error"]


def test_clips_of_other_runs_are_brought_and_judged_and_not_made(out, night, tmp_path):
    other, here = tmp_path / "out", tmp_path / "here"
    clips = sorted(other.glob("clips/*/*.mp4"))
    clips[0].write_bytes(clips[0].read_bytes()[:-1] + b"x")             # not what that ledger says
    clips[1].unlink()
    clips[1].symlink_to(night / "out" / clips[1].relative_to(other))
    clips[2].write_bytes(bytes(10**7))                  # no clip of its shape is that large
    (other / "clips" / "not-mine").mkdir()
    code, answer, _ = render(night / "night.jsonl", here, "--reuse", other)
    assert code == 5                                    # a link in a run folder is nobody's
    clips[1].unlink()
    code, answer, _ = render(night / "night.jsonl", here, "--reuse", tmp_path / "nothing", "--reuse", other)
    assert code == 0 and (answer["reused"], answer["rendered"]) == (3, 3)
    mine = {path.name: path.read_bytes() for path in here.glob("clips/*/*.mp4")}
    assert mine == {path.name: path.read_bytes() for path in (night / "out").glob("clips/*/*.mp4")}
    assert sum(path.stat().st_nlink > 1 for path in here.glob("clips/*/*.mp4")) == 3
    assert sum("made by another run" in str(row["notes"]) for row in rows_of(here).values()) == 3
    assert ask("verify", here)[0] == 0


def test_a_bucket_copies_what_another_run_has(s3_bucket, night, tmp_path):
    """By the server itself where it knows conditions of copies, else as bytes."""
    manifest = write(tmp_path / "m.jsonl", ROWS[:2])
    for name in ("a", "b"):
        code, answer, _ = render(manifest, f"{s3_bucket}/{name}", "--reuse", night / "out",
                                 "--reuse", f"{s3_bucket}/a")
        assert code == 0 and (answer["reused"], answer["rendered"]) == (2, 0)
    one, other = (open_store(f"{s3_bucket}/{name}") for name in ("a", "b"))
    info = next(one.list("clips/"))
    if other.copies:
        assert other.create_from(one, info, "clips/x") is True and other.get("clips/x") == one.get(info.key)
        assert other.create_from(one, info, "clips/x") is False
        with pytest.raises(NotFound, match="not the object that was listed"):
            other.create_from(one, replace(info, etag='"another"'), "clips/y")


@pytest.mark.parametrize("said, chosen", [
    ("steps < 3", [0, 1]), ("not steps < 3 or id = a", [0]), ("mood = 'it''s'", [1]), ("steps in (1, 2)", [0, 1]),
    ("steps is null", [2]), ("steps is not null and ok = true", [0]), ("prompt contains fox or prompt contains X", [0]),
    ("(steps = 1 or steps = 2) and not (id = a)", [1]), ("score >= -0.5", [0, 1]), ("at > 2026-01-02", [1]),
    ("steps not in (1)", [1]), ('id == "c"', [2])])
def test_an_expression_chooses_rows(said, chosen):
    table = pa.table({"id": ["a", "b", "c"], "steps": [1, 2, None], "mood": ["sad", "it's", None],
                      "ok": [True, None, False], "prompt": ["a fox", "and", "or"], "score": [0.5, -0.5, float("nan")],
                      "at": pa.array([datetime(2026, 1, 1), datetime(2026, 1, 3), None], pa.timestamp("us"))})
    assert [at for at, is_one in enumerate(Filter.parsed(said).mask(table).to_pylist()) if is_one] == chosen


@pytest.mark.parametrize("said", [
    "", "id", "id =", "= 1", "id = a b", "(id = a", "id = 'a", "id ~ a", "steps = x", "nope = 1", "tags = a",
    "id in ()", "id in (a", "id is a", "not " * (MAX_DEPTH + 2) + "id = a", "(" * 9999, "id = a and " * 200,
    "x" * 10_001, "__import__('os')"])
def test_what_is_no_expression_is_a_sentence(said):
    table = pa.table({"id": ["a"], "steps": [1], "tags": [["a"]]})
    with pytest.raises(BadFilter) as refused:
        Filter.parsed(said).mask(table)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500


def test_bad_usage_of_the_mornings_commands_is_a_sentence_and_exit_2(out, tmp_path):
    for command, said in ((["redo", out], "--picks"), (["redo", out, "--where", "id = row-0", "--seed", "x"], "+N"),
                          (["redo", out, "--where", "nope = 1"], "no column nope"), (["drop", out], "--where"),
                          (["drop", out, "--where", "id ="], "expected a value"),
                          (["pick", out, "--from", tmp_path / "none.json"], "No such file"),
                          (["pick", tmp_path, "--from", __file__], "no decisions"),
                          (["gc", tmp_path], "no run folder")):
        code, answer, _ = ask(*command)
        assert code == 2 and said in answer["error"], answer
