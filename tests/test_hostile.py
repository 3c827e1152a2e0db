"""What somebody may feed this program to break it: manifests, weights, prompts. And what it must keep to itself."""

import ast
import csv
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import within
from one_process import main
from tiny import TINY

from dailies import HOME
from dailies.actors.clip_file import read_clip, readable
from dailies.pipeline.manifest import manifest
from dailies.pipeline.manifest import parquet as manifest_parquet
from dailies.pipeline.run import ledger
from dailies.pipeline.run.layout import clip_key
from dailies.pipeline.store import open_store

HANG_S = 120


def answer(*arguments):
    """Exit code and all that was printed. An exception that leaves the program fails the test, and so does a hang."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed), within(HANG_S):
        code = main([str(argument) for argument in arguments])
    said = printed.getvalue()
    assert len(said) < 40_000 and "Traceback" not in said
    assert all(char.isprintable() or char == "\n" for char in said), repr(said)
    return code, said


# Manifests.

NAMES = ["prompt", "id", "negative_prompt", "seed", "samples", "resolution", "duration_s", "frames", "steps",
         "guidance", "image", "on_reject", "priority", "mood", "\x1b[31m", "a.b", "", " prompt"]
TEXTS = st.one_of(st.text(max_size=30), st.sampled_from([
    "a fox", "", " ", "\0", "\x1b[2J", "../../x", "/etc/passwd", "file:///etc/passwd", "http://169.254.169.254/latest",
    "1e999", "-0", "NaN", "24p", "9x9", "99999x99999", "=1+1", "'; drop table", "\u202eabc", "🦊" * 3000, "reseed"]))
CELLS = st.one_of(st.none(), TEXTS, st.booleans(), st.integers(-2**70, 2**70), st.integers(0, 9),
                  st.floats(), st.lists(st.integers(), max_size=2),
                  st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))
ARROW = [pa.string(), pa.large_string(), pa.binary(), pa.int8(), pa.int64(), pa.uint64(), pa.float32(), pa.float64(),
         pa.bool_(), pa.decimal128(20, 3), pa.date32(), pa.timestamp("ns"), pa.list_(pa.int32()), pa.null(),
         pa.dictionary(pa.int8(), pa.string())]


def bent(content, how):
    """Some bytes of a file changed, its end cut off, or both."""
    content = bytearray(content)
    for _ in range(how.randint(0, 5)):
        if content:
            content[how.randrange(len(content))] = how.randrange(256)
    return bytes(content[:how.randint(0, len(content))] if how.random() < 0.3 else content)


FITTING = {
    "prompt": st.text(st.characters(exclude_categories=["Cs"]), max_size=30).map("a fox ".__add__),
    "negative_prompt": st.just(""), "seed": st.integers(0, 2**63 - 9),
    "samples": st.integers(1, 2), "resolution": st.sampled_from(["24p", "32p", "40x24"]), "frames": st.integers(1, 9),
    "steps": st.integers(1, 2), "guidance": st.floats(0, 9), "on_reject": st.sampled_from(["fail", "reseed"]),
    "priority": st.integers(-9, 9)}


def cells_of(draw, name, count, wild):
    """A column's cells; wild: anything, in one column of three."""
    cells = CELLS if wild and draw(st.integers(0, 2)) == 0 else FITTING.get(name, TEXTS)
    return draw(st.lists(cells, min_size=count, max_size=count))


