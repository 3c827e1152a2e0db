"""What can be typed: every command explains itself; whatever is wrong is one message, exit 2 and nothing written."""

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_files import png
from limits import within
from safetensors.torch import load_file, save_file
from tiny import TINY

from dailies import HOME
from dailies.jobs.cli import main
from dailies.jobs.here import import_nothing_from_here
from dailies.jobs.parcel import mapping_in, pack_parcel
from dailies.jobs.settings import RenderJob, time_meant, without_long_keys
from dailies.jobs.usage import UsageError
from dailies.pipeline.manifest.manifest import Manifest

COMMANDS = ["render", "plan", "submit", "status", "verify", "retry", "models", "convert", "bench"]
GOOD = {"prompt": ["a red fox", "a blue fox"], "id": ["x", "y"], "frames": [5, 5]}


def said(capsys, *arguments):
    """Exit code, stdout and stderr of one command."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def manifest(tmp_path):
    def write(columns=GOOD, name="night.parquet"):
        path = tmp_path / name
        pq.write_table(pa.table(columns), path)
        return path
    return write


def test_the_program_without_arguments_and_each_command_explain_themselves(capsys):
    code, out, err = said(capsys)
    assert code == 2 and all(command in out + err for command in COMMANDS)
    for command in COMMANDS:
        code, out, _ = said(capsys, command, "--help")
        assert code == 0 and "Example" in out and f"dailies {command} " in out and "--json" in out


def test_help_imports_nothing_heavy():
    """Seconds each: torch, ray, pyarrow, transformers, boto3. (No time is measured here; it depends on the machine.)"""
    code = ("import sys; from dailies.jobs.cli import main; main(['render', '--help']); "
            "print(sorted({'torch', 'ray', 'pyarrow', 'transformers', 'boto3', 'numpy', 'av'} & sys.modules.keys()))")
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments, message", [
    (["--zap"], "No such option: --zap"),
    (["zap"], "No such command 'zap'"),
    (["render", "--zap"], "No such option: --zap"),
    (["render"], "A manifest is needed: dailies render MANIFEST --out URI"),
    (["render", "m.csv"], "An output folder is needed: dailies render MANIFEST --out URI"),
    (["models", "demo", "extra"], "unexpected extra argument"),
    (["plan", "m.csv", "--out", "o", "--steps", "many"], "'--steps'"),
    (["plan", "m.csv", "--out", "o", "--steps", "0"], "--steps must be greater than or equal to 1; got 0"),
    (["plan", "m.csv", "--out", "o", "--guidance", "nan"], "--guidance must be a finite number; got nan"),
    (["plan", "m.csv", "--out", "o", "--duration", "-1"], "--duration must be greater than 0; got -1.0"),
    (["plan", "m.csv", "--out", "o", "--until", "7"], "--until must be a time of day such as 07:00"),
    (["plan", "m.csv", "--out", "o", "--max-gpu-hours", "-1"], "--max-gpu-hours must be greater than 0; got -1.0"),
    (["plan", "m.csv", "--out", "o", "--precision", "int4"],
     "--precision must be 'fp32', 'bf16', 'int8', 'fp8' or 'auto'; got 'int4'"),
    (["plan", "m.csv", "--out", "o", "--model", "dem"], "no model is called 'dem'. Did you mean demo?"),
    (["plan", "m.csv", "--out", "ftp://x"], "--out ftp://x: expected a local folder or s3://bucket/prefix"),
    (["submit", "m.csv", "--out", "s3://b/x"], "Missing option '--address'"),
    (["submit", "m.csv", "--out", "s3://b/x", "--address", "http://h:1", "--zap"], "No such option: --zap"),
    (["submit", "m.csv", "--out", "s3://b/x", "--address", "http://h:1", "--ray", "auto"], "leave --ray out"),
    (["retry", "o", "--where", "x"], "--where must be COLUMN=VALUE; got 'x'"),
    (["models", "dem"], "no model is called 'dem'"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_usage_is_one_message_and_exit_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = said(capsys, *arguments)
    assert code == 2 and message in err and "Traceback" not in err and out == ""
    assert list(tmp_path.iterdir()) == []


def test_with_json_an_error_is_json_too(capsys, tmp_path):
    code, out, err = said(capsys, "plan", tmp_path / "none.csv", "--out", tmp_path / "out", "--json")
    answer = json.loads(out)
    assert code == answer["exit_code"] == 2 and "no such file" in answer["error"] and "no such file" in err
    assert answer["complaints"]["count"] == 1


# The configuration file.

def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    config = tmp_path / "night.toml"
    config.write_text('manifest = "m.csv"\nout = "o"\nsteps = 7\nguidance = 2\nmax-attempts = 5\nskip_invalid = true\n')
    job = RenderJob.read({"steps": 9, "guidance": None, "skip_invalid": False}, config)
    assert (job.steps, job.guidance, job.max_attempts, job.skip_invalid, job.model) == (9, 2.0, 5, False, "demo")


@pytest.mark.parametrize("now, until, means", [
    ("2026-01-31 22:10", "07:00", "2026-02-01 07:00"),
    ("2026-01-31 06:59", "07:00", "2026-01-31 07:00"),
    ("2026-01-31 07:00", "07:00", "2026-02-01 07:00"),
    ("2026-01-31 22:10", "2026-02-03T06:30", "2026-02-03 06:30"),
    ("2026-01-31 22:10", "2026-02-01", None),
    ("2026-01-31 22:10", "tomorrow", None),
    ("2026-01-31 22:10", "07:00+01:00", None),
])
def test_until_is_the_next_such_time(now, until, means, monkeypatch):
    class At(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(now)

    monkeypatch.setattr("dailies.jobs.settings.datetime", At)
    found = time_meant(until)
    assert (found and found.strftime("%Y-%m-%d %H:%M")) == means


def test_the_smaller_of_gpu_hours_and_money_counts():
    job = dict(manifest="m.csv", out="o")
    assert RenderJob(**job).gpu_hours() is None
    assert RenderJob(**job, max_gpu_hours=3.0).gpu_hours() == 3.0
    assert RenderJob(**job, max_gpu_hours=3.0, max_cost=5.0, price=2.0).gpu_hours() == 2.5
    assert RenderJob(**job, max_cost=50.0, price=2.0).gpu_hours() == 25.0


def test_a_time_of_day_in_the_file_needs_no_quotes(tmp_path):
    said = 'manifest = "m.csv"\nout = "o"\nuntil = 07:00:00\nmax-cost = 10\nprice = 2.5\n'
    (tmp_path / "night.toml").write_text(said)
    job = RenderJob.read({}, tmp_path / "night.toml")
    assert (job.deadline().hour, job.gpu_hours()) == (7, 4.0)


@pytest.mark.parametrize("text, message", [
    ("stepz = 3", "unknown key 'stepz'. Did you mean steps?"),
    ("steps = 0", "steps must be greater than or equal to 1; got 0"),
    ("steps = '3'", "steps must be integer; got '3'"),
    ("skip_invalid = 1", "skip_invalid must be boolean; got 1"),
    ("max-attempts = 2\nmax_attempts = 3", "max_attempts is given twice"),
    ("[render]\nsteps = 3", "unknown key 'render'"),
    ("until = '25:00'", "until must be a time of day such as 07:00, or a date and time to come"),
    ("until = 2020-01-01T07:00:00", "to come such as 2026-02-01T07:00; got '2020-01-01T07:00:00'"),
    ("max_cost = 3", "--max-cost needs --price"),
    ("max_gpu_hours = 0", "max_gpu_hours must be greater than 0; got 0"),
    ("steps =", "must be TOML"),
    ("\"\\u001b[31mred\" = 1", r"unknown key '\x1b[31mred'"),
])
def test_a_bad_configuration_file_is_one_message_and_exit_2(text, message, capsys, tmp_path):
    config = tmp_path / "night.toml"
    config.write_text(text)
    code, _, err = said(capsys, "plan", "m.csv", "--out", tmp_path / "out", "--config", config)
    assert code == 2 and message in err and str(config) in err
    assert not (tmp_path / "out").exists()


def test_a_configuration_file_that_is_not_there_or_no_text_is_said(capsys, tmp_path):
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000)
    for name, message in (("none.toml", "No such file"), ("bytes.toml", "must be TOML"), (".", "Is a directory"),
                          ("deep.toml", "must be TOML"), ("/dev/zero", "at most 65,536 bytes")):
        code, _, err = said(capsys, "plan", "m.csv", "--out", "o", "--config", tmp_path / name)
        assert code == 2 and message in err


@pytest.mark.parametrize("key", ["a.", "a . ", '"".', "''.", '"\\\"".', "'\\'.", "\"\\\"\".'\\'.", "\"'\".'\"'.a."])
@pytest.mark.parametrize("around", ["{}a = 1", "[{}a]", "[[ {}a ]]", "map = {{{}a = 1}}", "# '\n{}a = 1",
                                    "b = \"\"\"\\\"\"\"\"\"\"\n{}a = 1", "b = '''\\'''\n{}a=1"])
def test_a_key_of_very_many_parts_is_refused_before_it_keeps_the_reader_busy(key, around):
    with within(10), pytest.raises(ValueError, match="a key has more than 100 parts"):
        without_long_keys(around.format(key * (60_000 // len(key))))


@pytest.mark.parametrize("text",
                         ['"\\""' * 9000, "\"\\" * 30_000, "'" * 60_000, '"' * 60_000, '"""' + '"" ' * 20_000,
                          "a" * 60_000,
                                  "a " * 30_000, "a = 1.5\n" * 7000, "a = [" + "1.5, " * 12_000,
                          'p = "' + "so. " * 9000 + '"',
                                  "p = '''" + "so. " * 9000 + "'''", "# " + "so. " * 9000])
