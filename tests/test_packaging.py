"""What is installed: one name in site-packages, with every file that it needs, whatever else is called kernels
there."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_house import ORDER, ROOT, module_name, modules, needs_absent_library, tracked

FOLDERS = {*ORDER, "dailies", "infra"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel of this checkout, built without a network and unpacked as pip would."""
    pytest.importorskip("setuptools", "77", reason="needs setuptools 77 or newer: make test installs it")
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    # built elsewhere: a folder build/ would be taken along next time
    for path in tracked():
        name = path.relative_to(ROOT)
        if len(name.parts) == 1 or name.parts[0] in FOLDERS:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, source / name)
    script = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(made)!r}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    with zipfile.ZipFile(made / done.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(made / "site-packages")
    return made / "site-packages"


def run_installed(installed: Path, args: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {
        "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(cwd)} | env
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=240,
                          stdin=subprocess.DEVNULL)


def test_only_dailies_lies_at_the_top_of_site_packages(installed):
    tops = {path.name for path in installed.iterdir()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"dailies"}


def test_the_wheel_has_every_file_that_runs_and_no_test(installed):
    wanted = {path.relative_to(ROOT) for path in tracked() if path.relative_to(ROOT).parts[0] in FOLDERS
              and path.suffix in (".py", ".typed", ".safetensors", ".json", ".yaml", ".model", ".html", ".css", ".js",
                                   ".svg")}
    wanted = {name if name.parts[0] == "dailies" else "dailies" / name for name in wanted}
    found = {path.relative_to(installed) for path in (installed / "dailies").rglob("*") if path.is_file()}
    assert found == wanted


def test_every_module_of_the_wheel_is_its_own_beside_other_packages_of_these_names(installed, tmp_path):
    """Hugging Face's kernels, and a model.py or av.py of one's own, lie on the path before and behind it."""
    (tmp_path / "site" / "kernels").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "__init__.py").write_text("def get_kernel(): return 'theirs'\n")
    for name in ("model", "actors", "pipeline", "jobs", "infra"):
        (tmp_path / "site" / f"{name}.py").write_text("raise SystemExit('not ours')\n")
    absent = needs_absent_library()
    names = [name for path in modules() if path.name != "__main__.py" and path.relative_to(ROOT).parts[0] != "infra"
             and (name := module_name(path)) not in absent]
    script = (f"import importlib, sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
              f"for name in {names!r}: importlib.import_module(name)\n"
              "import kernels; assert kernels.get_kernel() == 'theirs'\n"
              "print(*{module.__file__ for name, module in sys.modules.items() if name.partition('.')[0] == 'dailies'"
              " and module.__file__}, sep='\\n')\n")
    done = run_installed(installed, ["-c", script], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path for path in done.stdout.split() if not Path(path).is_relative_to(installed)] == []


def test_the_installed_program_answers_and_knows_its_models(installed, tmp_path):
    for args, word in ((["--help"], "render"), (["models"], "demo"), (["models", "demo"], "dailies/model/demo (")):
        done = run_installed(installed, ["-m", "dailies", *args], tmp_path)
        assert done.returncode == 0 and word in done.stdout, done.stderr


def test_no_file_of_the_folder_that_it_is_called_in_is_taken_for_a_module(installed, tmp_path):
    """Whatever their names: all of Python's, but those that Python looks for there before any program begins, and those
    of dailies/__init__.py; and the libraries' that are wanted."""
    code = "import runpy, sys, typing, pathlib; print(*sys.modules)"
    early = {name.partition(".")[0] for name in run_installed(installed, ["-c", code], tmp_path).stdout.split()}
    public = {name for name in sys.stdlib_module_names if not name.startswith("_") and name not in ("nt", "winreg")}
    names = (public | {"typer", "click", "rich", "yaml", "torch", "pyarrow"}) - early
    assert {"json", "select", "copy", "logging", "subprocess", "signal", "inspect"} <= names
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the folder')\n")
    for args, word in ((["--help"], "render"), (["models", "demo"], "dailies/model/demo (")):
        # the folder is the first place to look, and the last
        done = run_installed(installed, ["-m", "dailies", *args], tmp_path, PYTHONSAFEPATH="",
                             PYTHONPATH=f"{installed}{os.pathsep}")
        assert done.returncode == 0 and word in done.stdout, done.stderr


EXAMPLE = """
import runpy, sys
main = runpy.run_path({example!r})["main"]
assert main({out!r}) == 0
print("again")
assert main({out!r}) == 0
loaded = [name for name in sys.modules if name in ("ray", "typer") or name.startswith("dailies.jobs")]
assert not loaded, loaded
"""


def test_an_installed_dailies_renders_three_clips_for_a_program_without_command_line_and_ray(installed, tmp_path):
    """With a stage of the program's own among them, whose seconds are told; and none of them twice."""
    script = EXAMPLE.format(example=str(ROOT / "examples" / "render_three.py"), out=str(tmp_path / "out"))
    done = run_installed(installed, ["-c", script], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    first, _, again = done.stdout.partition("again\n")
    clips = list((tmp_path / "out" / "clips").glob("*/*.mp4"))
    assert len(clips) == 3 and (tmp_path / "out" / "_SUCCESS.json").is_file()
    assert first.count("sampled: ") == 3 and first.count("announce 0.") == 3 and first.count("done clips/") == 3
    assert "sampled: " not in again and again.count("done clips/") == 3