@st.composite
def manifests(draw):
    """Suffix and content of a file: rows of anything as JSON lines or CSV, columns of any type, damage, noise."""
    kind = draw(st.sampled_from(["jsonl", "csv", "parquet", "bent", "noise"]))
    wild = draw(st.booleans())
    names = draw(st.lists(st.sampled_from(NAMES if wild else list(FITTING)), min_size=1, max_size=6, unique=True))
    names = names if wild and draw(st.booleans()) else list(dict.fromkeys(["prompt", *names]))
    if kind == "noise":
        return draw(st.sampled_from([".csv", ".jsonl", ".parquet", ".tsv", ".txt"])), draw(st.binary(max_size=300))
    count = draw(st.integers(not wild, 3))
    cells = {name: cells_of(draw, name, count, wild) for name in names}
    rows = [{name: cells[name][at] for name in names} for at in range(count)]
    if kind == "jsonl" or kind == "bent" and draw(st.booleans()):
        content = "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")
        return ".jsonl", bent(content, draw(st.randoms(use_true_random=False))) if kind == "bent" else content
    if kind == "csv":
        file = io.StringIO()
        csv.writer(file).writerows([names, *([row[name] for name in names] for row in rows)])
        return ".csv", file.getvalue().encode("utf-8", "surrogatepass")
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array(cells[name], draw(st.one_of(st.none(), st.sampled_from(ARROW))))
        except (pa.ArrowException, OverflowError, TypeError, ValueError, UnicodeError):
            columns[name] = pa.array([None if cell is None else ascii(cell) for cell in cells[name]], pa.string())
    sink = io.BytesIO()
    try:
        pq.write_table(pa.table(columns), sink, use_dictionary=draw(st.booleans()),
                       row_group_size=draw(st.integers(1, 3)), compression=draw(st.sampled_from(["none", "zstd"])))
    except (pa.ArrowException, UnicodeError):
        return ".parquet", b"PAR1"
    content = sink.getvalue()
    return ".parquet", bent(content, draw(st.randoms(use_true_random=False))) if kind == "bent" else content


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_no_manifest_breaks_the_plan_or_leaves_half_a_run(count, tmp_path):
    seen = {0: 0, 2: 0}

    @settings(max_examples=count, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(manifests())
    def check(manifest):
        suffix, content = manifest
        path, out = tmp_path / f"night{suffix}", tmp_path / "out"
        path.write_bytes(content)
        command = [path, "--out", out, "--model", "tiny", "--device", "cpu"]
        code, said = answer("plan", *command, "--json")
        assert code in (0, 2) and not out.exists()
        seen[code] += 1
        if code == 0:
            buckets = json.loads(next(line for line in said.splitlines() if line.startswith("{")))["buckets"]
            if max(bucket["frames"] * bucket["steps"] * bucket["clips"] for bucket in buckets) > 200:
                return                                  # it would be rendered, but take long
        assert answer("render", *command)[0] == code
        assert out.exists() == (code == 0)
        shutil.rmtree(out, ignore_errors=True)

    check()
    assert all(seen.values()), seen                     # both good ones and bad ones were among them


def test_a_few_bytes_that_announce_any_number_of_rows_are_refused(tmp_path):
    rows = 10_000_001
    prompts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array(["a fox"]))
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "night.parquet")
    assert (tmp_path / "night.parquet").stat().st_size < 100_000
    code, said = answer("plan", tmp_path / "night.parquet", "--out", tmp_path / "out", "--model", "tiny")
    assert code == 2 and "10,000,001 rows; a manifest may have 10,000,000" in said


def repeated(value, times, kind=pa.string()):
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int32)), pa.array([value], kind))


def lists_of(values, per_list):
    offsets = pa.array(np.arange(0, len(values) + 1, per_list, np.int32))
    return pa.ListArray.from_arrays(offsets, values)


UNFOLDING = {
    "a million rows of one prompt": lambda: dict(prompt=repeated("x" * 8192, 10**6)),
    "a long note": lambda: dict(prompt=["a fox"] * 10**5, note=repeated("x" * 10**6, 10**5)),
    "bytes": lambda: dict(prompt=["a fox"] * 10**5, note=repeated(b"x" * 10**6, 10**5, pa.binary())),
    "lists": lambda: dict(prompt=["a fox"] * 10**3, tags=lists_of(repeated("x" * 8192, 10**6), 10**3)),
    "records": lambda: dict(prompt=repeated("a fox", 10**6),
                            note=pa.StructArray.from_arrays([repeated("x" * 8192, 10**6)], ["text"])),
}


@pytest.mark.parametrize("what", UNFOLDING)
def test_a_small_file_that_unfolds_to_more_than_a_manifest_may_be_is_refused_unopened(what, tmp_path):
    path = tmp_path / "night.parquet"
    pq.write_table(pa.table(UNFOLDING[what]()), path, compression="zstd")
    assert path.stat().st_size < 300_000
    pool = pa.default_memory_pool()
    most = max(pool.max_memory(), pool.bytes_allocated() + 100_000_000)
    code, said = answer("plan", path, "--out", tmp_path / "out", "--model", "tiny")
    assert code == 2 and "unfolded, where 2,147,483,648 are left" in said and not (tmp_path / "out").exists()
    assert pool.max_memory() <= most