def test_other_long_texts_are_left_to_the_reader_at_once(text):
    with within(10):
        assert without_long_keys(text) is text


def test_submit_names_a_deadline_with_its_zone(monkeypatch, tmp_path):
    config = tmp_path / "night.toml"
    config.write_text('manifest = "m.csv"\nuntil = "07:00"\n')
    calls = []
    monkeypatch.setattr("dailies.jobs.submit.submit", lambda *arguments: calls.append(arguments) or 0)
    assert main(["submit", "--config", str(config), "--out", "s3://b/x", "--address", "http://h:1"]) == 0
    said = calls[0][3][calls[0][3].index("--until") + 1]
    assert datetime.fromisoformat(said).tzinfo and datetime.fromisoformat(said) == time_meant("07:00")


def test_submit_hands_the_options_of_render_on(monkeypatch, tmp_path):
    config = tmp_path / "night.toml"
    config.write_text('manifest = "m.csv"\nguidance = 4\nmap = {img = "image"}\n')
    calls = []
    monkeypatch.setattr("dailies.jobs.submit.submit", lambda *arguments: calls.append(arguments) or 3)
    assert main(["submit", "--config", str(config), "--out", "s3://b/x", "--address", "http://h:1", "--steps", "7",
                 "--no-skip-invalid", "--strict", "--wait"]) == 3
    assert calls == [("m.csv", "s3://b/x", "http://h:1",
                      ["--guidance", "4.0", "--map", "img=image", "--no-skip-invalid", "--steps", "7", "--strict"],
                      True, False)]


