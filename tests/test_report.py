"""The morning report: what it says is what the ledger says, made of the run folder alone and written once."""

import hashlib
import io
import json
import re
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image
from test_clip_writer import moving_disc, request

from dailies.actors.clip_writer import ClipWriter
from dailies.actors.messages import Failure, Frames
from dailies.jobs.cli import main
from dailies.jobs.report import Reports
from dailies.jobs.settings import RenderJob
from dailies.jobs.usage import UsageError, seconds_meant
from dailies.pipeline.report import columns
from dailies.pipeline.report.columns import MOST_CHARACTERS, cut_text, packed_values, plain_values
from dailies.pipeline.report.figures import seconds_before, worked_seconds
from dailies.pipeline.report.rows import RunRows
from dailies.pipeline.run.layout import clip_key, poster_key
from dailies.pipeline.run.ledger import Ledger, read, write_again
from dailies.pipeline.run.ledger_row import row_of
from dailies.pipeline.stages import Outcome
from dailies.pipeline.store import FolderStore, StoreError, open_store

USER = pa.schema([("user.mood", pa.string()), ("user.score", pa.float64()), ("user.taken", pa.timestamp("us"))])
BEGAN = datetime(2026, 11, 29, 22, 0, tzinfo=UTC)


def run_folder(folder: Path | str, *, clips: int = 3, failed: int = 1, prompts=None, posters: bool = True,
               pending: int = 2, price: float | None = 2.0):
    """A run folder with real clips, by the parts that a night writes it with."""
    store = open_store(str(folder))
    rows = clips + failed + pending
    store.put("run.json", json.dumps({
        "identity": {"model": "demo", "precision": "fp32"}, "rows": rows, "planned_rows": rows, "invalid_rows": 0,
        "clips": rows, "duplicates": 0, "buckets": [], "more_buckets": 0, "settings": {"steps": 4}, "rows_digest": "0",
        "job": {"price": price, "until": "07:00"}, "versions": {"dailies": "1"}, "began_at": "2026-11-29"}).encode())
    writer = ClipWriter(store, clip_key, poster_key_of=poster_key if posters else None)
    with Ledger.open(store, USER) as ledger:
        for number in range(clips + failed):
            prompt = prompts[number] if prompts else f"a disc, number {number // 2}"
            asked = request(clip_id=f"{number + 1:064x}", prompt=prompt, seed=2**62 + number)
            outcome = Outcome(value=None, attempts=1, queue_s=1.0, worker="w", device="NVIDIA H200", gpu_s=3600.0,
                              seconds={"encode": 1.0, "sample": 8.0, "decode": 2.0, "publish": 1.0, "upscale": 3.0})
            if number < clips:
                value, = writer([Frames(request=asked, rgb=moving_disc(), quality={"motion": number / 3})])
            else:
                value = Failure(request=asked, stage="sample", error_type="WorkerDied", error=f"worker {number} died")
            row = row_of(f"row-{number}", value, outcome) | {"finished_at": BEGAN + timedelta(seconds=20 * number + 15)}
            ledger.append([row | {"user.mood": ["calm", "loud"][number % 2], "user.score": number / 7}])
    return store


