"""The ledger: every finished row once, whoever writes and whatever is killed; and run.json, which run a folder is."""

import contextlib
import json
import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from dailies.actors.messages import Clip, Failure, Request
from dailies.model.shapes import VideoShape
from dailies.pipeline.run import ledger as ledgers
from dailies.pipeline.run.judged import BESIDE
from dailies.pipeline.run.ledger import (
    COLUMNS,
    Ledger,
    counts_of,
    digest,
    done_clips,
    forget_retried,
    parquet_bytes,
    put_back,
    read,
    recorded_hashes,
    retry_rows,
    take_out,
    write_success,
)
from dailies.pipeline.run.ledger_row import ALL_OTHER_STAGES, class_of, invalid_row, row_of
from dailies.pipeline.run.pace import pace
from dailies.pipeline.run.run_json import OtherRun, claim_run, known_manifest, read_run
from dailies.pipeline.stages import Outcome, Stage, Step, run_local
from dailies.pipeline.store import StoreError, open_store

CONTRACT = """id, clip_id, status, uri, sha256, bytes, width, height, frames, fps, duration_s, has_audio, seed, prompt,
negative_prompt, steps, guidance, model, weights_fingerprint, precision, attention, fallbacks, attempts, error_type,
error, worker, device, queue_s, encode_s, sample_s, decode_s, publish_s, peak_memory_bytes, finished_at,
gpu_s, decode_precision, chosen_because, determinism, path, sample, notes, earlier_errors,
audio_padding_ms,
replaces, take_of, samples, keep, keep_by, image, image_sha256,
video_guidance, audio_guidance, modality_guidance, stg, audio"""


@pytest.fixture
def store(store_uri):
    return open_store(store_uri)


@pytest.fixture
def folder(tmp_path):
    return open_store(tmp_path / "out")


def done(name, seed=0, **more):
    return {"id": name, "seed": seed, "status": "done", "clip_id": f"clip of {name}", "sha256": "ab", **more}


def failed(name, seed=0, error_type="ValueError", **more):
    return {"id": name, "seed": seed, "status": "failed", "error_type": error_type, **more}


def write(store, *batches, **options):
    """One writer, one part for each batch."""
    with Ledger.open(store, **options) as ledger:
        for batch in batches:
            ledger.append(batch)
            ledger.flush()
    return ledger


def part_names(store):
    return [info.key for info in store.list("ledger/")]


def keys(*names):
    return pa.table({"id": pa.array(names, pa.large_string()), "seed": pa.array([0] * len(names)),
                     "row": pa.array(np.arange(len(names)))})


def request(seed=5):
    return Request(clip_id="c" * 64, model="demo", weights_fingerprint="w", prompt="ein Kreis ○", negative_prompt="",
                   seed=seed, shape=VideoShape(frames=49, height=64, width=96), fps=24.0, num_steps=20, guidance=4.5,
                   precision="fp32", attention="dense")


def test_the_columns_are_those_of_the_contract():
    named = [name for name in COLUMNS.names if not name.startswith("quality.")]
    assert named == [name.strip() for name in CONTRACT.replace("\n", " ").split(",")]


def test_rows_come_back_as_they_were_given(store):
    clip = Clip(request=request(), uri="s3://b/c.mp4", sha256="ab", num_bytes=7, duration_s=2.04, fallbacks=("dense",),
                determinism=("a cpu",) * 3)
    outcome = Outcome(value=clip, attempts=2, queue_s=1.5, seconds={"encode": 0.1, "sample": 2.0, "decode": 0.3},
                      worker="sample-1", device="cpu", peak_memory_bytes=9)
    failure = Failure(request=request(6), stage="sample", error_type="OutOfMemoryError",
                      error="too \ud800 large" * 1000)
    write(store, [row_of("a", clip, outcome), row_of("b", failure), row_of("c", clip)],
          [invalid_row("d", None, "prompt is null")])
    a, b, c, d = read(store).to_pylist()
    assert a.items() >= {
        "id": "a", "clip_id": "c" * 64, "status": "done", "uri": "s3://b/c.mp4", "sha256": "ab", "bytes": 7,
        "width": 96, "height": 64, "frames": 49, "fps": 24.0, "duration_s": 2.04, "has_audio": False, "seed": 5,
        "prompt": "ein Kreis ○", "negative_prompt": "", "steps": 20, "guidance": 4.5, "model": "demo",
        "weights_fingerprint": "w", "precision": "fp32", "attention": "dense", "fallbacks": ["dense"], "attempts": 2,
        "error_type": None, "error": None, "worker": "sample-1", "device": "cpu", "queue_s": 1.5, "encode_s": 0.1,
        "sample_s": 2.0, "decode_s": 0.3, "publish_s": None, "peak_memory_bytes": 9, "determinism": "a cpu"}.items()
    assert abs((datetime.now(UTC) - a["finished_at"]).total_seconds()) < 60
    assert (b["status"], b["error_type"], b["uri"]) == ("failed", "OutOfMemoryError", None)
    assert b["error"].startswith("too ? large") and len(b["error"]) == 4000
    assert (c["status"], c["attempts"], c["sample_s"]) == ("done", None, None)      # found published: nobody timed it
    assert (d["error_type"], d["seed"], d["clip_id"]) == ("invalid", None, None)


