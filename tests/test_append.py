"""A run folder grows: the same table saved again continues, and a row that was made is never made again.

The runs are of a tiny model, in this process.
"""

import json
import shutil

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from run_folders import ask, clips_of, render, write

from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.run import ledger
from dailies.pipeline.store import open_store

PROMPTS = ["a red fox", "two cats", "a red fox", "日本の猫"]
TABLE = pa.table({"prompt": PROMPTS, "frames": [5, 5, 5, 9], "guidance": [3.0, None, 3.0, 2.5], "mood": list("abcd")})


def rows_of(out):
    return {(row["id"], row["seed"]): row["clip_id"] for row in ledger.read(open_store(out)).to_pylist()}


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """What was made of a table whose rows have no ids; not to be changed."""
    folder = tmp_path_factory.mktemp("night")
    pq.write_table(TABLE, folder / "night.parquet", compression="snappy")
    code, answer, _ = render(folder / "night.parquet", folder / "out")
    assert code == 0 and answer["rendered"] == 4
    return folder


@pytest.fixture
def again(night, tmp_path):
    return shutil.copytree(night / "out", tmp_path / "out")


def test_a_report_that_is_asked_for_is_there_when_the_command_ends_though_all_was_done(night, again):
    from test_run_folder import said
    code, printed = said("render", night / "night.parquet", "--out", again, "--model", "tiny", "--device", "cpu",
                         "--report", "1h", "--price", "2")
    assert code == 0 and f"See them all in {again}/report/index.html" in printed
    head = (again / "report/data/head.js").read_text()
    assert '"done":4' in head and '"price":2.0' in head and '"finished":true' in head


def saved(how, folder):
    """The table, saved in another way."""
    path = folder / "again.parquet"
    if how == "another compression":
        pq.write_table(TABLE, path, compression="zstd", use_dictionary=False, row_group_size=2)
    elif how == "another order":
        pq.write_table(TABLE.take([3, 0, 1, 2]), path)
    elif how == "columns added":
        more = TABLE.append_column("seed", pa.nulls(4, pa.int64())).append_column("score", pa.array([1.5] * 4))
        pq.write_table(more.append_column("priority", pa.array([1, 2, 3, 4])), path)
    elif how == "columns turned":
        kinds = {"mood": pa.large_string(), "guidance": pa.float32(), "prompt": pa.string_view(), "frames": pa.int8()}
        pq.write_table(TABLE.select(list(kinds)).cast(pa.schema(kinds)), path)
    elif how == "CSV":
        path = folder / "again.csv"
        pa_csv.write_csv(TABLE, path)
    elif how == "JSON lines":
        path = folder / "again.jsonl"
        path.write_text("".join(json.dumps({name: said for name, said in row.items() if said is not None}) + "\n"
                                for row in TABLE.to_pylist()))
    elif how == "a folder of files":
        path = folder / "again"
        path.mkdir()
        pq.write_table(TABLE.slice(2), path / "a.parquet")
        pa_csv.write_csv(TABLE.slice(0, 2), path / "b.csv")
    return path


@pytest.mark.parametrize("how", ["another compression", "another order", "columns added", "columns turned", "CSV",
                                 "JSON lines", "a folder of files"])
def test_the_same_table_saved_again_just_continues(how, again, tmp_path):
    before, clips = rows_of(again), clips_of(again)
    code, answer, _ = render(saved(how, tmp_path), again)
    assert code == 0 and (answer["rendered"], answer["adopted"], answer["done"]) == (0, 0, 4)
    assert not any("has changed" in note for note in answer["notes"])
    assert rows_of(again) == before and clips_of(again) == clips
    records = [json.loads(path.read_text()) for path in sorted((again / "manifests").iterdir())]
    assert [record["rows"] for record in records] == [4, 4]
    assert records[0]["name"].endswith("night.parquet") and records[1]["name"] == str(saved_name(how, tmp_path))
    assert len({record["manifest_digest"] for record in records}) == 2 and all(record["given_at"] for record in records)


def saved_name(how, folder):
    return folder / ("again" + {"CSV": ".csv", "JSON lines": ".jsonl", "a folder of files": ""}.get(how, ".parquet"))