def report(capsys, *arguments) -> dict:
    code = main(["report", *map(str, arguments), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert code == said["exit_code"] == 0, said
    return said


def head_of(folder: Path) -> dict:
    text = (folder / "data" / "head.js").read_text()
    return json.loads(re.fullmatch(r"dailies\.head\((.*)\);\n", text, re.S)[1])


def payload(folder: Path, name: str) -> dict:
    return json.loads(re.fullmatch(rf'dailies\.put\("{name}",(.*)\);\n', (folder / name).read_text(), re.S)[1])


def unpacked(values: dict) -> list:
    if "v" in values:
        return values["v"]
    return [values["d"][place] for place in values["i"]] if "d" in values else [values["c"]] * values["n"]


def column(folder: Path, name: str) -> list:
    head = head_of(folder)
    about = next(each for each in head["sheet"]["columns"] if each["name"] == name)
    if about.get("tile"):
        return [value for page in head["sheet"]["pages"] for value in unpacked(payload(folder, page)[name])]
    if "const" in about:
        return [about["const"]] * head["sheet"]["rows"]
    return [value for file in about["files"] for value in unpacked(payload(folder, file))]


def test_a_report_says_what_the_ledger_says(tmp_path, capsys):
    run_folder(tmp_path / "out")
    said = report(capsys, tmp_path / "out")
    assert (said["done"], said["failed"], said["pending"], said["rows"]) == (3, 1, 2, 4)
    folder = tmp_path / "out" / "report"
    head = head_of(folder)
    figures = head["figures"]
    assert figures["gpu_hours"] == 4.0 and figures["cost"] == 8.0 and figures["clips"] == 3
    assert figures["clips_gpu_hours"] == 3.0            # what failed took the fourth
    assert [(kind["error_type"], kind["count"], kind["examples"][0]["id"]) for kind in figures["failures"]] == [
        ("WorkerDied", 1, "row-3")]
    shares = {stage["stage"]: stage["share"] for stage in figures["night"]["stages"]}
    assert shares == {"encode": 0.0667, "sample": 0.5333, "upscale": 0.2, "decode": 0.1333, "publish": 0.0667}
    assert sum(figures["night"]["per_hour"]) * figures["night"]["slice_s"] / 3600 == pytest.approx(3, abs=0.01)
    assert figures["night"]["worked_s"] == 45.0         # three clips of 15 s, and 5 s between them
    assert column(folder, "id") == [f"row-{number}" for number in range(4)]
    assert column(folder, "seed") == [str(2**62 + number) for number in range(4)]
    assert column(folder, "user.mood") == ["calm", "loud", "calm", "loud"]
    assert column(folder, "user.score") == [0, 0.1428571, 0.2857143, 0.4285714]
    assert column(folder, "quality.motion") == [0, 0.3333333, 0.6666667, None]
    assert column(folder, "prompt_group") == [0, 0, 1, 1] and column(folder, "poster") == [1, 1, 1, 0]
    assert column(folder, "finished_at")[0] == (BEGAN + timedelta(seconds=15)).timestamp()
    assert dict(head["about"]["How it began"])["until"] == "07:00" and head["runs"][0]["base"] == "../"
    assert {"index.html", "report.css", "main.js"} <= {path.name for path in folder.iterdir()}
    assert "ORIGINS" not in (folder / "index.html").read_text()


def test_what_run_json_says_is_written_whatever_characters_it_has(tmp_path, capsys):
    store = run_folder(tmp_path / "out")
    run = json.loads(store.get("run.json"))
    store.delete("run.json")
    store.put("run.json", json.dumps(run | {"job": {"until": "\ud800 07:00", "</script>": "\u2028"}}).encode())
    report(capsys, tmp_path / "out")
    assert head_of(tmp_path / "out/report")["about"]["How it began"][1:] == [["until", "? 07:00"],
                                                                            ["</script>", "\u2028"]]


def test_what_has_not_changed_is_not_written_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(columns, "PAGE_ROWS", 2)
    store = run_folder(tmp_path / "out")
    first = report(capsys, tmp_path / "out")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/report/data").iterdir() if path.stem != "head"}
    again = report(capsys, tmp_path / "out")
    assert first["new_files"] == len(kept) and again["new_files"] == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    with Ledger.open(store, USER) as ledger:
        failure = Failure(request=request(clip_id="f" * 64, seed=1), stage="sample", error_type="Poison", error="no")
        ledger.append([row_of("row-9", failure)])
    pages = head_of(tmp_path / "out/report")["sheet"]["pages"]
    more = report(capsys, tmp_path / "out")
    assert more["failed"] == 2 and head_of(tmp_path / "out/report")["sheet"]["pages"][:2] == pages
    assert {path: path.stat().st_mtime_ns for path in kept} == kept        # a page that is open still needs them
    assert len(column(tmp_path / "out/report", "id")) == 5


def test_an_earlier_take_is_shown_beside_the_one_that_counts_and_counted_nowhere(tmp_path, capsys):
    store = run_folder(tmp_path / "out", clips=2, failed=0)
    asked = request(clip_id=f"{9:064x}", prompt="a disc, number 0", seed=7)
    clip, = ClipWriter(store, clip_key, poster_key_of=poster_key)([Frames(request=asked, rgb=moving_disc())])
    with Ledger.open(store, USER) as ledger:
        ledger.append([row_of("row-0", clip) | {"take_of": 2**62, "replaces": f"{1:064x}"}])
    said = report(capsys, tmp_path / "out")
    assert (said["done"], said["clips"], said["rows"]) == (2, 2, 3)
    folder = tmp_path / "out" / "report"
    shown = dict(zip(column(folder, "clip_id"), column(folder, "current"), strict=True))
    assert shown == {f"{1:064x}": 0, f"{2:064x}": 1, f"{9:064x}": 1}
    assert column(folder, "prompt_group") == [0, 0, 0]


def test_what_a_run_cost_is_all_that_was_ever_made_for_it(tmp_path, capsys):
    """Also takes that another replaced, rows that were dropped, and what was made of a row before it was changed."""
    store = run_folder(tmp_path / "out", clips=3, failed=0)
    for name, change in (("row-0", {"seed": 7, "take_of": 2**62, "replaces": f"{1:064x}", "gpu_s": 1800.0}),
                         ("row-1", {"gpu_s": 900.0}), ("row-2", {"status": "dropped"})):
        rows = read(store)
        if "gpu_s" in change:                           # another clip
            change |= {"clip_id": hashlib.sha256(name.encode()).hexdigest()}
        write_again(store, rows.filter(pc.equal(rows["id"], name)), lambda row, change=change: change)
    assert report(capsys, tmp_path / "out")["cost"] == 7.5
    figures = head_of(tmp_path / "out/report")["figures"]
    assert (figures["gpu_hours"], figures["clips_gpu_hours"]) == (3.75, 0.75)


def test_the_rows_of_a_report_are_fetched_once(tmp_path, monkeypatch):
    """Those that count, those that do not any more, and what all of them cost."""
    store = run_folder(tmp_path / "out", clips=3, failed=1)
    asked, get = [], FolderStore.get
    monkeypatch.setattr(FolderStore, "get", lambda self, key, **given: asked.append(key) or get(self, key, **given))
    found = RunRows.read(store)
    assert found.table.num_rows == 4 and found.spent_gpu_s > 0
    assert sorted(asked) == [f"ledger/{path.name}" for path in sorted((tmp_path / "out/ledger").iterdir())]


@pytest.mark.parametrize("name", ["nothing done", "ledger gone", "no price"])
def test_a_run_in_any_state_has_a_report(tmp_path, capsys, name):
    run_folder(tmp_path / "out", clips=0 if name == "nothing done" else 2, failed=0, price=None)
    if name == "ledger gone":
        shutil.rmtree(tmp_path / "out" / "ledger")
    said = report(capsys, tmp_path / "out")
    assert said["unrecorded"] == (2 if name == "ledger gone" else 0)
    assert head_of(tmp_path / "out/report")["figures"]["cost"] is None


def test_posters_of_an_older_run_are_made_and_a_damaged_clip_has_none(tmp_path, capsys):
    store = run_folder(tmp_path / "out", posters=False)
    path = tmp_path / "out" / clip_key(f"{2:064x}")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    said = report(capsys, tmp_path / "out", "--no-posters")
    assert said["posters_made"] == 0 and said["without_poster"] == 3
    said = report(capsys, tmp_path / "out")
    assert said["posters_made"] == 2 and said["without_poster"] == 1
    assert [info.key for info in store.list("posters/")] == [poster_key(f"{number:064x}") for number in (1, 3)]
    run_folder(tmp_path / "new")
    pictures = [np.asarray(Image.open(io.BytesIO((tmp_path / folder / poster_key(f"{1:064x}")).read_bytes())
                                      ).convert("RGB")).astype(float) for folder in ("out", "new")]
    assert np.abs(pictures[0] - pictures[1]).mean() < 5         # of the decoded clip, and of the frames in memory


def test_a_report_elsewhere_names_the_clips_by_the_way_to_them(tmp_path, capsys):
    run_folder(tmp_path / "a run")
    run_folder(tmp_path / "other", clips=2)
    report(capsys, tmp_path / "a run", "--to", tmp_path / "morning" / "today", "--beside", tmp_path / "other")
    head = head_of(tmp_path / "morning" / "today")
    assert [run["base"] for run in head["runs"]] == ["../../a%20run/", "../../other/"]
    assert not (tmp_path / "a run" / "report").exists()
    assert column(tmp_path / "morning" / "today", "run") == [0, 0, 0, 0, 1, 1, 1]
    assert column(tmp_path / "morning" / "today", "prompt_group") == [0, 0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("price", ["nan", "inf", "-3", "0", "1e300"])
def test_a_price_is_more_than_nothing_and_finite(tmp_path, capsys, price):
    run_folder(tmp_path / "out", clips=0)
    assert main(["report", str(tmp_path / "out"), "--price", price]) == 2
    assert "--price must be USD per GPU hour" in capsys.readouterr().err


def test_a_report_is_written_over_its_own_kind_alone(tmp_path, capsys):
    run_folder(tmp_path / "out")
    page = tmp_path / "public" / "index.html"
    page.parent.mkdir()
    page.write_text("my page")
    assert main(["report", str(tmp_path / "out"), "--to", str(page.parent)]) == 2
    assert "no report of dailies" in capsys.readouterr().err and page.read_text() == "my page"
    for _ in range(2):
        report(capsys, tmp_path / "out", "--to", tmp_path / "own")


def test_a_run_that_nobody_may_write_to_has_a_report_elsewhere(tmp_path, capsys, monkeypatch):
    """Where posters are missing too."""
    run_folder(tmp_path / "out", posters=False)
    put, create = FolderStore.put, FolderStore.create

    def refused(method):
        def call(store, key, *arguments, **options):
            if store.root == tmp_path / "out":
                raise StoreError("read-only")
            return method(store, key, *arguments, **options)
        return call

    monkeypatch.setattr(FolderStore, "put", refused(put))
    monkeypatch.setattr(FolderStore, "create", refused(create))
    assert main(["report", str(tmp_path / "out")]) == 5
    assert "read-only. --to DIR writes the report elsewhere" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "out"), "--to", str(tmp_path / "here")]) == 0
    said = capsys.readouterr()
    assert "cannot be made: read-only" in said.err and "3 clips without a poster" in said.out
    assert column(tmp_path / "here", "poster") == [0, 0, 0, 0]