class Draws:
    def __call__(self, batch):
        return [Clip(request=each, uri="u", sha256="ab", num_bytes=7, duration_s=2.0) for each in batch]


class PassesOn:
    def __call__(self, batch):
        return list(batch)


def test_a_stage_of_any_name_has_its_seconds_in_the_ledger(folder):
    stages = [Stage(name="sample", steps=(Step(actor=Draws),)), Stage(name="upscale", steps=(Step(actor=PassesOn),))]
    [outcome] = run_local(stages, [request()])
    write(folder, [done("before")])
    write(folder, [row_of("found", outcome.value)], [done("c"), row_of("made", outcome.value, outcome)])
    rows = {row["id"]: row for row in read(folder).to_pylist()}
    assert {name: row["seconds.upscale"] for name, row in rows.items()} == {
        "before": None, "found": None, "c": None, "made": outcome.seconds["upscale"]}
    assert rows["made"]["sample_s"] == outcome.seconds["sample"] and rows["made"]["seconds.upscale"] >= 0
    assert read(folder, ["id", ALL_OTHER_STAGES]).column_names == ["id", "seconds.upscale"]
    assert put_back(folder, {outcome.value.request.clip_id: "spoilt"}) == 2     # nobody needs to know the stage

    write(folder, [done("forged", **{"seconds.upscale": -1.0})])
    with pytest.raises(StoreError, match=r"seconds.upscale must be a number from 0 to 1e\+10"):
        read(folder)


def test_seconds_of_all_stages_count_where_a_run_is_timed():
    columns = {"clip_id": ["a", "b"], "status": ["done"] * 2, "worker": ["w"] * 2, "queue_s": [0.0, None],
               "finished_at": [datetime(2026, 1, 1, 1, 0, second, tzinfo=UTC) for second in (10, 50)],
               **{f"{stage}_s": [0.0, None] for stage in ("encode", "sample", "decode", "publish")}}
    assert pace(columns)[0] is None                     # no seconds, no rate
    assert pace(columns | {"seconds.upscale": [10.0, 20.0]})[0] == 2 * 3600 / 30


def test_an_opened_ledger_knows_what_is_done_and_what_is_pending(store):
    first = write(store, [done("a"), failed("b")], [invalid_row("bad", "", "empty")])
    assert first.counts == {"done": 1, "failed": 2}
    again = Ledger.open(store)
    assert again.counts == {"done": 1, "failed": 2}
    assert again.pending(keys("c", "a", "b", "d"))["id"].to_pylist() == ["c", "d"]
    assert again.pending(keys("c", "a", "b", "d"))["row"].to_pylist() == [0, 3]
    unsown = pa.table({"id": ["bad", "worse"], "seed": pa.nulls(2, pa.int64())})
    assert again.pending(unsown)["id"].to_pylist() == ["worse"]


def test_the_samples_of_a_row_are_rows_of_their_own(store):
    write(store, [done("a", 1), done("a", 3)])
    samples = pa.table({"id": ["a"] * 3, "seed": [1, 2, 3]})
    assert Ledger.open(store).pending(samples)["seed"].to_pylist() == [2]


