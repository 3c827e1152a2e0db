"""Manifests as people send them: every format, every mistake, and what is said about it."""

import csv
import hashlib
import io
import json
import re
import unicodedata
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dailies.model.settings import MAX_PROMPT_BYTES
from dailies.pipeline.manifest.cells import COLUMN_TYPES
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.manifest.text import ROWS_PER_BLOCK
from dailies.pipeline.manifest.validation import ManifestError, shown


def parquet(path: Path, **columns) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def text(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def refused(uri: str) -> str:
    """What is said about a manifest of which nothing can be relied on."""
    with pytest.raises(ManifestError) as caught:
        Manifest.read(uri)
    return str(caught.value)


def errors(uri: str) -> list[tuple]:
    return [(error.row, error.column, error.given) for error in Manifest.read(uri).errors]


def cells(manifest: Manifest, name: str) -> list:
    return manifest.table[name].to_pylist()


def test_a_file_that_is_not_there_is_named(tmp_path):
    said = refused(str(tmp_path / "night.parquet"))
    assert "night.parquet: got no such file" in said


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_an_empty_file_is_refused(tmp_path, suffix):
    assert "got an empty file" in refused(text(tmp_path / f"m.{suffix}", b""))


def test_a_header_or_blank_lines_are_no_rows(tmp_path):
    assert "got no row" in refused(text(tmp_path / "m.csv", "prompt,seed\n"))
    assert "got no row" in refused(text(tmp_path / "m.jsonl", "\n\n"))
    assert "got no row" in refused(parquet(tmp_path / "m.parquet", prompt=pa.array([], pa.string())))


def test_a_file_that_is_not_parquet_is_refused(tmp_path):
    assert "not a parquet file" in refused(text(tmp_path / "m.parquet", "prompt\n" + "a red circle\n" * 20))


def test_a_truncated_parquet_file_is_refused(tmp_path):
    whole = Path(parquet(tmp_path / "m.parquet", prompt=["a"] * 1000)).read_bytes()
    assert "a readable file of parquet" in refused(text(tmp_path / "cut.parquet", whole[:-30]))


def test_a_damaged_parquet_page_is_refused(tmp_path):
    whole = bytearray(Path(parquet(tmp_path / "m.parquet", prompt=["a"] * 1000)).read_bytes())
    whole[8:40] = b"\xff" * 32
    assert "a readable file of parquet" in refused(text(tmp_path / "damaged.parquet", bytes(whole)))


def test_parquet_is_known_by_its_first_bytes_whatever_its_name(tmp_path):
    parquet(tmp_path / "m.parquet", prompt=["a"])
    (tmp_path / "m.parquet").rename(tmp_path / "manifest")
    assert cells(Manifest.read(str(tmp_path / "manifest")), "prompt") == ["a"]
    assert "does not say its format" in refused(text(tmp_path / "notes.rows", "prompt\na\n"))


@pytest.mark.parametrize("name, content", [("m.csv", "Prompt,seed\na,1\n"),
                                           ("m.jsonl", '{"Prompt": "a", "seed": 1}\n')])
def test_a_missing_prompt_column_is_told_with_those_that_are_there(tmp_path, name, content):
    said = refused(text(tmp_path / name, content))
    assert "got the columns 'Prompt', 'seed'" in said and "'prompt'" in said
    assert ": 1 error;" in said                    # not once more for every row
    assert "--map Prompt=prompt" in said


def test_columns_of_wrong_types_are_told_together(tmp_path):
    said = refused(parquet(tmp_path / "m.parquet", prompt=[1, 2], steps=["a", "b"], seed=[True, False],
                           guidance=[[1.0], [2.0]], frames=[9, 0]))
    for expected in ("prompt: got a column of type int64; allowed: text", "guidance: got a column of type list",
                     "steps: got a column of type string; allowed: whole numbers", "seed: got a column of type bool",
                     "row 1, frames: got 0"):
        assert expected in said
    assert "--skip-invalid" not in said                # it would not help


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "m.parquet")
    assert "two columns named 'prompt'" in refused(str(tmp_path / "m.parquet"))
    assert "a column twice: 'seed'" in refused(text(tmp_path / "m.csv", "prompt,seed,seed\na,1,2\n"))