def test_a_row_more_is_the_only_one_that_is_made(again, tmp_path):
    before, clips = rows_of(again), clips_of(again)
    new = pa.table({"prompt": ["a blue bird", "a red fox"], "frames": [5, 5], "guidance": [None, 3.0],
                    "mood": ["e", "f"]})
    pq.write_table(pa.concat_tables([new.slice(0, 1), TABLE, new.slice(1)]), tmp_path / "more.parquet")
    code, answer, _ = ask("plan", tmp_path / "more.parquet", "--out", again, "--model", "tiny", "--device", "cpu")
    assert (answer["new"], answer["done"], answer["changed"], answer["gone"]) == (2, 4, 0, 0)
    code, answer, _ = render(tmp_path / "more.parquet", again)
    assert code == 0 and (answer["rendered"], answer["done"]) == (2, 6)
    assert before.items() < rows_of(again).items() and clips.items() < clips_of(again).items()
    names = sorted(name for name, _ in rows_of(again) if rows_of(again)[name, _] not in before.values())
    assert any(name.endswith("-2") for name in names)   # the third row of equal ones
    pq.write_table(TABLE.slice(1, 1), tmp_path / "one.parquet")
    code, answer, _ = ask("plan", tmp_path / "one.parquet", "--out", again, "--model", "tiny", "--device", "cpu")
    assert (answer["new"], answer["done"], answer["changed"], answer["gone"]) == (0, 1, 0, 5)
    assert render(tmp_path / "one.parquet", again)[0] == 0 and len(rows_of(again)) == 6
    assert ask("status", again)[1]["done"] == 6 and ask("verify", again)[1]["clips"] == 6


def test_what_decides_no_pixels_renames_no_row_and_what_does_renames_it_alone(tmp_path):
    def ids(*rows):
        return Manifest.read(str(write(tmp_path / "m.jsonl", rows))).table["id"].to_pylist()

    fox, cat = {"prompt": "a fox", "steps": 4}, {"prompt": "a cat"}
    name, other = ids(fox, cat)
    assert ids(cat, fox) == [other, name] and ids(fox | {"mood": "sad", "priority": 3, "samples": 2}) == [name]
    assert ids(fox | {"steps": 4.0, "guidance": None}) == [name]
    assert ids(fox, fox, fox) == [name, f"{name}-1", f"{name}-2"]
    others = {"steps": 5, "guidance": 3, "seed": 1, "negative_prompt": "blur", "frames": 9, "resolution": "24p"}
    changed = [ids(fox | {column: value})[0] for column, value in others.items()]
    assert len({name, other, *changed}) == 8
    one, two = ids({"prompt": "a", "negative_prompt": "b 1 c"}, {"prompt": "anegative_prompt 5 b 1 c"})
    assert one != two


def test_samples_may_become_more(tmp_path):
    rows = [{"prompt": "a fox", "frames": 5, "samples": 2}]
    (tmp_path / "m.jsonl").write_text(json.dumps(rows[0]))
    assert render(tmp_path / "m.jsonl", tmp_path / "out")[1]["rendered"] == 2
    (tmp_path / "m.jsonl").write_text(json.dumps(rows[0] | {"samples": 3}))
    assert render(tmp_path / "m.jsonl", tmp_path / "out")[1]["rendered"] == 1
    assert {row["sample"] for row in ledger.read(open_store(tmp_path / "out")).to_pylist()} == {0, 1, 2}


def test_a_row_that_could_not_be_and_is_mended_leaves_no_failed_row_behind(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"prompt": "a fox", "frames": 5}\n{"prompt": "a cat", "frames": 5, "steps": -1}')
    code, answer, _ = render(tmp_path / "m.jsonl", tmp_path / "out", "--skip-invalid")
    assert code == 3 and (answer["done"], answer["failed"]) == (1, 1)
    (tmp_path / "m.jsonl").write_text('{"prompt": "a cat", "frames": 5, "steps": 1}\n{"prompt": "a fox", "frames": 5}')
    code, answer, _ = render(tmp_path / "m.jsonl", tmp_path / "out")
    assert code == 0 and (answer["rendered"], answer["done"], answer["failed"]) == (1, 2, 0)
    said = ask("status", tmp_path / "out")[1]
    assert (said["rows"], said["done"], said["failed"], said["finished"]) == (2, 2, 0, True)