def test_nothing_is_written_before_there_are_rows(store):
    with Ledger.open(store) as ledger:
        ledger.tick()
        assert ledger.pending(keys("a")).num_rows == 1
    assert list(store.list()) == []
    nothing = read(store)
    assert nothing.select(COLUMNS.names).schema == COLUMNS and nothing.column_names == [*COLUMNS.names, *BESIDE]
    assert read(store, ["status", "id"]).column_names == ["status", "id"]


def test_rows_are_written_by_number_by_time_and_at_the_end(folder, monkeypatch):
    now = 0.0
    monkeypatch.setattr(ledgers.time, "monotonic", lambda: now)
    ledger = Ledger.open(folder, flush_rows=3, flush_s=10)
    ledger.append([done("a"), done("b")])
    assert part_names(folder) == []
    ledger.append([done("c")])
    assert part_names(folder) == ["ledger/000001-000000.parquet"]
    ledger.append([done("d")])
    now = 9.9
    ledger.tick()
    assert len(part_names(folder)) == 1
    now = 10.0
    ledger.tick()
    ledger.append([done("e")])
    ledger.close()
    assert part_names(folder) == [f"ledger/000001-00000{seq}.parquet" for seq in range(3)]
    assert read(folder, ["id"])["id"].to_pylist() == list("abcde")


def test_every_writer_has_an_epoch_of_its_own(store):
    one, two = Ledger.open(store), Ledger.open(store)           # both see an empty folder
    one.append([done("a")])
    two.append([done("b")])
    one.flush()
    two.flush()
    one.append([done("c")])
    one.flush()
    assert part_names(store) == ["ledger/000001-000000.parquet", "ledger/000001-000001.parquet",
                                 "ledger/000002-000000.parquet"]
    assert sorted(read(store)["id"].to_pylist()) == ["a", "b", "c"]


def test_racing_writers_lose_no_row(store):
    def run(writer):
        with Ledger.open(pickle.loads(pickle.dumps(store))) as ledger:
            for number in range(3):
                ledger.append([done(f"{writer}-{number}")])
                ledger.flush()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert sorted(read(store)["id"].to_pylist()) == sorted(f"{writer}-{number}" for writer in range(4)
                                                           for number in range(3))
    assert len(part_names(store)) == 12


def test_of_two_rows_with_one_key_the_later_part_counts(store):
    write(store, [failed("a"), done("b")], [done("c")])
    write(store, [done("a", sha256="new")])
    ledger = read(store)
    assert ledger["id"].to_pylist() == ["b", "c", "a"]
    assert ledger["sha256"].to_pylist() == ["ab", "ab", "new"]
    assert Ledger.open(store).counts == {"done": 3}


def test_a_part_written_twice_after_an_error_counts_once(s3_bucket, s3_server):
    store = open_store(s3_bucket)
    s3_server.fault(method="PUT", match="ledger/", status=500, after=True)
    write(store, [done("a")])
    assert part_names(store) == ["ledger/000001-000000.parquet"]
    assert read(store)["id"].to_pylist() == ["a"]


def test_a_part_that_cannot_be_written_keeps_its_rows(folder, tmp_path):
    ledger = Ledger.open(folder)
    ledger.append([done("a")])
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(StoreError):
        ledger.flush()
    (tmp_path / "out").unlink()
    ledger.close()
    assert read(folder)["id"].to_pylist() == ["a"]


def test_a_damaged_part_is_named(folder):
    write(folder, [done("a")])
    folder.put("ledger/000001-000000.parquet", b"PAR1 half")
    with pytest.raises(StoreError, match="000001-000000.parquet cannot be read.*Move it away and render again"):
        read(folder)


@pytest.mark.parametrize("row, message", [
    ({"id": "a", "status": "pending"}, "status done or failed"),
    ({"id": "", "status": "done"}, "needs an id"),
    ({"id": "a", "status": "done", "colour": "red"}, "unknown columns.*colour"),
    ({"id": "a", "status": "done", "bytes": "many"}, "does not fit"),
    ({"id": "a", "status": "done", "prompt": "\ud800"}, "does not fit"),
])
def test_a_row_that_does_not_fit_is_refused_alone(folder, row, message):
    with Ledger.open(folder) as ledger:
        ledger.append([done("good")])
        with pytest.raises(ValueError, match=message):
            ledger.append([row])
    assert read(folder)["id"].to_pylist() == ["good"]