def test_the_encoding_is_read_where_a_mark_says_it_and_named_where_none_does(tmp_path):
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        for name, content in (("m.csv", "prompt;seed\r\ncafé,1;1\r\n"), ("m.txt", "café,1\r\n\r\n"),
                              ("m.jsonl", '{"prompt": "café,1"}\n'), ("m.json", '["café,1"]')):
            assert cells(Manifest.read(text(tmp_path / name, content.encode(encoding))), "prompt") == ["café,1"]
    for order in ("little", "big"):
        said = refused(text(tmp_path / "m.csv", "prompt,seed\na,1\n".encode(f"utf-16-{order[0]}e")))
        assert f"UTF-16 ({order} endian) without a byte order mark" in said
    assert "not UTF-8" in refused(text(tmp_path / "m.csv", b"prompt,caf\xe9\n"))


@pytest.mark.parametrize("columns, expected", [
    (dict(prompt=["a", None]), (1, "prompt", "nothing")),
    (dict(prompt=["a", " \u3000\n"]), (1, "prompt", r"' \u3000\n'")),
    (dict(prompt=["\0 \0"]), (0, "prompt", r"'\x00 \x00'")),
    (dict(prompt=["x" * 1_000_000]), (0, "prompt", f"'{'x' * 60}'... (1,000,000 bytes)")),
    (dict(prompt=["a"], negative_prompt=["n" * 9000]), (0, "negative_prompt", f"'{'n' * 60}'... (9,000 bytes)")),
    (dict(prompt=["a", "b"], id=["x", "x"]), (1, "id", "'x', the id of row 0")),
    (dict(prompt=["a"], id=["../../x"]), (0, "id", "'../../x'")),
    (dict(prompt=["a"], id=["scene/.."]), (0, "id", "'scene/..'")),
    (dict(prompt=["a"], id=["/etc/x"]), (0, "id", "'/etc/x'")),
    (dict(prompt=["a"], id=["..\\x"]), (0, "id", r"'..\\x'")),
    (dict(prompt=["a"], id=["a\x1b[31m"]), (0, "id", r"'a\x1b[31m'")),
    (dict(prompt=["a"], id=["a\u2028b"]), (0, "id", r"'a\u2028b'")),
    (dict(prompt=["a"], id=[""]), (0, "id", "''")),
    (dict(prompt=["a"], id=["i" * 257]), (0, "id", f"'{'i' * 60}'... (257 bytes)")),
    (dict(prompt=["a"], duration_s=[-1.0]), (0, "duration_s", "-1.0")),
    (dict(prompt=["a"], duration_s=[float("nan")]), (0, "duration_s", "nan")),
    (dict(prompt=["a"], guidance=[float("inf")]), (0, "guidance", "inf")),
    (dict(prompt=["a"], steps=[0]), (0, "steps", "0")),
    (dict(prompt=["a"], steps=[20.5]), (0, "steps", "20.5")),
    (dict(prompt=["a"], steps=[Decimal("20.5")]), (0, "steps", "Decimal('20.5')")),
    (dict(prompt=["a"], seed=[-1]), (0, "seed", "-1")),
    (dict(prompt=["a"], seed=pa.array([2**63], pa.uint64())), (0, "seed", "9223372036854775808")),
    (dict(prompt=["a"], seed=[1e300]), (0, "seed", "1e+300")),
    (dict(prompt=["a"], seed=[2**63 - 1], samples=[2]), (0, "samples", "seeds from 9223372036854775807")),
    (dict(prompt=["a"], samples=[0]), (0, "samples", "0")),
    (dict(prompt=["a"], priority=[2**40]), (0, "priority", "1099511627776")),
    (dict(prompt=["a"], duration_s=[2.0], frames=[49]), (0, "duration_s", "2 s and 49 frames")),
])
def test_a_bad_cell_is_named_and_shown(tmp_path, columns, expected):
    assert errors(parquet(tmp_path / "m.parquet", **columns)) == [expected]


