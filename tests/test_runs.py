"""What can be asked of a run folder, and how the program ends."""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dailies.jobs.cli import main
from dailies.pipeline.run.pace import WAIT_AND_WORK, pace

ROOT = Path(__file__).resolve().parent.parent
EVENING = datetime(2026, 1, 31, 22, 0, tzinfo=UTC)


def row(number, after_s, *, status="done", worker="publish-1@host", **seconds):
    """A ledger row that was written so long after the evening began."""
    return {"clip_id": f"{number:064x}", "status": status, "worker": worker,
            "finished_at": EVENING + timedelta(seconds=after_s), "sample_s": 10.0, **seconds}


def rate(*rows):
    names = ["status", "clip_id", "finished_at", "worker", *WAIT_AND_WORK]
    return pace({name: [row.get(name) for row in rows] for name in names})[0]


def test_a_rate_counts_clips_that_were_made_over_the_time_in_which_they_were():
    hour = [row(number, 20 * number + 10) for number in range(180)]
    assert rate(*(row(number, 10 * number + 10) for number in range(180))) == pytest.approx(360)
    assert rate(*hour) == pytest.approx(360)            # between two of them nothing was made
    assert rate(*hour, *(row(1000 + number, 3000, status="failed") for number in range(500))) == pytest.approx(360)
    assert rate(*hour, *(row(1000 + number, 3000, worker=None) for number in range(500))) == pytest.approx(360)
    assert rate(*hour, *hour) == pytest.approx(360)     # rows that share a clip
    # on two machines at a time; and a night before this one, which is long over
    assert rate(*hour, *(row(1000 + number, 20 * number + 10) for number in range(180))) == pytest.approx(720)
    assert rate(row(1, -86_400), *hour) == pytest.approx(360)


def test_rows_that_were_written_in_one_moment_make_no_rate_of_their_own():
    assert rate(*(row(number, 1e-4 * number, status="failed") for number in range(8))) is None
    assert rate(*(row(number, 1e-4 * number, sample_s=None) for number in range(8))) is None
    assert rate(row(1, 75, queue_s=64.0, sample_s=1.0), row(2, 76, queue_s=65.0, sample_s=1.0)) == pytest.approx(
        2 * 3600 / 66)
    assert rate() is None


# How the program ends.

def program(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, stderr=subprocess.PIPE, timeout=120, **options)


LEAVES = """
import atexit, sys, tempfile, threading, time
from dailies.jobs.process import leave, speak_safely
speak_safely()
folder = tempfile.TemporaryDirectory(dir=sys.argv[1])
atexit.register(lambda: print("at the end"))
threading.Thread(target=time.sleep, args=(3600,)).start()
print("said", end="")
leave(3)
"""


def test_the_program_leaves_with_its_exit_code_whatever_its_threads_do(tmp_path):
    """A thread of a C library that asks for the interpreter at its end aborts it; tests/exit_codes.py counts that."""
    done = program("-c", LEAVES, tmp_path, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"saidat the end\n", b"")
    assert list(tmp_path.iterdir()) == []


def test_what_nobody_reads_ends_no_command_and_changes_no_exit_code():
    read, write = os.pipe()
    os.close(read)
    lines = ("from dailies.jobs.process import *\nspeak_safely()\n"
             "for _ in range(9999): print('line'); print('line', file=sys.stderr)\n")
    for code in (0, 3):
        assert subprocess.run([sys.executable, "-c", f"{lines}\nleave({code})"], cwd=ROOT, stdout=write, stderr=write,
                              timeout=120).returncode == code
    done = program("-m", "dailies", "render", "--help", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
    with open("/dev/full", "wb") as full:               # a log on a full disk: what is not written is told of
        done = program("-m", "dailies", "--help", stdout=full)
    assert done.returncode == 1 and b"could not be written: No space left" in done.stderr
    with open("/dev/full", "wb") as full:               # nor does a log that fills up in the middle end a night
        done = program("-c", f"{lines}\nleave(0)", stdout=full)
    said, last = done.stderr.splitlines()[:-1], done.stderr.splitlines()[-1]
    assert (done.returncode, said) == (1, [b"line"] * 9999) and b"could not be written: No space left" in last


def test_a_terminal_that_knows_no_other_letters_gets_them_in_numbers():
    code = "from dailies.jobs.process import *\nspeak_safely()\nprint('日本 \\udcfc é')\nleave(0)"
    done = program("-c", code, stdout=subprocess.PIPE,
                   env={**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stdout) == (0, b"\\u65e5\\u672c \\udcfc \xe9\n")


@pytest.mark.parametrize("arguments", [
    ["render", "one.parquet", "--out", "r\udcfcn"], ["plan", "n\udcfc.csv", "--out", "out"], ["status", "r\udcfcn"],
    ["verify", "r\udcfcn"], ["models", "--weights", "\udcff"], ["render", "m.csv", "--out", "o", "--config", "\udcff"],
    ["submit", "m.csv", "--out", "/r\udcfcn", "--address", "http://h:1"]], ids=lambda arguments: arguments[0])
def test_a_name_that_is_no_text_is_one_message_and_exit_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert "has bytes that are no text" in said.err and "Rename it" in said.err and said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_program_says_its_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dailies ")


@pytest.mark.parametrize("library", ["typer", "pydantic", "pyarrow", "torch"])
def test_a_library_that_is_not_installed_is_a_sentence_and_exit_5(library, tmp_path):
    """As on the head of a cluster that has Ray and little else, to which a job was submitted."""
    code = (f"import sys, runpy; sys.modules[{library!r}] = None; "
            f"sys.argv = ['dailies', 'render', 'm.csv', '--out', {str(tmp_path / 'out')!r}]; "
            "runpy.run_module('dailies', run_name='__main__')")
    done = program("-c", code, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 5 and "Traceback" not in done.stderr
    assert f"the Python package {library} is not installed" in done.stderr and "every machine" in done.stderr


LONG = "x" * 300


@pytest.mark.parametrize("arguments", [
    ["status", LONG], ["verify", f"a/{LONG}/b"], ["retry", "d/" * 2500], ["render", "m.csv", "--out", LONG],
    ["plan", "m.csv", "--out", "ü" * 200], ["render", LONG, "--out", "o"], ["plan", f"{LONG}/*.csv"],
    ["plan", "m.csv", "--weights", LONG], ["models", "demo", "--weights", LONG], ["status", f"file:///{LONG}"],
    ["render", "m.csv", "--out", "s3://bucket/" + "k/" * 600], ["render", "m.csv", "--out", "o", "--config", LONG],
    ["convert", LONG, "--model", "demo", "--to", "w"]], ids=lambda arguments: f"{arguments[0]} {arguments[-1][:9]}")
def test_a_name_that_is_too_long_is_one_message_and_exit_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.csv").write_text("prompt\na red circle\n")
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert "too long" in said.err.lower() or "is longer than" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]


def test_a_folder_below_one_whose_name_is_no_text_is_one_message_and_exit_2(capsys, tmp_path, monkeypatch):
    (folder := tmp_path / "r\udcfcn").mkdir()
    monkeypatch.chdir(folder)
    for arguments in (["render", "m.csv", "--out", "out"], ["status", "out"]):
        assert main(arguments) == 2 and "has bytes that are no text" in capsys.readouterr().err
    assert list(folder.iterdir()) == []