USER = pa.table({
    "user.category": pa.array(["cat", None]), "user.Größe": pa.array([1.5, 2.5], pa.float32()),
    "user.price": pa.array([Decimal("1.20"), None], pa.decimal128(9, 2)), "user.empty": pa.nulls(2),
    "user.tags": pa.array([["a", "b"], None]), "user.shot": pa.array([{"lens": 35, "name": "x"}, None]),
    "user.kind": pa.array(["x", "y"]).dictionary_encode(), "user.large": pa.array(["x", "y"], pa.large_string()),
    "user.when": pa.array(np.array(["2026-01-02T03:04:05.123456789", "NaT"], "datetime64[ns]")),
    "user.bytes": pa.array([b"\0\1", None]), "user.a.b": pa.array([1, 2]),
})


def test_user_columns_are_carried_and_parts_read_as_one_dataset(folder, tmp_path):
    with Ledger.open(folder, USER.schema) as ledger:
        ledger.append([done("a"), done("b")], USER)
        ledger.flush()
        ledger.append([done("c")])                              # every user column null: the part's schema stays
        ledger.flush()
        ledger.append([done("d")], USER.slice(1))
    table = ds.dataset(tmp_path / "out" / "ledger").to_table()
    assert table.sort_by("id")["id"].to_pylist() == list("abcd")
    assert {tuple(ds.dataset(tmp_path / "out" / name).schema.names) for name in part_names(folder)} == {
        (*COLUMNS.names, *USER.column_names)}
    first, *_, last = table.sort_by("id").to_pylist()
    assert first.items() >= {
        "user.category": "cat", "user.Größe": 1.5, "user.price": Decimal("1.20"), "user.empty": None,
        "user.tags": ["a", "b"], "user.shot": {"lens": 35, "name": "x"}, "user.kind": "x", "user.large": "x",
        "user.when": datetime(2026, 1, 2, 3, 4, 5, 123456), "user.bytes": b"\0\1", "user.a.b": 1}.items()
    assert last["user.a.b"] == 2 and last["user.tags"] is None
    assert table.schema.field("user.empty").type == pa.string()         # no reader stumbles over one without a type
    assert read(folder).schema.names == [*table.schema.names, *BESIDE]
    [first, *_] = read(folder, ["user.shot", "user.a.b"]).to_pylist()
    assert first == {"user.shot": {"lens": 35, "name": "x"}, "user.a.b": 1}


def test_pandas_reads_the_ledger(folder, tmp_path):
    pandas = pytest.importorskip("pandas")
    write(folder, [done("a"), failed("b")])
    assert pandas.read_parquet(tmp_path / "out" / "ledger")["status"].tolist() == ["done", "failed"]


def test_duckdb_reads_the_ledger(folder, tmp_path):
    duckdb = pytest.importorskip("duckdb")
    write(folder, [done("a"), failed("b")])
    counts = duckdb.sql(f"select status, count(*) from '{tmp_path}/out/ledger/*.parquet' "
                        "group by status order by status")
    assert counts.fetchall() == [("done", 1), ("failed", 1)]


def test_other_further_columns_are_refused(folder):
    with pytest.raises(ValueError, match="user.NAME or quality.NAME.*colour"):
        Ledger.open(folder, pa.schema({"colour": pa.string()}))
    with Ledger.open(folder, pa.schema({"user.x": pa.int64(), "quality.black": pa.bool_()})) as ledger:
        assert ledger.schema.names[-2:] == ["quality.black", "user.x"]
        ledger.append([done("a", **{"quality.black": False})])
        with pytest.raises(ValueError, match="unknown columns.*user.y"):
            ledger.append([done("b")], pa.table({"user.y": [1]}))
        with pytest.raises(ValueError, match="does not fit"):
            ledger.append([done("b")], pa.table({"user.x": [1, 2]}))