def test_text_in_parquet_that_is_not_utf8_costs_its_row(tmp_path):
    prompts = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    assert errors(parquet(tmp_path / "m.parquet", prompt=prompts)) == [(1, "prompt", r"b'caf\xe9'")]


def test_broken_lines_cost_their_rows_and_are_named_by_number(tmp_path):
    lines = ['{"prompt": "a"}', "", '{"prompt": ', "[1]", '{"prompt": true}', '{"prompt": "b", "steps": true}',
             "[" * 100_000]
    found = errors(text(tmp_path / "m.jsonl", "\n".join(lines)))
    assert [(row, column) for row, column, _ in found] == [(1, None), (2, None), (3, "prompt"), (4, "steps"), (5, None)]
    assert [given.split(":")[0] for row, column, given in found if column is None] == ["line 3", "line 4", "line 7"]

    lines = ["prompt,steps", '"a, b",3', "", "one", '"two\nlines",4', "x,1,2", 'ok,5', '"never closed,6']
    found = errors(text(tmp_path / "m.csv", "\n".join(lines)))
    assert [(row, column) for row, column, _ in found] == [(1, None), (3, None), (5, None)]
    assert [given.split()[1] for _, _, given in found] == ["4", "7", "9"]


def test_csv_that_is_not_utf8_costs_the_rows_it_is_in(tmp_path):
    path = text(tmp_path / "m.csv", "prompt,note\na,b\ncafé,b\na,café\n".encode("latin-1"))
    assert errors(path) == [(1, "prompt", r"'caf\udce9'"), (2, "note", r"'caf\udce9'")]


def test_numbers_in_csv_are_numbers_or_complained_of(tmp_path):
    lines = ["prompt,steps,guidance,seed", "a, 20 ,1e1,9223372036854775807", "b,20.0,.5,", "c,1_0,x,0x"]
    path = text(tmp_path / "m.csv", "\n".join(lines))
    manifest = Manifest.read(path)
    assert cells(manifest, "steps") == [20, 20, None]
    assert cells(manifest, "guidance") == [10.0, 0.5, None]
    assert cells(manifest, "seed") == [2**63 - 1, None, None]
    assert [error.given for error in manifest.errors] == ["'1_0'", "'x'", "'0x'"]


def test_more_than_twenty_complaints_are_summarised(tmp_path):
    uri = parquet(tmp_path / "m.parquet", prompt=["a"] * 50_000, steps=[0] * 50_000, seed=[-1] * 25_000 + [1] * 25_000)
    error = ManifestError(uri, Manifest.read(uri).errors)
    lines = str(error).splitlines()
    assert "75,000 errors" in lines[0]
    assert len(lines) == 1 + 20 + 1 + 2 + 1
    assert "74,980 more" in lines[21]
    assert "49,990 x steps: a whole number from 1 to 1000" in lines[22]
    said = json.loads(json.dumps(error.errors.as_json()))
    assert said["count"] == 75_000 and len(said["first"]) == 20


def test_complaints_about_several_files_name_the_file_and_its_row(tmp_path):
    parquet(tmp_path / "a.parquet", prompt=["a", "b"])
    parquet(tmp_path / "b.parquet", prompt=["a", None])
    [error] = Manifest.read(str(tmp_path)).errors
    assert str(error).startswith(f"row 3 ({tmp_path / 'b.parquet'}, row 1), prompt: got nothing")


def test_rows_set_aside_have_ids_of_their_own(tmp_path):
    ids = ["x", "x", "../x", "row 1"]
    manifest = Manifest.read(parquet(tmp_path / "m.parquet", prompt=["a", "b", "c", None], id=ids))
    rows = list(manifest.invalid_rows(manifest.errors))
    assert [(row.row, row.id, row.prompt) for row in rows] == \
        [(1, "invalid row 1", "b"), (2, "invalid row 2", "c"), (3, "row 1", None)]
    assert rows[0].error == "id: got 'x', the id of row 0; allowed: an id that no other row has"


