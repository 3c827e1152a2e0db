"""Run folders of the tiny model, made in this process: rows as a manifest, one command, and what came of it."""

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import tiny  # noqa: F401  adds the model to the catalogue
from one_process import main


def ask(*arguments):
    """Exit code, JSON answer and all that was printed, of one command in this process."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([*map(str, arguments), "--json"])
    assert "Traceback" not in out.getvalue() + err.getvalue()
    return code, json.loads(out.getvalue()), err.getvalue()


def said(*arguments):
    """Exit code and all that a person sees."""
    printed = StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        code = main([*map(str, arguments)])
    assert all(char.isprintable() or char == "\n" for char in printed.getvalue()), printed.getvalue()
    return code, printed.getvalue()


def write(path, rows):
    """A manifest of these rows, as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def render(manifest, out, *options):
    return ask("render", manifest, "--out", out, "--model", "tiny", "--device", "cpu", *options)


def rendered(rows, folder):
    """The folder, with these rows in night.jsonl and what was made of them in out."""
    assert render(write(folder / "night.jsonl", rows), folder / "out")[0] == 0
    return folder


def clips_of(out):
    """When each clip was written, by its name."""
    return {path.stem: path.stat().st_mtime_ns for path in out.glob("clips/*/*.mp4")}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