def test_a_bucket_has_its_report_and_links_that_are_signed_work(s3_bucket, capsys, tmp_path):
    from urllib.request import urlopen
    store = run_folder(f"{s3_bucket}/night")
    report(capsys, store.uri)
    assert store.get("report/index.html").startswith(b"<!doctype html>")
    assert main(["report", store.uri, "--to", str(tmp_path)]) == 2       # nobody could find the clips from there
    assert "--presign 12h" in capsys.readouterr().err
    report(capsys, store.uri, "--to", tmp_path / "here", "--presign", "12h")
    links = payload(tmp_path / "here", head_of(tmp_path / "here")["sheet"]["pages"][0])["links"]
    for kind, key, there in (("clip", clip_key(f"{3:064x}"), b"ftyp"), ("poster", poster_key(f"{3:064x}"), b"WEBP")):
        pattern, signature = links[kind][2]
        link = links["patterns"][pattern].replace("{key}", key).replace("{signature}", signature)
        with urlopen(link) as answer:
            assert there in answer.read(16)
        assert links[kind][3] is None                   # of a row that failed
    origin = link.partition("/night")[0].rpartition("/")[0]
    assert f"media-src 'self' {origin};" in (tmp_path / "here" / "index.html").read_text()


def test_links_of_a_folder_are_refused_with_a_sentence(tmp_path, capsys):
    run_folder(tmp_path / "out")
    assert main(["report", str(tmp_path / "out"), "--presign", "12h"]) == 5
    assert "--presign" in capsys.readouterr().err
    for said, why in (("8d", "7 days"), ("soon", "12h")):
        assert main(["report", str(tmp_path / "out"), "--presign", said]) == 2
        assert why in capsys.readouterr().err