@given(st.text())
def test_what_is_shown_never_commands_a_terminal(value):
    assert shown(value).isprintable()
    assert len(shown(value)) < 700


def test_every_text_type_of_parquet_is_a_prompt(tmp_path):
    values = ["a red circle", "круг"]
    kinds = [pa.array(values, kind) for kind in (pa.string(), pa.large_string(), pa.string_view())]
    kinds += [pa.array(values).dictionary_encode(), pa.array([value.encode() for value in values])]
    for number, prompts in enumerate(kinds):
        manifest = Manifest.read(parquet(tmp_path / f"{number}.parquet", prompt=prompts))
        assert cells(manifest, "prompt") == values and not len(manifest.errors)


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.int16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64(),
                                  pa.float16(), pa.float32(), pa.float64(), pa.decimal128(22, 2)])
def test_every_number_type_of_parquet_is_read(tmp_path, kind):
    manifest = Manifest.read(parquet(tmp_path / "m.parquet", prompt=["a", "b"], steps=pa.array([20, None]).cast(kind),
                                     guidance=pa.array([7, None]).cast(kind)))
    assert cells(manifest, "steps") == [20, None] and cells(manifest, "guidance") == [7.0, None]
    assert manifest.table.schema.types == list(COLUMN_TYPES.values())


def test_ids_default_to_the_content_and_may_be_numbers(tmp_path):
    a, b = ids = cells(Manifest.read(parquet(tmp_path / "a.parquet", prompt=["a", "b"])), "id")
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in ids) and a != b
    assert cells(Manifest.read(parquet(tmp_path / "b.parquet", prompt=["a", "b"], id=[70, None])), "id") == ["70", b]
    lines = '{"prompt": "a", "id": 70}\n{"prompt": "b"}'
    manifest = Manifest.read(text(tmp_path / "c.jsonl", lines))
    assert cells(manifest, "id") == ["70", b] and cells(manifest.numbered(), "id") == ["70", "1"]


def test_a_made_id_is_the_hash_of_what_each_cell_says_and_counts_equal_rows(tmp_path):
    said = {"prompt": ["夜 \U0001f600", "a", "a", "a", "a"], "seed": [None, -0, 0, None, None],
            "guidance": [None, -0.0, 0.0, 1e-7, None], "audio": [True, None, None, False, None], "samples": [3] * 5}
    texts = ["prompt 3 夜 \U0001f600audio 4 True", "prompt 1 aseed 1 0guidance 3 0.0",
             "prompt 1 aguidance 5 1e-07audio 5 False", "prompt 1 a"]
    first, second, third, last = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
    manifest = Manifest.read(parquet(tmp_path / "m.parquet", **said))
    assert cells(manifest, "id") == [first, second, f"{second}-1", third, last]
    nothing = Manifest.read(parquet(tmp_path / "n.parquet", prompt=pa.nulls(2, pa.string())))
    assert cells(nothing, "id") == ["0" * 16, "0" * 16 + "-1"]


def test_ids_may_have_slashes_spaces_and_any_script(tmp_path):
    ids = ["scene 1/shot 2", "夜/カット.1", "a..b", "...", "👩‍🚀"]
    assert not len(Manifest.read(parquet(tmp_path / "m.parquet", prompt=["a"] * 5, id=ids)).errors)