def test_retry_puts_failed_rows_back_and_touches_no_other(store):
    write(store, [done("a"), failed("b"), failed("c", error_type="OutOfMemoryError")], [failed("d")], [done("e")],
          extra=pa.schema({"user.x": pa.int64()}))
    store.put("_SUCCESS.json", b"{}")
    before = {key: store.get(key) for key in part_names(store)}
    assert retry_rows(store, {"error_type": "NoSuchError"}) == 0
    assert store.head("_SUCCESS.json") and {key: store.get(key) for key in part_names(store)} == before
    assert retry_rows(store, {"error_type": "ValueError"}) == 2
    assert store.head("_SUCCESS.json") is None
    assert part_names(store) == ["ledger/000001-000000.parquet", "ledger/000001-000002.parquet"]
    assert read(store)["id"].to_pylist() == ["a", "c", "e"]
    assert "user.x" in read(store).column_names
    assert Ledger.open(store).pending(keys(*"abcde"))["id"].to_pylist() == ["b", "d"]
    assert retry_rows(store) == 1 and retry_rows(store) == 0
    assert read(store)["status"].to_pylist() == ["done", "done"]


def test_retry_chooses_by_the_row_that_counts(store):
    write(store, [failed("a", error_type="Old"), failed("b", error_type="Old"), failed("c", error_type="Old")])
    write(store, [failed("a", error_type="New"), done("b")])
    assert retry_rows(store, {"error_type": "Old"}) == 1             # c; a failed otherwise since, b is done
    assert read(store)["id"].to_pylist() == ["a", "b"]
    assert retry_rows(store, {"error_type": "New", "id": "a"}) == 1  # and its older row does not come back
    assert read(store)["id"].to_pylist() == ["b"]


def test_retry_compares_numbers_as_text_and_names_unknown_columns(folder):
    write(folder, [failed("a", steps=20), failed("b", steps=30)])
    assert retry_rows(folder, {"steps": "30"}) == 1
    for column in ("error_typ", "fallbacks"):
        with pytest.raises(ValueError, match=f"no column {column} to choose rows by; it has id, clip_id"):
            retry_rows(folder, {column: "x"})


def test_a_killed_retry_is_finished_by_the_next(folder, monkeypatch):
    write(folder, [failed("a", error_type="Old")], [done("b")])
    write(folder, [failed("a", error_type="New"), failed("c", error_type="New")])
    put = folder.put

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    for method in ("delete", "put"):
        with monkeypatch.context() as patch:
            calls = []
            real = getattr(folder, method)
            patch.setattr(folder, method, lambda *args: calls.append(args)
                          or (real(*args) if len(calls) < 2 else die()))
            with contextlib.suppress(Killed):
                retry_rows(folder, {"error_type": "New"})
        assert set(read(folder, ["id"])["id"].to_pylist()) <= {"a", "b", "c"}
    assert folder.put == put
    retry_rows(folder, {"error_type": "New"})
    assert read(folder)["id"].to_pylist() == ["b"]


def test_what_a_row_failed_with_is_kept_in_the_row_that_comes_in_its_place(store):
    write(store, [failed("a", error="first"), invalid_row("b", None, "no prompt"), done("c")])
    assert retry_rows(store) == 1 and retry_rows(store) == 0              # an invalid row is not tried again
    assert [row["id"] for row in read(store).to_pylist()] == ["b", "c"]
    write(store, [failed("a", error="second")])
    forget_retried(store)
    assert [info.key for info in store.list("retried/")] == []
    assert retry_rows(store, {"id": "a"}) == 1
    forget_retried(store)                                       # not yet: the row is pending
    write(store, [done("a")])
    said = {row["id"]: row["earlier_errors"] for row in read(store).to_pylist()}
    assert said["b"] is None and said["c"] is None
    assert [text.rpartition(": ")[2] for text in said["a"]] == ["first", "second"] and "ValueError" in said["a"][0]
    forget_retried(store)
    assert [info.key for info in store.list("retried/")] == []


def test_what_an_invalid_row_was_refused_for_is_forgotten_when_its_mended_row_is_there(folder):
    write(folder, [invalid_row("b", None, "no prompt")])
    take_out(folder, {("b", None)})
    forget_retried(folder)
    assert [info.key for info in folder.list("retried/")] != []         # its row is pending
    write(folder, [done("b", 7)])
    forget_retried(folder)
    assert [info.key
            for info in folder.list("retried/")] == [] and "no prompt" in read(folder)["earlier_errors"][0].as_py()[0]


def test_earlier_errors_without_the_usual_columns_are_read_as_far_as_they_go(folder):
    folder.put("retried/x.parquet", parquet_bytes(pa.table({"id": ["a"], "seed": [0], "status": ["failed"]})))
    write(folder, [done("a")])
    assert "at a time that is not known" in read(folder)["earlier_errors"][0].as_py()[0]


