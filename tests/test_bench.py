"""dailies bench as it runs where little is installed: no Ray, PyAV, pydantic, boto3, ftfy, typer, and no git."""

import json as jsonlib
import os
import shutil
import subprocess
import threading

import pytest
from bare import ABSENT, ROOT, run_bare

from jobs import bench, bench_model, cli
from jobs.bench import commit_in

# tiny sizes, one clip, and no waiting for good times
QUICK = """
import sys
from jobs import bench, bench_clip, bench_kernels
from kernels import cases
bench_kernels.SECONDS = 0
cases.CPU_TOKENS = cases.Tokens(tokens=5, width=64, heads=1)
cases.CPU_LAYERS = cases.layers_of_block(40, 64, 96)
cases.CPU_ATTENTION = cases.Attention(queries=130, keys=130, heads=1, head_dim=64)
bench_clip.CLIPS = 1
sys.exit(bench.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("arguments, said", [
    (["kernels"], "kernels: sparse attention"),
    (["clip", "demo", "--ways", "fp32:dense"], "mp4 not timed: av is not installed"),
    (["clip", "demo-turbo", "--random-weights", "--ways", "int8:sparse", "--frames", "9"],
     "int8, sparse attention: encode s")],
    ids=("kernels", "a clip", "a clip of random weights"))
def test_a_part_is_timed_where_little_is_installed(arguments, said, tmp_path):
    done = run_bare(["-c", QUICK, *arguments], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert said in done.stdout and "failed" not in done.stdout, done.stdout


@pytest.mark.parametrize("arguments, said", [
    (["nothing"], "bench has no part 'nothing'"),
    (["clip", "nothing", "--random-weights"], "no model is called 'nothing'"),
    (["pipeline"], "bench pipeline needs ray, which is not installed: pip install ray")])
def test_what_cannot_be_measured_there_is_one_sentence(arguments, said, tmp_path):
    done = run_bare(["-m", "jobs.bench", *arguments], tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert said in done.stderr


def test_the_tests_that_need_a_gpu_are_found_where_little_is_installed(tmp_path):
    done = run_bare(["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "error" not in done.stdout and "skipped" in done.stdout


def test_a_file_of_tests_that_needs_an_absent_library_is_skipped_and_says_so(tmp_path):
    done = run_bare(["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/test_clip_writer.py"], tmp_path)
    assert "1 skipped" in done.stdout and "needs av, which is not installed: pip install" in done.stdout, done.stdout


def test_a_test_that_imports_what_we_do_not_have_is_an_error_all_the_same(tmp_path):
    (tmp_path / "test_wrong.py").write_text("import jobs.nothing\n")
    done = run_bare(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"),
                     "--confcutdir", "/", "-p", "conftest", str(tmp_path / "test_wrong.py")], tmp_path,
                    PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT), str(ROOT / "tests"))))
    assert done.returncode == 2 and "No module named 'jobs.nothing'" in done.stdout, done.stdout


def test_the_libraries_are_indeed_absent_there(tmp_path):
    script = f"""
import importlib.util, shutil
assert not [name for name in {ABSENT!r} if importlib.util.find_spec(name)]
assert shutil.which("git") is None"""
    done = run_bare(["-c", script], tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_commit_is_read_without_git(tmp_path):
    def git(*arguments):
        return subprocess.run(["git", "-C", str(tmp_path / "it"), "-c", "user.name=a", "-c", "user.email=a@b",
                               *arguments], check=True, capture_output=True, text=True).stdout.strip()

    if shutil.which("git") is None:
        pytest.skip("needs git, to compare with")
    (tmp_path / "it").mkdir()
    git("init", "--quiet")
    assert commit_in(tmp_path / "it" / ".git") is None
    git("commit", "--quiet", "--allow-empty", "--message", "first")
    assert commit_in(tmp_path / "it" / ".git") == git("rev-parse", "HEAD")
    git("worktree", "add", "--quiet", "-b", "side", str(tmp_path / "side"))
    assert commit_in(tmp_path / "side" / ".git") == git("rev-parse", "side")
    git("pack-refs", "--all")
    assert commit_in(tmp_path / "side" / ".git") == git("rev-parse", "side")
    git("checkout", "--quiet", "--detach")
    assert commit_in(tmp_path / "it" / ".git") == git("rev-parse", "HEAD")
    assert commit_in(tmp_path / "nothing") is None


def told(*cases, ends=None):
    def rows():
        """Some part. And more of it."""
        yield from cases
        if ends:
            raise ends
    return rows


def test_every_part_is_named_before_it_is_measured_and_a_line_comes_when_it_is_known(capsys):
    assert bench.run({"one": told(("a", {"s": 1.0})), "two": told(("b", {"s": 2.0}))}, json=False, alone=False) == 0
    _, parts, *lines = capsys.readouterr().out.splitlines()
    assert parts == "2 parts, one after the other: one, two; one alone: dailies bench NAME"
    assert lines == ["one: Some part", "one: a: s 1", "two: Some part", "two: b: s 2"]


@pytest.mark.parametrize("json", [False, True])
def test_ctrl_c_says_that_it_was_stopped_and_what_was_measured_stays(json, capsys):
    parts = {"one": told(("a", {"s": 1.0}), ends=KeyboardInterrupt()), "two": told(("b", {"s": 2.0}))}
    assert bench.run(parts, json=json, alone=False) == 130
    out, err = capsys.readouterr()
    assert err == "Stopped in part one, with 1 line measured. The same command begins anew.\n"
    if json:
        said = jsonlib.loads(out)
        assert said["stopped"] and said["cases"] == [{"part": "one", "case": "a", "s": 1.0}]
    else:
        assert "one: a: s 1" in out and "two: b" not in out


def test_a_part_that_is_silent_for_long_says_that_it_is_at_work():
    lines, said = [], threading.Event()
    with bench.Patience("one", lambda text: (lines.append(text), said.set()), every_s=0.01):
        assert said.wait(30)
    before = len(lines)
    assert lines[0] == "one: at work for 0 s"
    assert not threading.Event().wait(0.05) and len(lines) == before


def test_the_help_names_every_part(capsys):
    assert cli.main(["bench", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert ", ".join(bench.PARTS) + "; or gpu" in said


def test_a_peer_that_takes_too_long_costs_its_line_and_not_the_bench(monkeypatch):
    pytest.importorskip("diffusers", reason="needs diffusers, the peer: pip install 'dailies[dev]'")
    asked = []

    def measured(peer, dtype, folder, seconds):
        asked.append((peer, dtype))
        if peer == "diffusers":
            raise subprocess.TimeoutExpired(peer, seconds)
        return {"seconds": 2.0}

    monkeypatch.setattr(bench_model, "measured", measured)
    monkeypatch.setattr(bench_model, "write_inputs", lambda folder: None)
    found = list(bench_model.rows())
    assert [figures for _, figures in found] == 2 * [
        {"seconds": 2.0, "not timed": f"diffusers took more than {bench_model.SECONDS:.0f} s"}]
    assert asked == [(peer, dtype) for dtype in ("fp32", "bf16") for peer in ("dailies", "diffusers")]
