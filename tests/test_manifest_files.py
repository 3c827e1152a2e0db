"""Manifests as they lie around: public prompt sets, folders of all sorts, other programs' names, packed, broken."""

import bz2
import gzip
import io
import json
import lzma
import os
import ssl
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dailies.pipeline.manifest import cells as manifest_cells
from dailies.pipeline.manifest import raw_bytes as manifest_bytes
from dailies.pipeline.manifest import text as manifest_text
from dailies.pipeline.manifest.columns import COLUMN_NAMES, nearly
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.manifest.validation import ManifestError


def written(path: Path, content: str | bytes | list | dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(content) if isinstance(content, (list, dict)) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def prompts(uri, **answers) -> list:
    return Manifest.read(uri, **answers).table["prompt"].to_pylist()


def refused(uri, **answers) -> str:
    with pytest.raises(ManifestError) as caught:
        Manifest.read(uri, **answers)
    return str(caught.value)


# The formats of public prompt sets, with rows of our own: name, content, how its columns are mapped, the first prompt.
QUOTED = 'A wall on which "wet paint" is written, at dusk.'
PUBLIC = {
    "VBench": ("VBench_full_info.json", [
        {"prompt_en": QUOTED, "dimension": ["temporal_flickering"]},
        {"prompt_en": "b", "dimension": ["color"], "auxiliary_info": {"color": {"object": "a bus"}}}], "prompt_en"),
    "VBench, a prompt per line": ("all_dimension.txt", f"{QUOTED}\nb, of glass \n", None),
    "VBench, long prompts": ("all_dimension_longer.txt", f"{QUOTED}\r\n\r\nb\r\n", None),
    "VBench, image to video": ("vbench2_i2v_full_info.json", [
        {"prompt_en": QUOTED, "dimension": ["i2v_background"], "image_type": "abstract", "image_name": "x.jpg"},
        {"prompt_en": "b", "dimension": ["camera_motion"], "image_type": "abstract"}], "prompt_en"),
    "VBench-2.0": ("VBench2_full_info.json", json.dumps([
        {"prompt_en": QUOTED, "dimension": ["Camera_Motion"], "auxiliary_info": "zoom_in"},
        {"prompt_en": "b", "dimension": ["Plot"], "auxiliary_info": ["first", "then"]}], indent=4), "prompt_en"),
    "VBench-2.0, a prompt per line": ("Camera_Motion.txt", f"{QUOTED}\nb\n", None),
    "VBench-2.0, in Chinese": ("VBench2_full_text_ch.txt", f"{QUOTED}\n花园，镜头拉近。\n", None),
    "MovieGen video": ("MovieGenVideoBench.txt", f"{QUOTED}\nb\n", None),
    "MovieGen video with tags": ("MovieGenVideoBenchWithTag.csv", "prompt,concept,motion_level\n"
                                 '"A wall on which ""wet paint"" is written, at dusk.",scene,low\n'
                                 'b,"scene,camera motion",high\n', None),
    "MovieGen audio": ("MovieGenAudioBenchSfx.jsonl", "".join(json.dumps(row) + "\n" for row in [
        {"id": 0, "video_prompt": QUOTED, "audio_prompt": "drops"},
        {"id": 1, "video_prompt": "b", "audio_prompt": "steps"}]), "video_prompt"),
    "T2V-CompBench": ("action_binding.json", json.dumps([
        {"prompt": QUOTED, "phrase_0": ["a wall?"], "phrase_1": ["paint?"]},
        {"prompt": "b", "phrase_0": ["b?"], "phrase_1": []}], indent=4), None),
    "T2V-CompBench, a prompt per line": ("4_motion_binding.txt", f"{QUOTED}\nb \n", None),
    "EvalCrafter": ("metadata.json", json.dumps({
        "0000": {"prompt": QUOTED, "attributes": {"count": "2 dogs"}}, "0001": {"prompt": "b", "attributes": {}}},
        indent=4), None),
    "EvalCrafter, a prompt per line": ("evalcrafter_prompt.txt", f"{QUOTED} \nb\n", None),
    "Open-Sora": ("sora.csv", 'text\n"A wall on which ""wet paint"" is written, at dusk."\nb\n', "text"),
    "Open-Sora, image to video": ("i2v.csv", 'text,ref\n"A wall on which ""wet paint"" is written, at dusk.",x.png\n'
                                  "b,y.png\n", "text"),
    "PartiPrompts": ("PartiPrompts.tsv", f"Prompt\tCategory\tChallenge\tNote\n{QUOTED}\tOutdoor Scenes\tComplex\t\n"
                     '"b" is what the sign says\tArtifacts\tBasic\tas it is\nc, open "\tArts\tBasic\t"\n', "Prompt"),
    "TurboDiffusion": ("prompts.txt", f"{QUOTED}\nb", None),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_prompt_sets_are_read_as_they_come(name, tmp_path):
    file, content, column = PUBLIC[name]
    path = written(tmp_path / file, content)
    if column:
        said = refused(path)
        assert f"--map {column}=prompt" in said and said.count("--map") == 2
    manifest = Manifest.read(path, mapping={column: "prompt"} if column else {})
    found = manifest.table["prompt"].to_pylist()
    assert found[0] == QUOTED and len(found) >= 2 and not len(manifest.errors)
    assert None not in manifest.table["id"].to_pylist()
    if name == "EvalCrafter":
        assert manifest.table["id"].to_pylist() == ["0000", "0001"]
    if name == "PartiPrompts":
        assert found[1:] == ['"b" is what the sign says', 'c, open "']


# Columns that are nearly ours.

def test_the_names_are_those_of_the_cells():
    assert tuple(manifest_cells.COLUMN_TYPES) == COLUMN_NAMES and not any(map(nearly, COLUMN_NAMES))


@pytest.mark.parametrize("name, ours", [
    ("Seed", "seed"), (" seed", "seed"), ("ｓｅｅｄ", "seed"), ("num_frames", "frames"), ("frame_num", "frames"),
    ("numFrames", "frames"), ("num-inference-steps", "steps"), ("sample_steps", "steps"),
    ("guidance_scale", "guidance"), ("cfg", "guidance"), ("sample_guide_scale", "guidance"), ("guidence", "guidance"),
    ("caption", "prompt"),
    ("Negative Prompt", "negative_prompt"), ("promt", "prompt"), ("framse", "frames"), ("duration", "duration_s"),
    ("size", "resolution"), ("image_path", "image"), ("base_seed", "seed"), ("step", "steps"),
    ("speed", None), ("style", None), ("note", None), ("prompt_2", None), ("category", None), ("text_len", None)])
def test_a_name_is_near_the_one_that_it_is_another_spelling_word_or_slip_for(name, ours):
    assert nearly(name) == ours


def test_a_column_nearly_ours_is_asked_about_and_the_answer_is_taken(tmp_path):
    path = written(tmp_path / "m.csv", "prompt,num_frames,Seed,fps,mood\na,9,7,24,x\n")
    said = refused(path)
    assert "Did you mean frames? (--map num_frames=frames, or --map num_frames= to carry it along)" in said
    assert "--map Seed=seed" in said and "--map fps=" in said and "mood" not in said and "--skip-invalid" not in said
    manifest = Manifest.read(path, mapping={"num_frames": "frames", "Seed": "", "fps": ""})
    assert manifest.table["frames"].to_pylist() == [9] and manifest.table["seed"].to_pylist() == [None]
    assert manifest.user.to_pydict() == {"user.Seed": ["7"], "user.fps": ["24"], "user.mood": ["x"]}
    assert Manifest.read(path, mapping={"num_frames": "", "Seed": "", "fps": ""}).digest != manifest.digest


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_every_format_asks_and_maps_alike(suffix, tmp_path):
    rows = [{"caption": "a", "STEPS": 3, "prompt": "other"}]
    path = tmp_path / f"m.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        written(path, "caption,STEPS,prompt\na,3,other\n" if suffix == "csv" else json.dumps(rows[0]))
    assert "Did you mean steps?" in refused(path.as_posix())
    answers = {"caption": "prompt", "STEPS": "steps", "prompt": ""}
    manifest = Manifest.read(str(path), mapping=answers)
    assert manifest.table.select(["prompt", "steps"]).to_pylist() == [{"prompt": "a", "steps": 3}]
    assert manifest.user.to_pydict() == {"user.prompt": ["other"]}
    assert "'caption' and 'prompt' for prompt" in refused(str(path), mapping={"caption": "prompt", "STEPS": ""})
    assert "none is called 'captoin'" in refused(str(path), mapping=answers | {"captoin": ""})


def test_another_word_is_no_question_where_ours_is_there(tmp_path):
    path = written(tmp_path / "m.csv", "prompt,text,frames,num_frames,duration\na,b,9,9,1\n")
    assert len(Manifest.read(path).user.column_names) == 3


# Folders.

def test_a_folder_is_read_whole_and_what_is_not_is_named(tmp_path):
    written(tmp_path / "a.csv", "prompt\na\n")
    written(tmp_path / "b.jsonl.gz", gzip.compress(b'{"prompt": "b"}\n'))
    written(tmp_path / "c.json", ["c"])
    written(tmp_path / "d.txt", "d\n")
    written(tmp_path / "2026" / "deep" / "e.jsonl", '{"prompt": "e"}\n')
    for name in ("_SUCCESS", ".part.parquet.crc", "_temporary/x.csv", ".git/x.csv", "images/x.png", "images/y.JPG"):
        written(tmp_path / name, "x")                   # of Spark and others, and first frames: nobody misses them
    assert prompts(str(tmp_path)) == ["e", "a", "b", "c", "d"] and not Manifest.read(str(tmp_path)).notes
    secret = written(tmp_path.parent / "secret.txt", "key\n")
    (tmp_path / "link.txt").symlink_to(secret)
    for name in ("README.txt", "notes.docx", "out/run.json", "out/ledger/1.parquet"):
        written(tmp_path / name, "x")
    manifest = Manifest.read(str(tmp_path))
    assert manifest.table.num_rows == 5
    said = "\n".join(manifest.notes)
    assert all(name in said for name in ("README.txt", "notes.docx", "link.txt", "/out")) and ".crc" not in said
    written(tmp_path / "f.xlsx", "x")
    assert "data of formats that are not read" in refused(str(tmp_path)) and "f.xlsx" in refused(str(tmp_path))


def test_a_glob_leaves_its_folder_by_no_link_and_is_not_led_in_circles(tmp_path):
    written(tmp_path / "private/a.jsonl", '{"prompt": "not for the night"}')
    written(tmp_path / "night/1/a.jsonl", '{"prompt": "a"}')
    for name, place in (("2", "../private"), ("round", "."), ("and-round", ".")):
        (tmp_path / "night" / name).symlink_to(place)
    for pattern in ("night/*/a.jsonl", "night/**/*.jsonl", "night/**/a.jsonl", "night/**", "night/1/**/a.jsonl"):
        assert prompts(str(tmp_path / pattern)) == ["a"], pattern
    assert "links that lead out of the folder" in str(Manifest.read(str(tmp_path / "night/*/a.jsonl")).notes)


@pytest.mark.parametrize("pattern", ["night", "night/**/*.jsonl"])
def test_folders_of_any_depth_are_refused_with_a_sentence(pattern, tmp_path):
    written(tmp_path / "night/a.jsonl", '{"prompt": "a"}')
    (tmp_path / "night" / "/".join("d" * 31)).mkdir(parents=True)
    assert prompts(str(tmp_path / pattern)) == ["a"]
    folder = os.open(tmp_path / "night", os.O_RDONLY)
    for _ in range(1500):                               # a path of all of them would be too long
        with suppress(FileExistsError):
            os.mkdir("d", dir_fd=folder)
        inner = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    assert "more than 32 deep" in refused(str(tmp_path / pattern))
    subprocess.run(["rm", "-rf", tmp_path / "night"], check=True)       # pytest cannot


def test_folders_called_name_value_are_columns(tmp_path):
    for folder, prompt in (("style=anime/m=01", "a"), ("style=a%20b/m=2", "b"),
                           ("style=__HIVE_DEFAULT_PARTITION__/m=3", "c")):
        (tmp_path / folder).mkdir(parents=True)
        pq.write_table(pa.table({"prompt": [prompt]}), tmp_path / folder / "part-0.parquet")
    files = sorted(map(str, tmp_path.rglob("*.parquet")))
    for uri in (str(tmp_path), f"{tmp_path}/**/*.parquet", f"{tmp_path}/*/*/*", files):
        rows = Manifest.read(uri)
        columns = dict(zip(rows.table["prompt"].to_pylist(),
                           zip(rows.user["user.style"].to_pylist(), rows.user["user.m"].to_pylist(), strict=True),
                           strict=True))
        assert columns == {"a": ("anime", 1), "b": ("a b", 2), "c": (None, 3)}
    assert rows.user.schema.field("user.m").type == pa.int32()
    [note] = Manifest.read(f"{tmp_path}/style=anime").notes or [""]
    assert note == "" and "style=anime" in Manifest.read(f"{tmp_path}/style=anime/m=01/part-0.parquet").notes[0]


def test_a_folders_column_may_be_ours_and_a_files_own_counts(tmp_path):
    written(tmp_path / "frames=9" / "Seed=7" / "a.csv", "prompt,frames\na,5\nb,\n")
    written(tmp_path / "frames=x" / "Seed=7" / "b.csv", "prompt\nc\n")
    assert "--map Seed=seed" in refused(str(tmp_path))
    manifest = Manifest.read(str(tmp_path), mapping={"Seed": "seed"})
    assert manifest.table["frames"].to_pylist() == [5, None, None] and manifest.table["seed"].to_pylist() == [7, 7, 7]
    assert [(each.row, each.column) for each in manifest.errors] == [(2, "frames")]
    assert "of its own, which counts" in manifest.notes[0]


# CSV.

def test_a_quote_that_nothing_closes_costs_its_line_alone(tmp_path):
    def rows(content: str, name: str = "m.csv"):
        manifest = Manifest.read(written(tmp_path / name, content))
        bad = [(each.row, each.given.split(" (")[0]) for each in manifest.errors]
        return manifest.table.num_rows, bad, manifest.notes

    good = "".join(f"a prompt {n},{n}\n" for n in range(3, 30))
    assert rows(f'prompt,seed\na one,1\n"a two,2\n{good}') == (29, [(1, "line 3")], [])
    assert rows(f'prompt,seed\n"a two,2\n{good}"quoted, well",40\n') == (29, [(0, "line 2")], [])
    assert rows(f'prompt,seed\n"a two,2\n{good}a disk of 5",40\n') == (29, [(0, "line 2")], [])    # closed far below
    assert rows('prompt,seed\n"a two,2\na disk of 5",40\n') == (2, [(0, "line 2")], [])
    tall, bad, notes = rows('prompt,seed\n"one\n\ntwo, three",2\nb,3\n')
    assert (tall, bad) == (2, []) and "1 row goes over several lines: the first from line 2" in notes[0]
    assert rows('prompt\tnote\n"open\tx\nb\ty\n', "m.tsv") == (2, [], [])           # between tabs it is a character


@pytest.mark.parametrize("content", [
    "prompt;seed\na, b;1\n", "prompt;n\na, b;1\n", "sep=;\nprompt;seed\na, b;1\n", "prompt\tseed\na, b\t1\n",
    "prompt|seed\na, b|1\n",
    '"prompt","seed"\r\n"a, b","1"\r\n', 'text;note\na, b;1\n'])
def test_what_stands_between_cells_is_seen_in_the_header(content, tmp_path):
    mapping = {"text": "prompt"} if content.startswith("text") else {}
    assert prompts(written(tmp_path / "m.csv", content), mapping=mapping) == ["a, b"]


# JSON and text.

@pytest.mark.parametrize("content, found", [
    (["a", {"prompt": "b"}], ["a", "b"]), ({"version": 1, "data": [{"prompt": "a"}]}, ["a"]),
    ({"x": {"prompt": "a"}, "y": {"prompt": "b"}}, ["a", "b"]), ({"prompt": "a", "tags": ["x"]}, ["a"]),
    ('{"prompt": "a"}\n{"prompt": "b"}\n', ["a", "b"]), ('\n[ "a"\n,"b"]\n', ["a", "b"]),
    ('{\n"prompt": "a"\n}', ["a"])])
def test_rows_are_found_in_json_of_many_shapes(content, found, tmp_path):
    assert prompts(written(tmp_path / "m.json", content)) == found


@pytest.mark.parametrize("content, message", [
    ({"prompt": ["a", "b"], "seed": [1, 2]}, "orient='records'"), ({"prompt": {"0": "a"}}, "orient='records'"),
    ("3", "holds no rows"), ('["a", "b"', "ends without its bracket"), ('["a" "b"]', "broken in line 1"),
    ('["a"] x', "more behind it"), ("[" * 100_000, "nested too deeply"), ('{"a":' * 100_000, "nested too deeply"),
    ('["a",\n\n{"prompt": tru}]', "broken in line 3"), ("", "an empty file"), ("[]", "no row"),
    ("null", "holds no rows")])
def test_json_without_rows_is_refused_with_what_is_allowed(content, message, tmp_path):
    assert message in refused(written(tmp_path / "m.json", content))


def test_an_item_that_is_no_row_costs_one(tmp_path):
    manifest = Manifest.read(written(tmp_path / "m.json", ["a", 3, None, "b"]))
    assert [each.row for each in manifest.errors] == [1, 2] and manifest.table.num_rows == 4


def test_blank_lines_of_text_are_counted_and_a_header_is_not_a_prompt(tmp_path):
    manifest = Manifest.read(written(tmp_path / "m.txt", "\ufeff a cat \r\n\r\n \nb\n"))
    assert manifest.table["prompt"].to_pylist() == ["a cat", "b"] and "2 blank lines" in manifest.notes[0]
    for header in ("prompt", "Prompt", "prompt,seed", "caption\tseed"):
        assert "names columns" in refused(written(tmp_path / "m.txt", f"{header}\na\n"))
    assert prompts(written(tmp_path / "m.txt", "text\ncat, text\n")) == ["text", "cat, text"]


@pytest.mark.parametrize("invisible", ["\u200b", "\ufeff\u2060", "\u3164", "\u2800 ", "\u00ad", "\u202e\u200f",
                                       "\u0301", "\ue000", "\U000e0041", "\u034f\ufe0f", "\u180e\u115f", "\x1b\x07"])
def test_a_prompt_of_which_nothing_is_seen_is_blank(invisible, tmp_path):
    manifest = Manifest.read(written(tmp_path / "m.jsonl", json.dumps({"prompt": invisible}) + '\n{"prompt": "é👩‍🚀"}'))
    assert [(each.row, each.column) for each in manifest.errors] == [(0, "prompt")]


# Compressed, and traps.

PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress,
           "zst": lambda data: pa.Codec("zstd").compress(data).to_pybytes()}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_are_read_and_damaged_ones_named(suffix, tmp_path):
    pack, rows = PACKERS[suffix], b'{"prompt": "a"}\n' * 1000
    assert len(prompts(written(tmp_path / f"m.jsonl.{suffix}", pack(rows) + pack(rows)))) == 2000
    assert len(prompts(written(tmp_path / "m.jsonl", pack(rows)))) == 1000         # whatever it is called
    assert "m.jsonl." in refused(written(tmp_path / f"m.jsonl.{suffix}", pack(rows)[:-4]))
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a"]}), sink)
    assert prompts(written(tmp_path / f"m.parquet.{suffix}", pack(sink.getvalue()))) == ["a"]


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_small_file_that_unfolds_without_end_is_refused(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_bytes, "FREELY", 1 << 16)
    for content in (b"\n" * (1 << 20), b"x" * (1 << 20)):
        for name in ("m.txt", "m.csv", "m.jsonl", "m.json", "m.parquet"):
            assert "times its size" in refused(written(tmp_path / f"{name}.{suffix}", PACKERS[suffix](content)))


@pytest.mark.parametrize("beginning, message", [
    (b"PK\x03\x04", "ZIP archive"), (b"ARROW1\0\0", "Arrow file"), (b"\x89PNG\r\n", "an image"), (b"Obj\x01", "Avro")])
def test_what_is_no_manifest_is_told_what_it_is(beginning, message, tmp_path):
    assert message in refused(written(tmp_path / "m.csv", beginning + b"x" * 100))


AMPLIFIED = {
    "one line of empty objects": ("m.jsonl", b'{"prompt":"a","x":[' + b"{}," * 7_000_000 + b"{}]}\n"
                                  + b'{"prompt": "b"}\n'),
    "many lines of empty objects": ("m.jsonl", (b'{"prompt":"a","x":[' + b"{}," * 300_000 + b"{}]}\n") * 20),
    "an object of empty objects": ("m.json", b'{"x":[' + b"{}," * 7_000_000 + b"{}]}"),
    "a list of a long item": ("m.json", b'["b",[' + b"{}," * 7_000_000 + b"{}]]"),
    "a line of commas": ("m.csv", b"prompt,x\nb,\n" + b"," * 20_000_000 + b"\n"),
    "a line of text": ("m.txt", b"b\n" + b"a " * 10_000_000),
}


@pytest.mark.parametrize("what", AMPLIFIED)
def test_text_is_bounded_before_it_becomes_objects(what, tmp_path):
    """20 MB of one line took 600 MB. In a process of its own, which may take little more than it does to begin with."""
    name, content = AMPLIFIED[what]
    path = written(tmp_path / name, content)
    script = f"""
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.manifest.validation import ManifestError
def at_most():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = at_most()
try:
    print(Manifest.read({path!r}).table.num_rows, end=" ")
except ManifestError:
    print("refused", end=" ")
print(at_most() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    rows, kilobytes = done.stdout.split()
    assert int(kilobytes) < 330_000, done.stdout
    assert rows in ("refused", "2", "20")


def test_a_list_may_be_longer_than_what_is_held_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_text, "BLOCK_CHARACTERS", 1000)
    rows = [{"prompt": f"a fox {n}", "n": n, "x": 1.5} for n in range(3000)]
    for content in (json.dumps(rows), json.dumps(rows, indent=2)):
        manifest = Manifest.read(written(tmp_path / "m.json", content))
        assert manifest.user["user.n"].to_pylist() == list(range(3000))
        assert manifest.table["prompt"][2999].as_py() == "a fox 2999"


def test_a_file_of_nothing_but_broken_lines_is_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_text, "MAX_BROKEN", 100)
    for name, content in (("m.jsonl", "x\n" * 1000), ("m.csv", "prompt,a\n" + "x\n" * 1000), ("m.json", [1] * 1000)):
        monkeypatch.setattr(manifest_text, "ROWS_PER_BLOCK", 200)
        assert "more than 100 broken rows" in refused(written(tmp_path / name, content))


def test_what_can_be_read_but_not_be_written_again_costs_its_row(tmp_path):
    lines = [json.dumps({"prompt": "a"})[:-1] + f', "x": {"[" * depth}{"]" * depth}}}'
             for depth in (1, 300, 700, 900, 990)]
    manifest = Manifest.read(written(tmp_path / "m.jsonl", "\n".join(lines)))
    assert manifest.table.num_rows == 5
    assert {each.row for each in manifest.errors} <= {2, 3, 4}


def test_a_name_that_is_there_twice_or_is_no_text_costs_its_row(tmp_path):
    lines = ['{"prompt": "a", "prompt": "b"}', '{"prompt": "c", "x": {"prompt": 1, "y": [{"y": 2}]}}',
             '{"\\ud800": 1, "prompt": "d"}', '{"prompt": "\\": ", "n": 1}', '{"x": 1, "x": 2, "prompt": "e"}', "[1]"]
    manifest = Manifest.read(written(tmp_path / "m.jsonl", "\n".join(lines)))
    assert [each.row for each in manifest.errors] == [0, 2, 4, 5]
    assert [each for each in manifest.table["prompt"].to_pylist() if each] == ["c", '": ']
    assert "'prompt' is there twice" in manifest.errors.first()[0].given


def test_a_header_of_many_names_is_refused(tmp_path):
    names = ",".join(f"a{n}" for n in range(10**5))
    assert "100,001 names of columns" in refused(written(tmp_path / "m.csv", f"prompt,{names}\n"))


# Typed, piped, fetched.

def test_prompts_are_rows_without_a_file():
    manifest = Manifest.read(prompts=["a fox", 'an "owl"'])
    assert manifest.table["prompt"].to_pylist() == ["a fox", 'an "owl"'] and manifest.name == "--prompt"
    assert manifest.digest == Manifest.read(prompts=["a fox", 'an "owl"']).digest


@pytest.mark.parametrize("content, found, note", [
    (b"a fox\nan owl\n", ["a fox", "an owl"], "a prompt per line"), (b"prompt,mood\na fox,x\n", ["a fox"], "CSV"),
    (b'{"prompt": "a fox"}\n{"prompt": "an owl"}\n', ["a fox", "an owl"], "JSON"), (b'["a fox"]', ["a fox"], "JSON"),
    (gzip.compress(b"a fox\n", mtime=0), ["a fox"], "a prompt per line"),
    ("a fox\n".encode("utf-16"), ["a fox"], "per line")])
def test_stdin_is_read_in_the_format_that_its_beginning_shows(content, found, note, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    manifest = Manifest.read("-")
    assert manifest.table["prompt"].to_pylist() == found and note in manifest.notes[0]


def test_several_files_are_one_manifest(tmp_path):
    paths = [written(tmp_path / name, content) for name, content in (("b.txt", "b\n"), ("a.csv", "prompt\na\n"))]
    assert prompts(paths) == ["b", "a"]                 # in the order in which they are named
    assert "named twice" in refused([paths[0], paths[0]])


@pytest.mark.parametrize("uri, message", [
    ("s3n://b/x.csv", "not 's3n'://"), ("gs://b/x.csv", "not 'gs'://"), ("http://h/x.csv", "not 'http'://"),
    ("https://user:word@h/x.csv", "a password"), ("https://h/x.csv?X-Amz-Signature=a", "a signature"),
    ("https://127.0.0.1:9/x.csv", "not to be fetched")])
def test_other_addresses_are_refused_with_what_is_possible(uri, message):
    assert message in refused(uri)


def test_one_file_behind_https_is_fetched(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
                           "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
                           "-keyout", key, "-out", certificate], capture_output=True)
    if made.returncode:
        pytest.skip("openssl makes no certificate here")

    class Files(BaseHTTPRequestHandler):
        def do_GET(self):
            code, kind, body = {"/a/m%20x.csv": (200, "text/plain", b"prompt\na fox\n"),
                                "/page.csv": (200, "text/html", b"<html>"),
                                "/away.csv": (302, "text/plain", b"")}.get(self.path, (404, "text/plain", b""))
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Location", "http://localhost/x.csv")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("no_proxy", "localhost")
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"https://localhost:{server.server_port}"
        assert prompts(f"{here}/a/m%20x.csv") == ["a fox"]
        assert "a web page" in refused(f"{here}/page.csv") and "404" in refused(f"{here}/none.csv")
        assert "not https" in refused(f"{here}/away.csv")
        server.shutdown()


@pytest.mark.parametrize("name", [
    "credentials.json", "credentials (1).json", "aws-credentials.csv", "service_account.json",
    "prod-service-account-2.json",
    "client_secret_123.apps.json", "my_accessKeys.csv", "rootkey.csv", "id_rsa.txt", "tls.key.json", "server.pem.txt",
    "api-keys.jsonl", "auth.token.txt", "passwords.csv.gz", "secrets/a.csv", "aws/Credentials.TXT", "credentials.xlsx",
    "application_default_credentials.json"])
def test_a_file_called_like_keys_is_no_rows_of_a_folder_and_is_named(name, tmp_path):
    written(tmp_path / "a.csv", "prompt\na fox\n")
    path = written(tmp_path / name, '[{"prompt": "FAKE"}]')
    for given in (tmp_path, tmp_path / "**"):
        read = Manifest.read(str(given))
        assert read.table["prompt"].to_pylist() == ["a fox"]
        [note] = [note for note in read.notes if path in note]
        assert "called like keys or credentials (to read one as rows, name the file itself)" in note


@pytest.mark.parametrize("name", ["secret_garden.csv", "token_study.csv", "keys.csv", "keyboard.json", "monkey.txt",
                                  "credential_free.csv", "secret=1/a.csv", "passwordless-login.txt"])
def test_a_name_that_only_reminds_of_keys_is_read(name, tmp_path):
    content = {".json": {"prompt": "a fox"}, ".txt": "a fox\n"}.get(Path(name).suffix, "prompt\na fox\n")
    written(tmp_path / name, content)
    assert "a fox" in prompts(str(tmp_path))


def test_a_file_called_like_keys_is_read_where_it_is_named_and_alone_it_is_explained(tmp_path):
    path = written(tmp_path / "credentials.json", [{"prompt": "a fox"}])
    assert prompts(path) == ["a fox"]
    assert "name the file itself" in refused(str(tmp_path)) and path in refused(str(tmp_path))