@pytest.mark.parametrize("column", [["0" * 2 * 10**7], [np.zeros(10**7, np.int8)]], ids=["text", "a list of numbers"])
def test_a_page_of_nothing_but_zeros_is_refused_unopened(column, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", 10**7)
    pq.write_table(pa.table({"prompt": ["a fox"], "note": column}), tmp_path / "night.parquet", compression="zstd")
    assert (tmp_path / "night.parquet").stat().st_size < 50_000
    code, said = answer("plan", tmp_path / "night.parquet", "--out", tmp_path / "out", "--model", "tiny")
    assert code == 2 and "unfolded, where 10,000,000 are left" in said


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"])
def test_texts_that_share_a_beginning_are_read_a_few_at_a_time(encoding, tmp_path, monkeypatch):
    notes = ["a" * 10**5 + str(at) for at in range(300)]
    pq.write_table(pa.table({"prompt": ["a fox"] * 300, "note": notes}), tmp_path / "night.parquet",
                   use_dictionary=False, column_encoding={"prompt": "PLAIN", "note": encoding}, compression="zstd")
    assert manifest.Manifest.read(str(tmp_path)).user["user.note"].to_pylist() == notes
    monkeypatch.setattr(manifest_parquet, "BATCH_BYTES", 10**6)
    assert manifest.Manifest.read(str(tmp_path)).user["user.note"].to_pylist() == notes
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", 10**7)
    code, said = answer("plan", tmp_path, "--out", tmp_path / "out", "--model", "tiny")
    assert code == 2 and "unfolded, where 10,000,000 are left" in said


def test_the_limit_is_for_all_files_and_formats_together(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", 10**6)
    (tmp_path / "a.csv").write_text("prompt,note\n" + f"a fox,{'x' * 2000}\n" * 300)
    assert manifest.Manifest.read(str(tmp_path)).table.num_rows == 300
    (tmp_path / "b.jsonl").write_text((json.dumps({"prompt": "a fox", "note": "x" * 2000}) + "\n") * 300)
    code, said = answer("plan", tmp_path, "--out", tmp_path / "out", "--model", "tiny")
    assert code == 2 and "b.jsonl: got content of" in said and "a.csv: got" not in said


def test_rows_that_each_bring_columns_of_their_own_are_refused(tmp_path):
    rows = ({"prompt": "a fox", f"a{at}": 1, f"b{at}": 1} for at in range(20_000))     # 800 million cells in 1 MB
    (tmp_path / "night.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said = answer("plan", tmp_path / "night.jsonl", "--out", tmp_path / "out", "--model", "tiny")
    assert code == 2 and "40,001 names of columns; a manifest may have 1,000" in said


# Weights.

def mutated(content, how):
    """A safetensors file with another length, other bytes, or another header."""
    content = bytearray(content)
    size = int.from_bytes(content[:8], "little")
    kind = how.choice(["flip header", "flip any", "cut", "append", "length", "entry", "name", "json"])
    if kind in ("flip header", "flip any"):
        for _ in range(how.randint(1, 4)):
            content[how.randrange(8 + size if kind == "flip header" else len(content))] = how.randrange(256)
    elif kind == "cut":
        del content[how.randrange(len(content)):]
    elif kind == "append":
        content += how.randbytes(how.randint(1, 99))
    elif kind == "length":
        lengths = [0, 1, size - 1, size + 8, len(content), 10**8 + 1, 2**63, 2**64 - 1]
        content[:8] = how.choice(lengths).to_bytes(8, "little")
    else:
        header = json.loads(content[8:8 + size])
        name = how.choice([name for name in header if name != "__metadata__"])
        if kind == "entry":
            header[name][how.choice(["dtype", "shape", "data_offsets"])] = how.choice([
                None, [], {}, "F32", "F64", "U128", [-1, 5], [2**63, 2**63], [10**30], [0.5], ["1"], [1] * 1000, [[]],
                True])
        elif kind == "name":
            header[how.choice(["\x1b[31m", "x" * 10**5, "__metadata__", "../x", ""])] = header.pop(name)
        text = json.dumps(header).encode()
        text = how.choice([b"[" * 10**5, b"null", b"", b'{"a":1,"a":2}', text]) if kind == "json" else text
        content = len(text).to_bytes(8, "little") + text + content[8 + size:]
    return bytes(content)


NUMBERS = [10**8, 10**15, 10**400, -1, 0, True, "24", "9" * 5000, None, 1.5, float("nan"), float("inf"), [], {}, [[]],
           2**63]
FIELDS = ["vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets",
          "relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj", "model_type", "num_labels",
          "id2label", "auto_map", "dtype", "architectures", "quantization_config"]
STEPS = [{"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
         {"type": "Prepend", "prepend": "x" * 10**6},
         {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}, {"type": "Lowercase"}, {"type": "NFKC"},
         {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Sequence", "normalizers": []}, {}, None, 1]
SHARDS = ["../model.safetensors", "/etc/passwd", "", ".", "..", "a\0.safetensors", "x" * 300 + ".safetensors", 3, None,
          "\ud800.safetensors", "\x1b[2J.safetensors", "gone.safetensors", "model.safetensors"]


def with_config(folder, how):
    path = folder / "t5/text_encoder/config.json"
    said = json.loads(path.read_text())
    said[how.choice(FIELDS)] = how.choice(NUMBERS)
    path.write_text(how.choice([json.dumps(said)] * 9 + ["[" * 10**5, "null", '{"model_type": 1}', "\0"]))


def with_tokenizer(folder, how):
    path = folder / how.choice(["t5/tokenizer/tokenizer.json"] * 4 + ["t5/tokenizer/tokenizer_config.json"])
    said = json.loads(path.read_text())
    kind = how.choice(["step", "model", "added", "top", "auto_map"])
    if kind == "step":
        said[how.choice(["normalizer", "pre_tokenizer"])] = {"type": "Sequence",
                                                             how.choice(["normalizers", "pretokenizers"]):
                                                             how.choices(STEPS, k=how.randint(1, 20))}
    elif kind == "model" and "model" in said:
        said["model"][how.choice(list(said["model"]))] = how.choice(NUMBERS)
    elif kind == "added" and "added_tokens" in said:
        how.choice(said["added_tokens"])[how.choice(["id", "content", "normalized", "special"])] = how.choice(NUMBERS)
    elif kind == "top":
        said[how.choice(list(said))] = how.choice(NUMBERS)
    else:
        said["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    path.write_text(json.dumps(said))


def with_special(folder, how):
    """In a file's place, or beside it, what is none."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = how.choice(files + [path.with_name("x.json") for path in files])
    if path.exists():
        path.unlink()
    kind = how.choice(["pipe", "folder", "device", "circle", "socket", "holes", "gone"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "holes":
        with path.open("wb") as file:
            file.truncate(2**40)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))
    elif kind != "gone":
        path.symlink_to("/dev/zero" if kind == "device" else path)


def with_index(folder, how):
    index = {f"x{at}": how.choice(SHARDS) for at in range(how.choice([1, 3]))}
    said = how.choice([{"weight_map": index}] * 9 + [[], {"weight_map": []}, {"weight_map": {"": ""}}, {}])
    (folder / "t5/text_encoder/model.safetensors.index.json").write_text(json.dumps(said))


def with_mutated(folder, how):
    path = how.choice(sorted(folder.rglob("*.safetensors")))
    path.write_bytes(mutated(path.read_bytes(), how))


TRAPS = [with_mutated, with_mutated, with_config, with_tokenizer, with_special, with_index]


@pytest.mark.parametrize("count", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_no_weights_folder_breaks_the_plan_or_leaves_half_a_run(count, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)                         # names of sockets must be short
    (tmp_path / "night.csv").write_text("prompt,frames\na fox,5\n")
    codes = set()
    for seed in range(count):
        how = random.Random(seed)
        folder = Path(shutil.copytree(TINY.folder, tmp_path / "weights"))
        TRAPS[seed % len(TRAPS)](folder, how)
        code, said = answer("plan", tmp_path / "night.csv", "--out", tmp_path / "out", "--model", "tiny",
                            "--weights", folder, "--device", "cpu")
        assert code in (0, 2) and not (tmp_path / "out").exists(), (seed, said)
        shutil.rmtree(folder)
        codes.add(code)
    assert codes == {0, 2}                              # other bytes of a tensor are weights too


# Prompts.

PROMPTS = {
    "html": "<script>alert(1)</script> & a fox <img src=x onerror=alert(2)>",
    "terminal": "a \x1b[31mred\x1b[0m fox \x1b]0;title\x07\x1b[2J\r\x08 \x9b1m",
    "nul": "a fox\0 and a second one\0",
    "right to left": "\u202ea fox\u202c \u200fأحمر\u2066 x \u2069 and \u200d\ufeff",
    "emoji": "🦊" * 2048,                               # 8 KiB
    "template": "{{ 7 * 7 }} ${HOME} %n %s `id` $(id) '; DROP TABLE clips; --",
}


def test_a_prompt_is_rendered_kept_and_shown_whatever_is_in_it(tmp_path):
    manifest, out = tmp_path / "night.jsonl", tmp_path / "out"
    rows = [{"id": name, "prompt": prompt, "negative_prompt": prompt[::-1], "frames": 5, "mood": prompt}
            for name, prompt in PROMPTS.items()]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(PROMPTS["emoji"].encode()) == 8192
    command = [manifest, "--out", out, "--model", "tiny", "--device", "cpu"]
    for asked in (["plan", *command], ["render", *command], ["status", out], ["verify", out], ["render", *command]):
        assert answer(*asked)[0] == 0                   # and nothing that a terminal would obey was printed
    found = {row["id"]: row for row in ledger.read(open_store(out)).to_pylist()}
    assert {name: row["prompt"] for name, row in found.items()} == PROMPTS
    assert {name: row["user.mood"] for name, row in found.items()} == PROMPTS
    for row in found.values():
        said = read_clip(out / clip_key(row["clip_id"])).metadata
        assert said["prompt"] == readable(row["prompt"]) and said["negative_prompt"] == readable(row["prompt"][::-1])
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said["prompt"])
    assert "\u2400 and a second one\u2400" in readable(PROMPTS["nul"])
    names = [path.relative_to(out).as_posix() for path in out.rglob("*")]
    assert all(re.fullmatch(r"[a-z0-9./_A-Z-]+", name) for name in names)          # none comes from a text


def test_a_failure_that_quotes_the_prompt_is_shown_safely(tmp_path, monkeypatch):
    from dailies.actors.decoder import Decoder

    def broken(self, latent):
        raise ValueError(f"cannot decode {latent.request.prompt}")

    monkeypatch.setattr(Decoder, "decode", broken)
    lines = [json.dumps({"prompt": text, "frames": 5}) for text in PROMPTS.values()]
    (tmp_path / "night.jsonl").write_text("\n".join(lines))
    code, said = answer("render", tmp_path / "night.jsonl", "--out", tmp_path / "out", "--model", "tiny")
    assert code == 3 and r"cannot decode a \x1b[31mred" in said
    code, said = answer("status", tmp_path / "out")
    assert code == 0 and "6 failed with ValueError" in said


@pytest.mark.parametrize("arguments", [
    ["status", "no\x1b[2Jsuch"], ["render", "no\x1b[2J.csv", "--out", "o\x9b"], ["models", "\x1b[31m"], ["\x1b[31m"],
    ["--\x1b[31m"], ["retry", "o", "--where", "\x1b[31m"], ["plan", "m.csv", "--out", "s3://\x1b]0;x\x07/\u202e"],
    ["verify", "s3://a@b\x1b[2J"], ["plan", "m.csv", "--out", "o", "--until", "\x1b[2J"]], ids=repr)
def test_what_was_typed_comes_back_escaped(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert answer(*arguments)[0] in (2, 5)              # and nothing that a terminal would obey was printed
    assert answer(*arguments, "--json")[0] in (2, 5)


@pytest.mark.parametrize("command",
                         [("models", "demo"), ("plan", "--prompt", "x"), ("render", "--prompt", "x", "--out", "o"),
                                     ("convert",)])
def test_names_of_files_make_no_lines_and_move_no_cursor(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = shutil.copytree(HOME / "model/demo", tmp_path / "weights")
    for name in ("a\nFAKE LINE.safetensors", "a\x1b]0;pwn\x07\x1b[2J.safetensors"):
        (weights / "dit" / name).write_bytes(b"x")
    (weights / "dit/demo.safetensors").unlink()
    (weights / "t5/tokenizer/a\nFAKE LINE.json").write_text("{}")
    given = (weights, "--model", "demo", "--to", "to") if command == ("convert",) else ("--weights", weights)
    _, said = answer(*command, *given)
    assert not any(line.startswith("FAKE") for line in said.splitlines()) and "FAKE" in said


def test_whatever_commands_print_of_others_making_is_escaped():
    """Only say() and what is wrapped in printable() or JSON reaches a terminal."""
    # say itself; escapes itself; a child's output
    bare = {"progress.py", "cli.py", "sandbox.py", "unpickle.py"}
    for path in sorted(Path(HOME, "jobs").glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())) if path.name not in bare else ():
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print":
                inner = ast.unparse(call.args[0])
                assert inner.startswith(("printable(", "jsonlib.dumps(")), f"{path.name}:{call.lineno}: use say()"


def test_what_is_logged_is_escaped_too():
    script = ("import logging\nfrom dailies.jobs.cli import main\nmain(['models', 'none'])\n"
              "logging.getLogger('store').warning('cannot write now (%s)', 'Slow\x1b[2JDown')")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert r"cannot write now (Slow\x1b[2JDown)" in done.stderr and "\x1b" not in done.stderr