def test_nothing_tells_of_success_while_clips_are_to_be_made_again(folder):
    write(folder, [done("a"), done("b")])
    assert put_back(folder, {"clip of a": "missing"}) == 1
    assert write_success(folder)["done"] == 1 and folder.head("_SUCCESS.json") is None
    write(folder, [done("a")])
    assert write_success(folder)["done"] == 2 and folder.head("_SUCCESS.json") is not None


def test_a_users_column_on_whose_type_the_parts_do_not_agree_is_read_as_text(folder):
    times, scores = pa.array([10**6], pa.time64("us")), pa.array([3])
    part = pa.table({"id": ["a"], "seed": [0], "status": ["done"], "user.at": times, "user.score": scores})
    folder.put("ledger/000001-000000.parquet", parquet_bytes(part))         # as an older version stored it
    with Ledger.open(folder, pa.schema([("user.at", pa.string()), ("user.score", pa.float64())])) as ledger:
        ledger.append([done("b")], pa.table({"user.at": ["noon"], "user.score": [0.5]}))
    assert read(folder, ["id", "user.at", "user.score"]).to_pylist() == [
        {"id": "a", "user.at": "00:00:01.000000", "user.score": 3.0}, {"id": "b", "user.at": "noon", "user.score": 0.5}]
    assert read(folder).num_rows == 2 and retry_rows(folder, {"user.at": "noon"}) == 0


def test_where_nothing_was_made_nothing_tells_of_success(folder):
    write(folder, [failed("a"), invalid_row("b", None, "bad")])
    assert write_success(folder)["done"] == 0 and folder.head("_SUCCESS.json") is None


def test_success_tells_counts_and_a_digest_of_what_was_made(store):
    write(store, [done("b", 1), done("a", 2)], [failed("c"), invalid_row("d", None, "bad")])
    said = write_success(store)
    assert json.loads(store.get("_SUCCESS.json")) == said
    assert (said["rows"], said["done"], said["failed"]) == (4, 2, 2)
    assert said["ledger_digest"] == digest(read(store))


def test_the_digest_depends_on_the_clips_and_not_on_order_time_or_machine(tmp_path):
    def digest_of(name, *batches):
        store = open_store(tmp_path / name)
        write(store, *batches)
        return digest(read(store))

    want = digest_of("one", [done("a", worker="x"), done("b")], [failed("c")])
    assert digest_of("two", [failed("c")], [done("b", uri="elsewhere")],
                     [done("a", finished_at=datetime.now(UTC))]) == want
    assert digest_of("three", [done("a"), done("b"), done("c")]) != want
    assert digest_of("four", [done("a", sha256="other"), done("b"), failed("c")]) != want


def test_a_hundred_thousand_rows_in_a_hundred_parts(folder):
    ids = np.char.add("row ", np.arange(100_000).astype(str))
    ledger = Ledger.open(folder)
    for start in range(0, 100_000, 1000):
        given = {"id": pa.array(ids[start: start + 1000]), "seed": pa.array(np.arange(start, start + 1000)),
                 "status": pa.array(["done"] * 1000)}
        ledger.waiting = [pa.table({field.name: given.get(field.name, pa.nulls(1000, field.type)) for field in COLUMNS},
                                   schema=COLUMNS)]
        ledger.flush()
    again = Ledger.open(folder)
    assert again.counts == {"done": 100_000}
    wanted = pa.table({"id": np.char.add("row ", np.arange(50_000, 150_000).astype(str)),
                       "seed": np.arange(50_000, 150_000)})
    assert again.pending(wanted)["seed"].to_pylist() == list(range(100_000, 150_000))


