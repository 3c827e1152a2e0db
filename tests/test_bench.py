"""dailies bench as it runs where little is installed: no Ray, PyAV, pydantic, boto3, ftfy, typer, and no git."""

import os
import shutil
import subprocess

import pytest
from bare import ABSENT, ROOT, run_bare

from dailies.jobs.bench.machine import commit_in

# tiny sizes, one clip, and no waiting for good times
QUICK = """
import sys
from dailies.jobs.bench import command as bench, clip as bench_clip, kernels as bench_kernels
from dailies.kernels import cases
bench_kernels.SECONDS = 0
cases.CPU_TOKENS = cases.Tokens(tokens=5, width=64, heads=1)
cases.CPU_LAYERS = cases.layers_of_block(40, 64, 96)
cases.CPU_ATTENTION = cases.Attention(queries=130, keys=130, heads=1, head_dim=64)
bench_clip._CLIPS = 1
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
    done = run_bare(["-m", "dailies.jobs.bench", *arguments], tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert said in done.stderr


def test_the_tests_that_need_a_gpu_are_found_where_little_is_installed(tmp_path):
    done = run_bare(["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "error" not in done.stdout and "skipped" in done.stdout


def test_a_file_of_tests_that_needs_an_absent_library_is_skipped_and_says_so(tmp_path):
    done = run_bare(["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/test_clip_writer.py"], tmp_path)
    assert "1 skipped" in done.stdout and "needs av, which is not installed: make test" in done.stdout, done.stdout


def test_a_test_that_imports_what_we_do_not_have_is_an_error_all_the_same(tmp_path):
    (tmp_path / "test_wrong.py").write_text("import dailies.jobs.nothing\n")
    done = run_bare(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"),
                     "--confcutdir", "/", "-p", "conftest", str(tmp_path / "test_wrong.py")], tmp_path,
                    PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT), str(ROOT / "tests"))))
    assert done.returncode == 2 and "No module named 'dailies.jobs.nothing'" in done.stdout, done.stdout


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
