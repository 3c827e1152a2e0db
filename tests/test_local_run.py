"""One local run in the worst of places, looked at from outside while it lasts and afterwards.

Its working directory is full of modules of the same names, its home cannot be, its TMPDIR is long, its environment
full of secrets. It has real Ray processes and a tiny model.
"""

import os
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dailies.pipeline.scheduler.local_ray import PREFIX

HERE = Path(__file__).resolve().parent
SECRETS = {"AWS_ACCESS_KEY_ID": "AKID-stays-at-home-1", "AWS_SECRET_ACCESS_KEY": "secret-stays-at-home-2",
           "AWS_SESSION_TOKEN": "session-stays-at-home-3", "HF_TOKEN": "hub-stays-at-home-4",
           "MY_DATABASE_PASSWORD": "password-stays-at-home-5"}
HANG_S = 500
IN_THE_WAY = ["model", "pipeline", "actors", "kernels", "jobs", "av", "torch", "ray", "numpy", "typer", "token", "re",
              "json", "sitecustomize"]


@dataclass
class Seen:
    """What there was to see of a run from outside."""

    code: int = 0
    printed: str = ""
    out: Path = Path()
    kept: Path = Path()                                 # every file that Ray wrote, as it was at its end
    listening: dict[int, set[str]] = field(default_factory=dict)        # process -> addresses
    modes: dict[str, int] = field(default_factory=dict)                 # the run's folders -> permissions
    left: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("run")
    (here := folder / "here").mkdir()
    for name in IN_THE_WAY:
        (here / f"{name}.py").write_text("raise ImportError('taken from the working directory')\n")
        (here / name).mkdir()
    (here / "night.csv").write_text("prompt,frames\na fox,5\nanother fox,9\n")
    (long := folder / "a-temporary-folder-of-a-batch-system-whose-path-is-too-long-for-a-socket").mkdir()
    (folder / "kept").mkdir()
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as place:
        env = {**os.environ, **SECRETS, "RAY_TMPDIR": place, "TMPDIR": str(long), "HOME": "/dev/null/home",
               "AWS_EC2_METADATA_DISABLED": "true", "PYTHONPATH": str(HERE.parent)}
        seen = Seen(out=here / "out", kept=folder / "kept")
        with open(folder / "printed", "w") as printed:
            # -P: as the installed program, which does not import from the working directory
            process = subprocess.Popen([sys.executable, "-P", "-c", PROGRAM, "render", "night.csv", "--model", "tiny",
                                        "--out", "out"], cwd=here, env=env, stdout=printed, stderr=printed)
            try:
                until = time.monotonic() + HANG_S
                while process.poll() is None and time.monotonic() < until:
                    look(Path(place), process.pid, seen)
                    time.sleep(0.2)
            finally:
                process.kill()
        seen.code, seen.printed = process.wait(), (folder / "printed").read_text()
        seen.left = os.listdir(place)
    yield seen


PROGRAM = (f"import sys; sys.path.append({str(HERE)!r}); import tiny; "
           "from dailies.jobs.cli import main; sys.exit(main())")


def look(place: Path, driver: int, seen: Seen) -> None:
    """Link what is written, so that it outlives its folder; note who listens where, and who may enter."""
    for path in place.glob(f"{PREFIX}*/**/*"):
        try:
            if stat.S_ISREG(path.lstat().st_mode) and not (link := seen.kept / str(path.lstat().st_ino)).exists():
                os.link(path, link)
            if path.parent.parent == place and path.name == "r":
                seen.modes[str(path.parent)] = stat.S_IMODE(path.parent.stat().st_mode)
        except OSError:                                 # gone, meanwhile
            continue
    for pid in children_of(driver):
        seen.listening.setdefault(pid, set()).update(addresses(pid))


def children_of(pid: int) -> set[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def addresses(pid: int) -> set[str]:
    """Where a process listens: "127.0.0.1:80", IPv6 as the kernel writes it."""
    try:
        sockets = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    except OSError:
        return set()
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, = line.split()
            if state == "0A" and f"socket:[{line.split()[9]}]" in sockets:
                found.add(local)
    return found


def test_a_clip_is_made_wherever_the_command_is_given(run):
    """With model.py, av.py and others beside the manifest, no home, and a TMPDIR too long for sockets."""
    assert run.code == 0, run.printed
    assert len(list(run.out.glob("clips/*/*.mp4"))) == 2 and (run.out / "_SUCCESS.json").exists()
    assert "starting Ray on this machine" in run.printed


def test_a_local_run_listens_on_loopback_only(run):
    found = {address for each in run.listening.values() for address in each}
    loopback = re.compile(r"0100007F:|0000000000000000FFFF00000100007F:|00000000000000000000000001000000:")
    assert len(found) >= 8, run.listening               # the driver, GCS, raylet, agents, three workers
    assert [address for address in found if not loopback.match(address)] == []


def test_nobody_else_enters_the_folder_of_a_local_run_and_nothing_of_it_stays(run):
    assert list(run.modes.values()) == [0o700]
    assert run.left == []


def test_what_the_environment_keeps_secret_is_written_nowhere(run):
    """Not into the run folder, not to the terminal, and not into what Ray writes about its processes."""
    env = {**os.environ, **SECRETS, "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1"}
    urls = ["http://127.0.0.1:9", f"http://user:{SECRETS['AWS_SECRET_ACCESS_KEY']}@127.0.0.1:9"]
    refused = [subprocess.run([sys.executable, HERE / "tiny.py", "render", run.out.parent / "night.csv", "--model",
                               "tiny", "--out", "s3://bucket/run"], capture_output=True, text=True, timeout=120,
                              env=env | {"AWS_ENDPOINT_URL": url}) for url in urls]
    assert [each.returncode for each in refused] == [5, 2], [each.stderr for each in refused]
    printed = run.printed + "".join(each.stdout + each.stderr for each in refused)
    written = {path: path.read_bytes() for folder in (run.out, run.kept) for path in folder.rglob("*")
               if path.is_file()}
    assert any(b"gcs_server" in content for content in written.values())        # Ray's logs are among them
    assert any(path.name == "run.json" for path in written)
    assert "stays-at-home" not in printed
    assert [str(path) for path, content in written.items() if b"stays-at-home" in content] == []