def test_of_a_large_ledger_few_rows_are_objects_of_python_at_a_time(folder):
    """A forged part has 100,000 rows in a few bytes, and there may be many parts: a dictionary of each took 60 MB."""
    same = {"status": "done", "sha256": "ab", "width": 64, "height": 64, "frames": 5, "bytes": 9, "fps": 24.0}
    numbers = np.arange(100_000)
    for part in range(1, 3):
        ids = pa.array(np.char.add(f"{part} ", numbers.astype(str)))
        given = {"id": ids, "seed": pa.array(numbers), "clip_id": ids} | {
            name: pa.repeat(pa.scalar(value, COLUMNS.field(name).type), 100_000) for name, value in same.items()}
        folder.put(f"ledger/{part:06}-000000.parquet", parquet_bytes(pa.table(given)))
    problems = {f"1 {number}": "missing" for number in range(2500)}
    tracemalloc.start()
    try:
        assert recorded_hashes(folder, problems) == dict.fromkeys(problems, "ab")
        assert done_clips(folder).num_rows == 200_000
        assert put_back(folder, problems) == 2500
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert [name for name in part_names(folder) if "000003-" in name] == [
        f"ledger/000003-{seq:06}.parquet" for seq in range(3)]
    assert done_clips(folder).num_rows == 197_500
    assert counts_of(read(folder, ["status"], put_back=True)["status"]) == {"done": 197_500, "pending": 2500}


IDENTITY = {"model": "demo", "weights_fingerprint": "ab", "manifest_digest": "cd", "steps": 20, "resolution": None}


def test_run_json_is_written_once_and_says_the_same_when_continued(store):
    first = claim_run(store, IDENTITY, {"versions": {"torch": "1"}})
    assert read_run(store) == first == {"identity": IDENTITY, "versions": {"torch": "1"}}
    assert claim_run(store, IDENTITY, {"versions": {"torch": "2"}}) == first


def test_what_a_folder_was_rendered_for_is_known_with_all_its_counts(folder):
    counts = {"rows": 9, "duplicates": 1, "planned_rows": 11, "invalid_rows": 0, "clips": 10, "buckets": [],
              "more_buckets": 0}
    known = known_manifest(folder, claim_run(folder, IDENTITY, counts))
    assert known.items() >= counts.items() and known["manifest_digest"] == "cd"


def test_another_run_is_refused_and_every_difference_named(store):
    assert read_run(store) is None
    claim_run(store, IDENTITY, {})
    with pytest.raises(OtherRun, match="another run: model was demo, is wan; precision was None, is bf16. Choose an"):
        claim_run(store, IDENTITY | {"model": "wan", "precision": "bf16"}, {})



def test_a_run_folder_of_a_newer_version_is_refused(folder):
    folder.put("run.json", json.dumps({"identity": IDENTITY | {"format": 3}}).encode())
    with pytest.raises(OtherRun, match="format 3, which a newer dailies wrote; this one knows 2"):
        claim_run(folder, IDENTITY | {"format": 2}, {})


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1}', b"\xff"])
def test_a_foreign_run_json_is_refused(folder, content):
    folder.put("run.json", content)
    with pytest.raises(OtherRun, match="not one that dailies wrote"):
        claim_run(folder, IDENTITY, {})
    assert folder.get("run.json") == content


def test_run_json_holds_no_secret(folder, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    claim_run(folder, IDENTITY, {
        "manifest": "https://me:pass1@host/m.parquet?X-Amz-Signature=beef", "api_key": "k1",
        "aws": {"Session_Token": ["k2"]},
        "argv": ["render", "--x", "hunter2hunter2"], "max_tokens": 5, "tokenizer": "t5", "out": "s3://bucket/night/1"})
    text = folder.get("run.json").decode()
    for secret in ("hunter2", "pass1", "beef", "k1", "k2"):
        assert secret not in text
    found = read_run(folder)
    assert found["manifest"] == "https://host/m.parquet?[removed]"
    assert (found["max_tokens"], found["tokenizer"], found["out"]) == (5, "t5", "s3://bucket/night/1")


@pytest.mark.parametrize("stages, said", [
    ((), None), (("a", "a", "a"), "a"), (("a", "b", "a"), "encode: a; sample: b; decode: a"),
    (("a", "b"), "encode: a; sample: b")])
def test_the_determinism_class_is_one_where_all_stages_have_one(stages, said):
    assert class_of(stages) == said


@pytest.mark.parametrize("name", ["999999-000000", "999999999-000000", "1000000000-000000", "9" * 200 + "-0"])
def test_a_part_behind_which_no_other_has_its_place_is_refused(name, tmp_path):
    """Each writer would take the epoch after it, which is there already, and try for ever."""
    store = open_store(tmp_path)
    store.create(f"ledger/{name}.parquet", b"x")
    with pytest.raises(StoreError, match="Move it away"):
        ledgers.next_epoch(store)