# Bad manifests, weights and folders: render and plan refuse them alike, and nothing is written.

def column(**changes):
    return {**GOOD, **changes}


BAD_ROWS = {
    "missing prompt": ({"text": ["a"]}, "prompt"),
    "wrong type of prompt": (column(prompt=[1, 2]), "prompt"),
    "wrong type of seed": (column(seed=["one", "two"]), "seed"),
    "NULL prompt": (column(prompt=["a", None]), "row 1, prompt: got nothing"),
    "1 MB prompt": (column(prompt=["a", "x" * 2**20]), "(1,048,576 bytes)"),
    "duplicate ids": (column(id=["x", "x"]), "row 1, id: got 'x'"),
    "negative duration": ({**GOOD, "frames": [None, 5], "duration_s": [-1.0, None]}, "row 0, duration_s: got -1.0"),
    "7x7 resolution": (column(resolution=["7x7", "24p"]), "row 0, resolution: got '7x7'"),
    "steps 0": (column(steps=[0, 2]), "row 0, steps: got 0"),
    "seed out of range": (column(seed=[-1, 2]), "row 0, seed: got -1"),
    "an id that climbs": (column(id=["../../x", "y"]), "row 0, id: got '../../x'"),
}


@pytest.mark.parametrize("command", ["render", "plan"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_manifest_is_refused_and_nothing_is_written(command, name, manifest, capsys, tmp_path):
    columns, message = BAD_ROWS[name]
    code, out, err = said(capsys, command, manifest(columns), "--out", tmp_path / "out", "--model", "tiny")
    assert code == 2 and message in err and out == "" and len(err) < 5000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, content, message", [
    ("none.parquet", None, "no such file"),
    ("empty.parquet", b"", "an empty file"),
    ("no.parquet", b"this is no Parquet", "none.parquet"),
    ("half.parquet", b"PAR1" + b"\0" * 50, "half.parquet"),
    ("night.fox", b"a red fox", "night.fox"),
    ("header.csv", b"prompt\n", "at least one row"),
])
def test_a_manifest_that_cannot_be_read_is_refused(name, content, message, capsys, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for command in ("render", "plan"):
        code, _, err = said(capsys, command, tmp_path / name, "--out", tmp_path / "out", "--model", "tiny")
        assert code == 2 and (message if message != "none.parquet" else name) in err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def weights(tmp_path):
    return Path(shutil.copytree(TINY.folder, tmp_path / "weights"))


def drop_a_file(weights):
    (weights / "vae/vae.safetensors").unlink()
    return "lacks vae/vae.safetensors"


def misshape_a_tensor(weights):
    path = weights / TINY.dit_file
    tensors = load_file(path)
    tensors["model.patch_embedding.bias"] = torch.zeros(47)
    save_file(tensors, path)
    return "model.patch_embedding.bias must be [48], got [47]"


def leave_a_pickle(weights):
    (weights / TINY.dit_file).rename(weights / "dit/360p.pth")
    return "only safetensors are read at run time"


def truncate(weights):
    path = weights / "vae/vae.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "vae.safetensors"


def break_the_tokenizer(weights):
    for path in (weights / "t5/tokenizer").iterdir():
        path.write_text("{")
    return "does not hold a tokenizer"


@pytest.mark.parametrize("spoil", [drop_a_file, misshape_a_tensor, leave_a_pickle, truncate, break_the_tokenizer])
def test_bad_weights_are_refused_and_nothing_is_written(spoil, weights, manifest, capsys, tmp_path):
    message = spoil(weights)
    for command in ("render", "plan"):
        code, _, err = said(capsys, command, manifest(), "--out", tmp_path / "out", "--model", "tiny",
                            "--weights", weights)
        assert code == 2 and message in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused(manifest, capsys, tmp_path):
    (tmp_path / "file").write_text("here is no room for a folder")
    code, _, err = said(capsys, "render", manifest(), "--out", tmp_path / "file" / "out", "--model", "tiny")
    assert code == 2 and str(tmp_path / "file" / "out") in err
    assert (tmp_path / "file").read_text() == "here is no room for a folder"


def test_all_complaints_come_together_and_many_are_summarised(manifest, capsys, tmp_path):
    columns = {"prompt": ["a"] * 1000, "frames": [5] * 1000, "seed": [-1] * 1000, "steps": [0] * 1000}
    code, _, err = said(capsys, "plan", manifest(columns), "--out", tmp_path / "out", "--model", "tiny")
    assert code == 2 and "2,000 errors" in err and len(err.splitlines()) < 40
    assert "--skip-invalid" in err


# The plan.

def test_the_plan_says_what_will_be_rendered_and_writes_nothing(manifest, capsys, tmp_path):
    columns = {"prompt": ["a", "a", "b\x1b[31m"], "id": ["1", "2", "3"], "seed": [5, 5, 6], "frames": [10, 10, 9],
               "samples": [1, 1, 3]}
    code, out, _ = said(capsys, "plan", manifest(columns), "--out", tmp_path / "out", "--model", "tiny", "--steps", "3")
    assert code == 0 and "3 rows, 4 clips with tiny in fp32 on cpu" in out
    assert "4 x 40x24, 9 frames, 3 steps, guidance 3" in out
    assert "2 rows: 10 frames rounded down to 9" in out and "1 row asks for a clip" in out
    assert "\x1b" not in out
    code, out, _ = said(capsys, "plan", manifest(columns), "--out", tmp_path / "out", "--model", "tiny", "--json")
    plan = json.loads(out)
    assert (plan["rows"], plan["clips"], plan["duplicates"], plan["settings"]["steps"]) == (3, 4, 1, 2)
    assert not (tmp_path / "out").exists()


def test_plan_needs_neither_weights_nor_a_run_folder_and_says_what_is_missing(manifest, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("dailies.jobs.plan.hub_bytes", lambda card: None)       # as without a network
    monkeypatch.setattr("dailies.model.weights.hub_folder", lambda: tmp_path / "hub")
    text = {"prompt": ["a red fox"]}
    code, out, _ = said(capsys, "plan", manifest(text), "--model", "wan2.1-t2v-14b", "--limit", "1", "--until", "07:00")
    assert code == 0 and "1 row, 1 clip with wan2.1-t2v-14b" in out and "1 clip to make" in out
    assert "render fetches them from Wan-AI/Wan2.1-T2V-14B-Diffusers first (40.2 GB at the least" in out
    assert "No clip is begun that would not be done by" in out
    code, out, _ = said(capsys, "plan", manifest(text), "--model", "turbo-wan2.1-t2v-14b-480p", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["out"] is None and "dailies convert SRC" in answer["weights"]["said"]
    assert (answer["to_make"], answer["limit"], answer["done"]) == (1, None, 0)
    assert not (tmp_path / "hub").exists()


def test_a_column_that_is_asked_about_hides_nothing_that_is_wrong_with_rows(manifest, capsys, tmp_path):
    """Neither what no model could take nor what this one does not."""
    columns = {"prompt": ["", "b", "c"], "Guidance": [1, 2, 3], "steps": [3, -1, 3],
               "resolution": [None, None, "9000x10"], "image": [None, "a.png", None]}
    code, _, err = said(capsys, "plan", manifest(columns), "--out", tmp_path / "out", "--model", "tiny")
    assert code == 2 and ": 5 errors;" in err
    for line in ("got the column 'Guidance'. Did you mean guidance?", "row 0, prompt: got", "row 1, steps: got -1",
                 "row 1, image: got 'a.png'", "row 2, resolution: got '9000x10'"):
        assert line in err


def test_rows_are_checked_before_weights_are_fetched(manifest, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("dailies.model.weights.hub_folder", lambda: tmp_path / "hub")
    monkeypatch.setattr("dailies.jobs.render.locate", lambda *_, **__: pytest.fail("they were asked for"))
    rows = manifest({"prompt": ["a fox"], "resolution": ["13x7"]})
    code, _, err = said(capsys, "render", rows, "--out", tmp_path / "out", "--model", "wan2.1-t2v-14b", "--device",
                        "cpu")
    assert code == 2 and "row 0, resolution: got '13x7'" in err and not (tmp_path / "out").exists()


def test_the_example_of_the_readme_has_a_run_folder_of_its_own():
    root = Path(__file__).resolve().parent.parent
    job = RenderJob.read({}, root / "examples/night.toml")
    assert f"dailies render {job.manifest} --out out/" in (root / "Makefile").read_text()
    assert Path(job.out) != Path("out")


def test_strict_refuses_what_would_be_rounded(manifest, capsys, tmp_path):
    code, _, err = said(capsys, "plan", manifest(column(frames=[10, 9])), "--out", tmp_path / "out", "--model", "tiny",
                        "--strict")
    assert code == 2 and "1 row: 10 frames rounded down to 9" in err


def test_skip_invalid_plans_the_other_rows(manifest, capsys, tmp_path):
    code, out, _ = said(capsys, "plan", manifest(column(steps=[0, 2])), "--out", tmp_path / "out", "--model", "tiny",
                        "--skip-invalid")
    assert code == 0 and "2 rows, 1 clip " in out and "row 0, steps: got 0" in out


# The catalogue.

def test_models_lists_the_catalogue_and_says_what_is_missing(weights, capsys):
    code, out, _ = said(capsys, "models", "--json")
    names = {model["name"] for model in json.loads(out)["models"]}
    assert code == 0 and {"demo", "linum-v2-360p", "linum-v2-720p", "tiny"} <= names
    code, out, _ = said(capsys, "models", "tiny")
    assert code == 0 and "random weights, for tests" in out and "24p 40x24" in out
    drop_a_file(weights)
    code, out, _ = said(capsys, "models", "tiny", "--weights", weights)
    assert code == 0 and "missing: vae/vae.safetensors" in out


def test_models_downloads_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    code, out, _ = said(capsys, "models", "linum-v2-720p", "--json")
    assert code == 0 and json.loads(out)["weights"]["missing"][0] == "dit/720p.safetensors"


def test_nothing_is_imported_from_the_folder_that_the_command_is_given_in(tmp_path, monkeypatch):
    """model.py, av.py or token.py there would be taken for ours: python -m, or an empty entry of PYTHONPATH."""
    root, other = str(HOME), "/usr/lib/python"
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), f"{tmp_path}/link", root, other])
    monkeypatch.chdir(root)
    import_nothing_from_here()
    assert sys.path[1] == str(tmp_path)                 # a checkout that is worked in
    monkeypatch.chdir(tmp_path)
    import_nothing_from_here()
    assert sys.path == [root, other]


def test_a_command_from_a_deleted_working_directory_is_answered(tmp_path, monkeypatch, capsys):
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(sys, "path", [*sys.path, "", "lib"])
    code, _, err = said(capsys, "models")
    assert (code, err) == (2, "The working directory has been deleted; give the command from one that is there\n")


@pytest.mark.parametrize("arguments", [
    ["plan", "~no-such-user/m.csv", "--out", "o"], ["plan", "m.csv", "--out", "o", "--weights", "~no-such-user/w"],
    ["status", "~no-such-user/o"], ["models", "--weights", "~no-such-user/w"], ["plan", "~/m.csv", "--out", "~/o"]],
    ids=" ".join)
def test_a_home_that_is_not_there_ends_no_command_with_a_traceback(arguments, tmp_path, monkeypatch, capsys):
    """~ is taken as it is: of a user who does not exist, or of a user id without an entry and without HOME."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 3)
    (tmp_path / "m.csv").write_text("prompt\na fox\n")
    assert said(capsys, *arguments)[0] in ((0,) if arguments[0] == "models" else (2, 5))


def test_cores_that_there_are_not_and_cores_of_a_cluster_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dailies.jobs.machines.usable_cores", lambda: 4)
    (tmp_path / "m.csv").write_text("prompt\na fox\n")
    for more, word in ((("--cpus", "5"), "at most 4, the cores that this process may use here; got 5"),
                       (("--cpus", "0"), "--cpus must be"),
                       (("--cpus", "2", "--ray", "auto"), "--cpus is of a local run")):
        assert main(["plan", str(tmp_path / "m.csv"), "--out", str(tmp_path / "out"), *more]) == 2
        assert word in capsys.readouterr().err
    assert main(["submit", "m.csv", "--out", "o", "--address", "http://h:8265", "--cpus", "2"]) == 2
    assert "--cpus is of a local run" in capsys.readouterr().err


# Manifests that are typed, piped, mapped.

def test_prompts_are_planned_as_they_are_typed_and_what_the_model_never_saw_is_said(capsys, tmp_path):
    command = ["plan", "--prompt", "a red circle moves left", "--prompt", "A fox, jumping!", "--out", tmp_path / "out"]
    code, out, _ = said(capsys, *command, "--json")
    plan = json.loads(out)
    assert code == 0 and plan["clips"] == 2 and plan["manifest"] == "--prompt"
    assert "1 of 2 prompts has words that demo never saw ('fox', 'jumping')" in plan["manifest_notes"][0]
    assert "never saw" not in said(capsys, *command, "--model", "tiny")[1]     # it may know any word


def test_a_mapping_comes_from_flags_and_file_and_what_is_only_carried_is_listed(manifest, capsys, tmp_path):
    path = manifest({"caption": ["a", "b"], "num_frames": [5, 9], "Seed": [1, 2], "mood": ["x", "y"]})
    command = ["plan", path, "--out", tmp_path / "out", "--model", "tiny"]
    code, out, err = said(capsys, *command)
    assert code == 2 and "--map caption=prompt" in err and "--map num_frames=frames" in err and "--map Seed=seed" in err
    config = tmp_path / "night.toml"
    config.write_text('[map]\ncaption = "prompt"\nnum_frames = ""\nSeed = ""\n')
    code, out, _ = said(capsys, *command, "--config", config, "--map", "num_frames=frames")
    assert code == 0 and "5 frames" in out
    assert "carried along to the ledger, and nothing else done with them: Seed, mood" in out
    code, out, _ = said(capsys, *command, "--config", config, "--json")
    assert json.loads(out)["user_columns"] == ["user.num_frames", "user.Seed", "user.mood"]
    for wrong, message in (("caption", "NAME=COLUMN"), ("caption=promt", "Did you mean prompt?"),
                           ("=prompt", "NAME=COLUMN")):
        code, _, err = said(capsys, *command, "--map", wrong)
        assert code == 2 and message in err and "--map must be" in err


def test_a_manifest_and_prompts_are_too_much_and_what_is_typed_stands_in_place_of_the_file(tmp_path):
    config = tmp_path / "night.toml"
    config.write_text('prompt = ["a", "b"]\nout = "o"\nmap = ["caption=prompt"]\n')
    assert RenderJob.read({}, config).prompt == ("a", "b") and RenderJob.read({}, config).map == {"caption": "prompt"}
    job = RenderJob.read({"manifest": ["m.csv"], "prompt": []}, config)
    assert (job.manifest, job.prompt, job.sources) == ("m.csv", (), ("m.csv",))
    assert RenderJob.read({"manifest": ["a.csv", "b.csv"]}, config).sources == ("a.csv", "b.csv")
    with pytest.raises(UsageError, match="a manifest or prompts, not both"):
        RenderJob.read({"manifest": ["m.csv"], "prompt": ["a"], "out": "o"})


def test_submit_ships_what_was_typed_or_piped_as_the_same_manifest(monkeypatch, tmp_path):
    shipped = []

    def submitted(manifest, out, address, arguments, *_):
        shipped.append((Path(manifest).name, Manifest.read(manifest).digest, arguments))
        return 0

    monkeypatch.setattr("dailies.jobs.submit.submit", submitted)
    target = ["--out", "s3://b/x", "--address", "http://h:1"]
    assert main(["submit", "--prompt", "a fox", "--prompt", "an owl", *target, "--map", "a=", "--map", "b=seed"]) == 0
    assert shipped[0] == ("prompts.jsonl", Manifest.read(prompts=["a fox", "an owl"]).digest,
                          ["--map", "a=", "--map", "b=seed"])
    for content, name in ((b"a fox\n", "stdin.txt"), (b"prompt,x\na,1\n", "stdin.csv"), (b'["a"]', "stdin.json"),
                          (gzip.compress(b'{"prompt": "a"}'), "stdin.json")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert main(["submit", "-", *target]) == 0
        assert shipped[-1][:2] == (name, hashlib.sha256(hashlib.sha256(content).digest()).hexdigest())
    assert main(["submit", "a.csv", "b.csv", *target]) == 2


def test_submit_reads_the_images_of_a_mapped_manifest(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_bytes(png())
    (tmp_path / "m.csv").write_text("caption,img\na,images/x.png\n")
    arguments = ["--map", "img=image", "--map", "caption=prompt"]
    assert mapping_in(arguments) == {"img": "image", "caption": "prompt"}
    pack_parcel(tmp_path / "packed", str(tmp_path / "m.csv"), arguments)
    assert (tmp_path / "packed" / "manifest" / "images" / "x.png").is_file()