def test_the_prompt_limit_counts_bytes(tmp_path):
    uri = parquet(tmp_path / "m.parquet", prompt=["é" * (MAX_PROMPT_BYTES // 2), "é" * (MAX_PROMPT_BYTES // 2) + "e"])
    assert [error.row for error in Manifest.read(uri).errors] == [1]


def test_user_columns_keep_their_types(tmp_path):
    tags = pa.array([["a"], None], pa.list_(pa.string()))
    labels, uuids = pa.array(["x", "y"]).dictionary_encode(), pa.array([b"0" * 16] * 2, pa.uuid())
    manifest = Manifest.read(parquet(tmp_path / "m.parquet", prompt=["a", "b"], tags=tags, nothing=pa.nulls(2),
                                     label=labels, uuid=uuids))
    assert manifest.user.to_pydict() == {"user.tags": [["a"], None], "user.nothing": [None, None],
                                         "user.label": ["x", "y"], "user.uuid": [b"0" * 16] * 2}
    assert manifest.user.schema.types[:3] == [tags.type, pa.large_string(), pa.string()]


def test_user_columns_of_json_keep_what_they_say(tmp_path):
    rows = [{"prompt": "a", "n": 1, "x": 1, "mixed": 1, "tags": ["a"]},
            {"prompt": "b", "n": 2, "x": 1.5, "mixed": "1", "flag": True}]
    manifest = Manifest.read(text(tmp_path / "m.jsonl", "\n".join(map(json.dumps, rows))))
    assert manifest.user.to_pydict() == {"user.n": [1, 2], "user.x": [1.0, 1.5], "user.mixed": ["1", '"1"'],
                                         "user.tags": ['["a"]', None], "user.flag": [None, True]}


def test_user_columns_that_change_their_type_late_are_json_throughout(tmp_path):
    rows = [{"prompt": "a", "late": "text"}] * ROWS_PER_BLOCK + [{"prompt": "a", "late": 7, "new": 1}]
    manifest = Manifest.read(text(tmp_path / "m.jsonl", "\n".join(map(json.dumps, rows))))
    assert manifest.user["user.late"][0].as_py() == '"text"' and manifest.user["user.late"][-1].as_py() == "7"
    assert manifest.user["user.new"].null_count == ROWS_PER_BLOCK


def test_user_columns_of_csv_are_text_as_written(tmp_path):
    manifest = Manifest.read(text(tmp_path / "m.csv", "\ufeff,prompt,zip\n0,a,00501\n1,b,\n"))
    assert manifest.user.to_pydict() == {"user.column_0": ["0", "1"], "user.zip": ["00501", None]}


def test_a_folder_is_read_in_order_of_name_and_without_hidden_files(tmp_path):
    text(tmp_path / "b.csv", "prompt\nthird\n")
    parquet(tmp_path / "a.parquet", prompt=["first", "second"], tag=[1, 2])
    text(tmp_path / "c.jsonl", '{"prompt": "fourth", "steps": 9}')
    text(tmp_path / "_SUCCESS", "")
    text(tmp_path / ".a.parquet.crc", "x")
    text(tmp_path / "README.md", "x")
    manifest = Manifest.read(str(tmp_path))
    assert cells(manifest, "prompt") == ["first", "second", "third", "fourth"]
    assert cells(manifest.numbered(), "id") == ["0", "1", "2", "3"] and len({*cells(manifest, "id")}) == 4
    assert cells(manifest, "steps") == [None, None, None, 9]
    assert manifest.user.to_pydict() == {"user.tag": [1, 2, None, None]}
    assert manifest.notes == [f"not read, no format of ours: {tmp_path / 'README.md'}"]


def test_a_glob_takes_what_it_matches(tmp_path):
    for name in ("a/1.csv", "b/2.csv", "b/c/3.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text(tmp_path / name, f"prompt\n{name}\n")
    assert cells(Manifest.read(f"{tmp_path}/*/*.csv"), "prompt") == ["a/1.csv", "b/2.csv"]
    assert cells(Manifest.read(f"{tmp_path}/**/*.csv"), "prompt") == ["a/1.csv", "b/2.csv", "b/c/3.csv"]
    assert "no such file" in refused(f"{tmp_path}/*.parquet")
    (tmp_path / "empty").mkdir()
    assert "a folder without a file in it" in refused(str(tmp_path / "empty"))


@pytest.mark.parametrize("one, other, expected", [
    ([1], ["x"], ["1", "x"]), ([True], [1.5], ["true", "1.5"]), ([b"a\xff"], [1], ["a\\xff", "1"]),
    ([["a"]], ["x"], ['["a"]', "x"]), ([{"a": 1}], [[2]], ['{"a": 1}', "[2]"]), ([2**53 + 1], [0.5], None),
    ([Decimal("1.50")], ["x"], ["1.50", "x"]),
])
def test_user_columns_on_which_files_do_not_agree_are_text_and_two_files_are_named(tmp_path, one, other, expected):
    parquet(tmp_path / "a.parquet", prompt=["a"], tag=one)
    parquet(tmp_path / "b.parquet", prompt=["a"], tag=other)
    parquet(tmp_path / "c.parquet", prompt=["a"])
    manifest = Manifest.read(str(tmp_path))
    assert manifest.user["user.tag"].to_pylist() == [*(expected or ["9007199254740993", "0.5"]), None]
    [note] = manifest.notes
    assert "'tag'" in note and "a.parquet" in note and "b.parquet" in note and "as text" in note


def test_the_digest_follows_the_content_and_not_the_place(tmp_path):
    def digest(folder: str, *contents: str) -> str:
        for number, content in enumerate(contents):
            (tmp_path / folder).mkdir(exist_ok=True)
            text(tmp_path / folder / f"{number}.csv", content)
        return Manifest.read(str(tmp_path / folder)).digest

    assert digest("a", "prompt\na\n", "prompt\nb\n") == digest("b", "prompt\na\n", "prompt\nb\n")
    assert digest("a") != digest("c", "prompt\na\n", "prompt\nc\n")


def test_a_bucket_is_read_like_a_folder(s3_bucket):
    from dailies.pipeline.store import open_store
    store = open_store(s3_bucket)
    for name in ("night/a.csv", "night/b.csv", "night/sub/c.csv", "night/_d.csv", "night/style=a b/e.csv",
                 "night/notes.md"):
        store.put(name, f"prompt,seed\n{name},x\n".encode())
    assert cells(Manifest.read(f"{s3_bucket}/night/a.csv"), "prompt") == ["night/a.csv"]
    for uri in (f"{s3_bucket}/night", f"{s3_bucket}/night/", f"{s3_bucket}/night".replace("s3://", "s3a://")):
        manifest = Manifest.read(uri)
        assert cells(manifest, "prompt") == ["night/a.csv", "night/b.csv", "night/style=a b/e.csv", "night/sub/c.csv"]
        assert manifest.user["user.style"].to_pylist() == [None, None, "a b", None]
        [note] = manifest.notes
        assert note.endswith("/night/notes.md")
    assert cells(Manifest.read(f"{s3_bucket}/*/b*.csv"), "prompt") == ["night/b.csv"]
    assert cells(Manifest.read(f"{s3_bucket}/**/*.csv"), "prompt") == [
        "night/a.csv", "night/b.csv", "night/style=a b/e.csv", "night/sub/c.csv"]
    assert "no such file" in refused(f"{s3_bucket}/night/nope.parquet")
    [error] = Manifest.read(f"{s3_bucket}/night/a.csv").errors
    assert error.given == "'x'"


FILLERS = "\u115f\u1160\u2800\u3164\uffa0\ufffc\U0001d159"           # letters and symbols that show nothing
PROMPTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
    lambda prompt: any(unicodedata.category(char)[0] in "LNPS" and char not in FILLERS for char in prompt))
ROWS = st.lists(st.fixed_dictionaries({"prompt": PROMPTS}, optional={
    "seed": st.integers(0, 2**63 - 1), "steps": st.integers(1, 1000), "guidance": st.floats(0, 100),
    "priority": st.integers(-2**31, 2**31 - 1)}), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_every_format_says_the_same(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("formats")
    names = ["prompt", "seed", "steps", "guidance", "priority"]
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), folder / "m.parquet")
    text(folder / "m.jsonl", "\n".join(map(json.dumps, rows)))
    sheet = io.StringIO(newline="")
    writer = csv.DictWriter(sheet, names)
    writer.writeheader()
    writer.writerows(rows)
    text(folder / "m.csv", sheet.getvalue())
    tables = [Manifest.read(str(folder / f"m.{suffix}")).table for suffix in ("parquet", "jsonl", "csv")]
    assert tables[0].select(names).to_pylist() == [{name: row.get(name) for name in names} for row in rows]
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