def test_a_time_is_seconds_minutes_hours_or_days():
    assert [seconds_meant("--x", said) for said in ("45s", "5m", "12h", "2d")] == [45, 300, 43200, 172800]
    for said in ("", "5", "0m", "-1h", "1.5h", "5 minutes", "٣m"):
        with pytest.raises(UsageError, match="5m, 12h or 2d"):
            seconds_meant("--x", said)


def test_a_report_of_a_run_that_goes_on_is_written_now_and_then_and_at_its_end(tmp_path):
    store, told = run_folder(tmp_path / "out"), []
    head = tmp_path / "out" / "report" / "data" / "head.js"
    with Reports(store, 0.05, told.append):
        until = time.monotonic() + 30
        while not head.exists() and time.monotonic() < until:
            time.sleep(0.01)
        first = head.stat().st_mtime_ns
    assert head.stat().st_mtime_ns > first and told == []
    part, = (tmp_path / "out" / "ledger").iterdir()
    part.write_bytes(b"damaged")
    with Reports(store, 3600.0, told.append):
        pass                                            # a report that cannot be made costs the run nothing
    assert len(told) == 1 and "not written this time" in told[0]
    with pytest.raises(KeyError), Reports(store, 3600.0, told.append):
        raise KeyError                                  # what ended the run is told, and no report waits before it
    assert len(told) == 1


