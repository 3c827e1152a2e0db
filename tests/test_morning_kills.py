"""Append, redo, revert, pick and gc are killed at random moments, and the same command does the rest: one object and
one current row each, nothing lost, nothing made twice.

Each command runs in a child of this process, which kills itself at one of its writes, before it or behind it.
"""

import json
import os
import random
import shutil
import signal
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO

import pytest
from one_process import main
from run_folders import ask, render, write
from test_redo import decide

from dailies.pipeline.run import ledger
from dailies.pipeline.run.layout import LEASE, clip_id_in
from dailies.pipeline.run.lease import Lease
from dailies.pipeline.store import FolderStore, S3Store, open_store

ROWS = [{"id": f"row-{number}", "prompt": f"a fox {number}", "frames": 5} for number in range(3)]
MORE = [{"id": f"new-{number}", "prompt": f"a cat {number}", "frames": 5} for number in range(3)]
WRITES = {FolderStore: ("create", "put", "swap", "delete"), S3Store: ("create", "put", "swap", "delete")}


def in_a_child(command, kill_at=None, before=True):
    """The command's answer, None where it was killed at its write number `kill_at`; and how many writes there were."""
    read, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            count = count_writes(kill_at, before)
            with redirect_stdout(StringIO()) as out:
                main([*map(str, command), "--json"])
            os.write(writing, json.dumps([json.loads(out.getvalue()), count()]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(read, "rb") as said:
        answer = said.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None, 0
    assert answer, "the command ended without an answer"
    return json.loads(answer)


def count_writes(kill_at, before):
    """Have every store of this process count what it writes, and the process end at one of them."""
    done = [0]

    def counted(method):
        def call(*arguments, **options):
            if LEASE in arguments:                      # its thread writes whenever it likes
                return method(*arguments, **options)
            done[0] += 1
            is_last = done[0] == kill_at
            if is_last and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = method(*arguments, **options)
            if is_last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call

    for kind, names in WRITES.items():
        for name in names:
            setattr(kind, name, counted(getattr(kind, name)))
    return lambda: done[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run, with an old take whose files are still there."""
    folder = tmp_path_factory.mktemp("base")
    write(folder / "night.jsonl", ROWS)
    write(folder / "more.jsonl", [*ROWS, *MORE])
    assert render(folder / "night.jsonl", folder / "out")[0] == 0
    assert ask("redo", folder / "out", "--where", "id = row-2")[1]["to_make"] == 1
    assert render(folder / "night.jsonl", folder / "out")[1]["rendered"] == 1
    rows = ledger.read(open_store(folder / "out"), every_take=True).to_pylist()
    shutil.copytree(folder / "out", folder / "spare")   # picks.json is written beside
    decide(folder / "spare", (next(row for row in rows if row["id"] == "row-2" and not row["replaces"]), "pick"))
    (folder / "picks.json").rename(folder / "earlier.json")
    decide(folder / "spare", (next(row for row in rows if row["id"] == "row-0"), "reject"))
    return folder


def steps_of(action, base, out):
    """The commands of what a person does, each of which may be killed."""
    again = ["render", base / "night.jsonl", "--out", out, "--model", "tiny", "--device", "cpu"]
    return {"append": [["render", base / "more.jsonl", *again[2:]]],
            "redo": [["redo", out, "--where", "id = row-1"], again],
            "revert": [["pick", out, "--from", base / "earlier.json"], ["redo", out, "--revert"]],
            "pick": [["pick", out, "--from", base / "picks.json"]], "gc": [["gc", out, "--yes"]]}[action]


def published(store):
    return {clip_id_in(info.key): (store.get(info.key), info.modified_s) for info in store.list("clips/")}


def judge(action, store, before, made):
    """What is there after all; before: the clips of the base; made: clips that a killed command had published."""
    rows, clips = ledger.read(store).to_pylist(), published(store)
    current = {row["clip_id"] for row in rows}
    assert {row["status"] for row in rows} == {"done"} and current <= clips.keys()
    assert max(Counter(row["id"] for row in rows).values()) == 1
    assert len(rows) == (6 if action == "append" else 3)
    assert all(clips[clip_id] == object_ for clip_id, object_ in made.items() if clip_id in clips)
    assert len(clips) == {"append": 7, "redo": 5, "revert": 4, "pick": 4, "gc": 3}[action]
    if action == "gc":
        assert clips.keys() == current
    else:
        assert before.items() <= clips.items()
    taken = {row["id"] for row in rows if row["replaces"]}
    assert taken == ({"row-1", "row-2"} if action == "redo" else {"row-2"})
    assert {row["id"] for row in rows if row["take_of"]} == taken - ({"row-2"} if action == "revert" else set())
    decided = [row["id"] for row in rows if row["decision"]]
    assert decided == {"pick": ["row-0"], "revert": ["row-2"]}.get(action, [])
    assert len(list(store.list("picks/"))) == (action in ("pick", "revert"))
    assert ask("verify", store.uri)[0] == 0


def kills(action, base, place, rng, moments):
    """place: makes the URI of a run folder of one's own."""
    most: dict[int, int] = {}
    for number in range(moments + 1):                   # the first time nobody is killed, and writes are counted
        out = place(number)
        store, source = open_store(out), open_store(base / "out")
        for info in source.list():
            if not info.key.startswith(LEASE):
                store.create(info.key, source.get(info.key))
        before = published(store)
        steps = steps_of(action, base, out)
        which = rng.randrange(len(steps))
        for step, command in enumerate(steps):
            made = before
            if number and step == which:
                answer, _ = in_a_child(command, rng.randint(1, most[step]), rng.random() < 0.5)
                assert answer is None, "nothing was killed"
                made = published(store)
            there = len(published(store))
            answer, count = in_a_child(command)
            assert answer["exit_code"] == 0, answer
            if "rendered" in answer:                    # what was published is not made again
                assert answer["rendered"] == {"append": 7, "redo": 5}[action] - there
            most[step] = max(most.get(step, 1), count) if not number else most[step]
        judge(action, store, before, made)


@pytest.mark.parametrize("moments", [2, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("action", ["append", "redo", "revert", "pick", "gc"])
def test_whatever_is_killed_the_same_command_does_the_rest(action, moments, base, tmp_path):
    kills(action, base, lambda number: tmp_path / f"out-{number}", random.Random(f"{action} {moments}"), moments)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, 6))           # of ten moments each, which take ten seconds and more
@pytest.mark.parametrize("action", ["append", "redo", "revert", "pick", "gc"])
def test_whatever_is_killed_on_a_bucket_the_same_command_does_the_rest(action, part, base, s3_bucket, monkeypatch):
    monkeypatch.setattr(Lease, "SETTLE_S", 0.1)         # there is no other driver to be waited for
    kills(action, base, lambda number: f"{s3_bucket}/{number}", random.Random(f"{action} {part}"), 10)
