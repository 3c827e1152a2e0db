"""A few bytes may not ask for hours or for all memory: what is read is bounded by its work, before the work is done."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from limits import within

from dailies.pipeline.manifest import files, parquet, text
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.manifest.validation import ManifestError
from dailies.pipeline.run import ledger
from dailies.pipeline.store import open_store

SOON_S = 60                                             # of hours


def written(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


def refused(*uris) -> str:
    with within(SOON_S), pytest.raises(ManifestError) as error:
        Manifest.read([str(uri) for uri in uris])
    return str(error.value)


def as_parquet(path: Path, columns: dict, **options) -> Path:
    pq.write_table(pa.table({"prompt": ["a fox"], **columns}), path, store_schema=False, **options)
    return path


@pytest.mark.parametrize("kind", ["columns", "a record", "a list of records"])
def test_a_parquet_file_of_more_columns_than_a_manifest_may_have_is_refused_by_its_footer(kind, tmp_path, monkeypatch):
    names = [f"c{at}" for at in range(1_001)]
    record = pa.StructArray.from_arrays([pa.array([1], pa.int8())] * len(names), names)
    columns = {"columns": dict.fromkeys(names, pa.array([1], pa.int8())), "a record": {"s": record},
               "a list of records": {"s": pa.ListArray.from_arrays([0, 1], record)}}[kind]
    monkeypatch.setattr(parquet, "leaves", None)        # nothing is looked at one by one
    assert "1,002 columns, those in structs and lists counted; 1,000 may" in refused(
        as_parquet(tmp_path / "m.parquet", columns))


def test_a_parquet_file_cut_into_more_pieces_than_a_manifest_needs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_CHUNKS", 9)
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"prompt": ["a fox"] * 10}), path, row_group_size=1)
    assert "10 row groups, which cut its columns into 10 pieces; 9 may" in refused(path)


def test_files_that_each_bring_columns_of_their_own_are_refused_together(tmp_path):
    for at in range(3):
        columns = {f"c{at}_{number}": [1] for number in range(400)}
        as_parquet(tmp_path / f"{at}.parquet", columns)
    said = refused(tmp_path)
    assert "2.parquet: got 1,200 columns with those of the files before; a manifest may have 1,000" in said


def test_many_files_of_many_columns_are_put_together_in_one_go(tmp_path):
    wide = {f"c{number}": [number] for number in range(100)}
    for at in range(50):
        as_parquet(tmp_path / f"{at:03}.parquet", wide | {"odd": [at if at % 2 else "text"]})
    with within(SOON_S):
        manifest = Manifest.read(str(tmp_path))
    assert manifest.user.num_columns == 101 and manifest.user["user.odd"].to_pylist()[:3] == ["text", "1", "text"]


def test_a_row_of_json_with_many_names_of_which_one_is_doubled_is_refused(tmp_path):
    cells = ",".join(f'"k{at}":0' for at in [0, *range(80_000)])
    assert "'k0' is there twice" in refused(written(tmp_path / "m.jsonl", f'{{"prompt":"a",{cells}}}\n'))


def test_rows_of_json_without_cells_under_many_names_are_refused(tmp_path):
    wide = json.dumps({"prompt": "a"} | {f"k{at}": 1 for at in range(900)})
    assert "of which hardly one has a cell" in refused(written(tmp_path / "m.jsonl", wide + "\n{}" * 19_999))


def test_names_that_are_no_text_are_found_row_by_row(tmp_path):
    rows = [json.dumps({"prompt": "a", f"k\udc80{at % 40}": 1}) for at in range(20_000)]
    with within(SOON_S):
        manifest = Manifest.read(written(tmp_path / "m.jsonl", "\n".join(rows)))
    assert len(manifest.errors) == 20_000 and not manifest.user.num_columns


SWALLOWING = {                                          # each row takes all lines after it, and is no row
    "a quote that is opened again": ("prompt,seed\n", 'z","\n'), "a quote alone": ("prompt,seed\n", '"z\n""\n'),
    "a quote in a second cell": ("prompt,seed\n", 'z,"\n'), "another sign": ("prompt;seed\n", 'z";"\n'),
    "between tabs": ("prompt\tseed\n", 'z"\t"\tx\n'),
}


@pytest.mark.parametrize("what", SWALLOWING)
def test_rows_that_each_swallow_the_rest_of_a_csv_are_read_a_bounded_number_of_times(what, tmp_path):
    header, line = SWALLOWING[what]
    with within(SOON_S):
        manifest = Manifest.read(written(tmp_path / "m.csv", header + line * 20_000 + header.replace("prompt", "fox")))
    assert len(manifest.errors) > 9_000


def test_lines_are_handed_back_a_bounded_number_of_times(tmp_path, monkeypatch):
    read, take = [], text.Lines.__next__
    monkeypatch.setattr(text.Lines, "__next__", lambda lines: read.append(1) or take(lines))
    monkeypatch.setattr(text, "MAX_REREAD", 10**6)
    Manifest.read(written(tmp_path / "m.csv", "prompt,seed\n" + 'z","\n' * 20_000))
    assert len(read) < (text.FEW_LINES + 2) * 20_000


def test_a_row_over_several_lines_is_read_after_many_that_were_none(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MAX_REREAD", 10**4)
    content = "prompt,seed\n" + 'z","\n' * 100 + 'a fox,1\n"one\ntwo",7\n'
    manifest = Manifest.read(written(tmp_path / "m.csv", content))
    assert manifest.table["seed"].to_pylist()[-2:] == [1, 7] and manifest.table["prompt"][-1].as_py() == "one\ntwo"


def test_a_header_that_never_ends_is_refused(tmp_path):
    assert "a row of more than 10,000 lines" in refused(written(tmp_path / "m.csv", '"prompt\n' + "x\n" * 20_000))


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl", "m.txt", "m.parquet", "m.json"])
def test_a_file_that_is_all_holes_is_refused_before_it_is_hashed(name, tmp_path):
    (tmp_path / name).write_bytes(b"prompt\n")
    os.truncate(tmp_path / name, 2**40)
    assert "1,099,511,627,776 bytes, where 4,294,967,296 are left" in refused(tmp_path / name)


def test_the_size_is_that_of_all_files_together(tmp_path):
    for name in ("a.csv", "b.csv", "c.csv"):
        (tmp_path / name).touch()
    (tmp_path / "a.csv").write_bytes(b"prompt\n" + b"a fox\n" * 1000)
    for name in ("b.csv", "c.csv"):
        os.truncate(tmp_path / name, 2**32 - 1000)
    said = refused(tmp_path)
    assert "b.csv: got 4,294,966,296 bytes, where 4,294,961,289" in said and "c.csv: got 4,294,966,296 bytes" in said


def test_a_glob_of_many_stars_is_matched_by_parts_times_patterns(monkeypatch):
    asked = []
    monkeypatch.setattr(files, "fnmatchcase", lambda part, pattern: asked.append(1) or part == pattern)
    parts = ["a"] * 28
    assert not files._matches(parts, ["**", "a"] * 14 + ["z"])
    assert len(asked) <= 28 * 29
    assert files._matches(parts, ["**"] * 14 + ["a"]) and files._matches(parts, ["a", "**", "a", "**"])
    assert files._matches(["a"], ["a", "**"]) and not files._matches([], ["a", "**"]) and files._matches([], ["**"])
    assert not files._matches(["a", "b"], ["**", "a"])


@pytest.mark.parametrize("what, rows, columns", [
    ("100,001 rows; a part has at most 100,000", 100_001, 0), ("2,004 columns; a part has at most 2,000", 1, 2_001)])
def test_a_part_of_a_ledger_with_more_than_a_part_has_is_refused_by_its_footer(what, rows, columns, tmp_path):
    same = {"id": "a", "seed": 1, "status": "done"} | {f"user.c{at}": 0 for at in range(columns)}
    (tmp_path / "ledger").mkdir()
    pq.write_table(pa.table({name: [value] * rows for name, value in same.items()}),
                   tmp_path / "ledger" / "000001-000000.parquet")
    with within(SOON_S), pytest.raises(ledger.StoreError, match=what):
        ledger.read(open_store(str(tmp_path)), ["id"])


def test_a_ledger_of_more_rows_than_any_run_has_is_refused_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "MAX_ROWS_IN_ALL", 10)
    (tmp_path / "ledger").mkdir()
    for part in range(3):
        pq.write_table(pa.table({"id": [f"{part}-{at}" for at in range(5)], "seed": [1] * 5, "status": ["done"] * 5}),
                       tmp_path / "ledger" / f"00000{part + 1}-000000.parquet")
    with pytest.raises(ledger.StoreError, match="more than 10 rows"):
        ledger.read(open_store(str(tmp_path)), ["id"])
