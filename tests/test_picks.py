"""What people decide comes from outside: bounded, parsed, kept once, and the last decision counts."""

import json
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dailies.pipeline.run.picks import MAX_PICKS_BYTES, BadPicks, Picks, read_picks, write_picks
from dailies.pipeline.store import StoreError, open_store

CLIP, OTHER = "a" * 64, "b" * 64
ONE = {"id": "fox", "seed": 7, "clip_id": CLIP, "decision": "pick", "note": "", "decided_at": "2026-11-30T08:15:00Z"}


def picks_json(*rows, **more):
    return json.dumps({"format": 1, "decided_by": "ada", "picks": [ONE | row for row in rows]} | more).encode()


@pytest.mark.parametrize("data, said", [
    (b"{", "Invalid JSON"), (b"[" * 10**5, "recursion"), (b"[]", "the file"), (b'{"format": 1}', "picks"),
    (b" " * (MAX_PICKS_BYTES + 1), "67,108,865 bytes; at most"), (picks_json(format=2), "format"),
    (picks_json(more=1), "more"), (picks_json({"seed": -1}), "picks.0.seed"), (picks_json({"seed": 7.0}), "seed"),
    (picks_json({"seed": 2**63}), "seed"), (picks_json({"seed": "7"}), "seed"), (picks_json({"id": ""}), "id"),
    (picks_json({"id": "x" * 300}), "id"), (picks_json({"clip_id": "A" * 64}), "clip_id"),
    (picks_json({"clip_id": CLIP + "\n"}), "clip_id"), (picks_json({"clip_id": "../../x"}), "clip_id"),
    (picks_json({}, {"decision": "PICK"}), "picks.1.decision"), (picks_json({"note": "x" * 4001}), "note"),
    (picks_json({"decided_at": "2026-11-30"}), "decided_at"), (picks_json({"decided_at": 5}), "decided_at"),
    (picks_json({"decided_at": "9999-01-01T00:00:00Z"}), "a time from 1970 to now"),
    (picks_json({"decided_at": "2026-11-30T08:15:00"}), "timezone"), (picks_json(decided_by="x" * 201), "decided_by"),
    (picks_json({"evil": "\x1b[2J"}), "evil"), (b"\xff", "Invalid JSON"),
    (b'{"format": 1, "picks": [], "decided_by": "\\ud800"}', "Invalid JSON")])
def test_what_is_no_file_of_decisions_is_one_sentence(data, said):
    with pytest.raises(BadPicks, match=said) as refused:
        Picks.parsed(data)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 600


def test_of_two_decisions_about_one_clip_the_later_one_counts_from_whatever_file(tmp_path):
    store = open_store(tmp_path)
    later = picks_json({"decision": "reject", "decided_at": "2026-11-30T10:15:00+01:00"}, {"id": "cat"})
    for data in (later, picks_json({}), picks_json({"clip_id": OTHER, "decision": None, "note": "soft"}), later):
        assert write_picks(store, Picks.parsed(data))
    assert len(list(tmp_path.glob("picks/*.parquet"))) == 3         # the same ones are kept once
    rows = sorted(read_picks(store).to_pylist(), key=lambda row: (row["id"], row["clip_id"]))
    assert [(row["id"], row["clip_id"], row["decision"]) for row in rows] == [
        ("cat", CLIP, "pick"), ("fox", CLIP, "reject"), ("fox", OTHER, None)]
    assert rows[2]["note"] == "soft" and {row["decided_by"] for row in rows} == {"ada"}
    assert rows[1]["decided_at"] == datetime(2026, 11, 30, 9, 15, tzinfo=UTC)


def test_of_decisions_in_one_file_the_later_ones_are_counted():
    """An editor may have put a byte order mark before it."""
    picks = Picks.parsed(b"\xef\xbb\xbf" + picks_json(
        {"decision": "reject", "decided_at": "2026-11-30T09:00:00Z"}, {}, {"id": "cat"}, {"clip_id": OTHER}))
    assert [(pick.id, pick.clip_id, pick.decision) for pick in picks.last()] == [
        ("fox", CLIP, "reject"), ("cat", CLIP, "pick"), ("fox", OTHER, "pick")]


def test_no_decision_is_no_file(tmp_path):
    assert write_picks(open_store(tmp_path), Picks.parsed(picks_json())) is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("bend, said", [
    (lambda table: table.drop_columns(["note"]), "no column note"),
    (lambda table: table.append_column("more", table["id"]), "no such file has"),
    (lambda table: table.set_column(3, "decision", pa.array(["keep"])), "decision must be one of"),
    (lambda table: table.set_column(1, "seed", pa.nulls(1)), "no seed"),
    (lambda table: table.set_column(1, "seed", pa.array([-5])), "seed must be a number"),
    (lambda table: table.set_column(1, "seed", pa.array(["7"])), "seed must be int64"),
    (lambda table: table.set_column(0, "id", pa.array([""])), "no id")])
def test_a_stored_file_that_cannot_be_is_named(bend, said, tmp_path):
    store = open_store(tmp_path)
    path = tmp_path / write_picks(store, Picks.parsed(picks_json({})))
    pq.write_table(bend(pq.read_table(path)), path)
    with pytest.raises(StoreError, match=f"{path.name} cannot be read.*{said}"):
        read_picks(store)


def test_a_decision_of_a_clock_that_is_an_hour_ahead_is_taken(tmp_path):
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    assert Picks.parsed(picks_json({"decided_at": soon})).picks[0].decision == "pick"