def test_render_is_told_how_often_to_write_a_report():
    assert RenderJob.read({"manifest": "x.csv", "out": "out", "report": "5m"}).report == "5m"
    with pytest.raises(UsageError, match="--report must be a time such as 5m"):
        RenderJob.read({"manifest": "x.csv", "out": "out", "report": "often"})


def test_any_column_of_a_user_becomes_values_that_a_page_can_read():
    nan, stamp = float("nan"), datetime(2026, 1, 2, tzinfo=UTC)
    for values, kind, wanted in (
            ([1.5, nan, float("inf"), None, 1e300], "number", [1.5, None, None, None, 1e300]),
            ([2**53, 1], "integer", [str(2**53), "1"]), ([True, None], "bool", [1, None]),
            ([stamp, None], "time", [stamp.timestamp(), None]), ([["a", "b"], [], None], "text", ["a; b", None, None]),
            ([{"a": [1]}, None], "text", ['{"a": [1]}', None]), (["x" * 5000], "text", [cut_text("x" * 5000)])):
        assert plain_values(pa.chunked_array([pa.array(values)])) == (kind, wanted)
    assert len(cut_text("x" * 5000)) == MOST_CHARACTERS


@pytest.mark.parametrize("values", [[None], ["a"], ["a"] * 9, ["a", "b"] * 50, list(range(9)), [None, "a"] * 9],
                         ids=str)
def test_packed_values_are_the_values(values):
    assert unpacked(json.loads(json.dumps(packed_values(values)))) == values


def test_busy_seconds_and_worked_seconds_are_those_of_the_spans():
    how = np.random.default_rng(3)
    starts = how.uniform(0, 100, 40)
    ends = starts + how.uniform(0, 9, 40)
    edges = np.linspace(-5, 120, 30)
    slow = [sum(max(0.0, min(edge, end) - start) for start, end in zip(starts, ends, strict=True)) for edge in edges]
    assert np.allclose(seconds_before(starts, ends, edges), slow)
    fine = np.arange(0, 110, 0.001)
    inside = ((fine[:, None] >= starts) & (fine[:, None] < ends)).any(1)
    assert worked_seconds(starts, ends) == pytest.approx(inside.sum() * 0.001, abs=0.1)


def test_a_hostile_ledger_is_data_in_the_files(tmp_path, capsys):
    """Whatever prompts, ids and errors say, a file of data is one call with one JSON value."""
    prompts = ['</script><script>alert(1)</script>', '"); alert(1); ("', "\u2028\u2029\\", "{key}{signature}"]
    run_folder(tmp_path / "out", prompts=prompts)
    report(capsys, tmp_path / "out")
    assert column(tmp_path / "out/report", "prompt") == prompts
    for path in (tmp_path / "out/report/data").glob("*.js"):
        name = f"data/{path.name}"
        assert head_of(tmp_path / "out/report") if path.stem == "head" else payload(tmp_path / "out/report", name)
