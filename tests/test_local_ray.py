"""What a local Ray is given: a folder for this run alone, its token and environment; advice where it does not start."""

import errno
import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dailies.pipeline.scheduler import local_ray
from dailies.pipeline.scheduler.executor import ClusterError
from dailies.pipeline.scheduler.local_ray import (
    LONGEST,
    OWNER,
    PREFIX,
    SESSION,
    advice,
    environment,
    folder_in,
    paths_kept,
    session_folder,
    short_places,
    tidy,
)

LONG = "slurm-job-1355700.node0016/scratch-of-this-job-on-this-node"


@pytest.fixture
def place():
    """A short folder, as sockets need it; pytest's own are long."""
    with tempfile.TemporaryDirectory(prefix="p-", dir="/tmp") as folder:
        yield Path(folder)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_runs_folder_is_its_users_alone_and_gone_at_its_end(place):
    before, env = os.umask(0), {"RAY_TMPDIR": str(place)}
    try:
        with session_folder(env) as folder, session_folder(env) as another:
            assert folder.parent == another.parent == place and folder != another
            assert mode(folder) == 0o700 and mode(folder / "token") == 0o600 and mode(folder / OWNER) == 0o600
            tokens = [(each / "token").read_text() for each in (folder, another)]
            assert len(set(tokens)) == 2 and all(len(token) == 64 for token in tokens)
            (folder / SESSION / "session" / "sockets").mkdir(parents=True)
        assert list(place.iterdir()) == []
    finally:
        os.umask(before)


def test_it_is_gone_when_the_run_ends_badly_too(place):
    with pytest.raises(KeyboardInterrupt), session_folder({"RAY_TMPDIR": str(place)}):
        raise KeyboardInterrupt
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("environ", [{}, {"TMPDIR": f"/tmp/{LONG}"}, {"TMPDIR": "/no/such/folder"}, {"TMPDIR": "rel"}])
def test_sockets_go_where_the_path_is_short_whatever_tmpdir_says(environ):
    with session_folder(environ) as folder:
        assert folder.parent == Path("/tmp") and len(str(folder / SESSION)) <= LONGEST


def test_where_tmp_will_not_do_the_next_place_is_taken(place):
    (open_to_all := place / "all").mkdir()
    open_to_all.chmod(0o777)                            # no sticky bit: others may rename what lies there
    (long := place / LONG).mkdir(parents=True)
    with folder_in([place / "absent", open_to_all, long, place]) as folder:
        assert folder.parent == place
    with pytest.raises(ClusterError, match="No such file.*no sticky bit.*too long.*RAY_TMPDIR=/a/short/path"):
        with folder_in([place / "absent", open_to_all, long]):
            pass
    assert short_places({"TMPDIR": "/scratch", "XDG_RUNTIME_DIR": "/run/user/7"}) == [
        Path(name) for name in ("/tmp", "/scratch", "/run/user/7", "/var/tmp")]


def test_a_full_disk_is_passed_over_and_said(place, monkeypatch):
    monkeypatch.setattr(local_ray, "_LEAST_BYTES", 2**62)
    with pytest.raises(ClusterError, match="MB are free"), session_folder({}):
        pass


def test_a_long_ray_tmpdir_holds_the_files_and_a_short_place_the_door_to_it(place):
    (asked := place / LONG).mkdir(parents=True)
    with session_folder({"RAY_TMPDIR": str(asked)}) as folder:
        assert folder.parent == Path("/tmp") and len(str(folder / SESSION)) <= LONGEST
        (folder / SESSION / "log").write_text("x")
        inside, = asked.iterdir()
        assert (inside / SESSION / "log").exists() and mode(inside) == 0o700
    assert list(asked.iterdir()) == [] and not folder.exists()


def test_a_ray_tmpdir_that_will_not_do_is_named(place):
    for asked, word in (("/no/such/folder", "RAY_TMPDIR: /no/such/folder: No such file"),
                        ("here", "absolute path; got 'here'")):
        with pytest.raises(ClusterError, match=word), session_folder({"RAY_TMPDIR": asked}):
            pass


def test_what_a_killed_run_left_the_next_one_removes_and_nothing_else(place, tmp_path):
    kill = ("import os, sys\nfrom pathlib import Path\nfrom dailies.pipeline.scheduler import local_ray\n"
            "with local_ray.session_folder({'RAY_TMPDIR': sys.argv[1]}) as folder:\n"
            "    print(folder, flush=True)\n    os.kill(os.getpid(), 9)\n")
    dead = Path(subprocess.run([sys.executable, "-c", kill, place], stdout=subprocess.PIPE, text=True,
                               timeout=60).stdout.strip())
    (dead / SESSION / "session").mkdir()
    (kept := tmp_path / "kept").write_text("x")
    (dead / SESSION / "link").symlink_to(tmp_path)
    (place / f"{PREFIX}link").symlink_to(tmp_path)
    for name in ("begun", "old", "elsewhere"):          # begun: between its folder and its lock
        (place / f"{PREFIX}{name}").mkdir()
    os.utime(place / f"{PREFIX}old", (0, 0))
    (place / f"{PREFIX}elsewhere" / OWNER).write_text("of another kernel, which shares this disk")
    (place / "mine").mkdir()
    with session_folder({"RAY_TMPDIR": str(place)}) as living:
        tidy(place)
        assert {path.name for path in place.iterdir()} == {
            living.name, "mine", *(f"{PREFIX}{name}" for name in ("begun", "elsewhere", "link"))}
    assert kept.exists() and living.name.startswith(PREFIX)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to make another user's folder")
def test_another_users_folder_is_left_alone(place):
    (theirs := place / f"{PREFIX}theirs").mkdir()
    os.chown(theirs, 65534, 65534)
    os.utime(theirs, (0, 0))
    tidy(place)
    assert theirs.exists()


def test_rays_processes_get_an_environment_of_their_own(place, monkeypatch):
    (place / "home").mkdir()
    home = str(place / "home")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    given = {"RAY_ADDRESS": "10.0.0.7:6379", "RAY_AUTH_TOKEN": "mine", "PATH": "/bin"}
    changes = environment(place, given)
    assert changes["RAY_AUTH_TOKEN_PATH"] == str(place / "token") and changes["PYTHONSAFEPATH"] == "1"
    assert changes["RAY_ADDRESS"] is changes["RAY_AUTH_TOKEN"] is None and "PATH" not in changes
    assert changes["TRITON_CACHE_DIR"] == f"{home}/.cache/dailies/compiled/triton"
    assert "TRITON_CACHE_DIR" not in environment(place, given | {"TRITON_CACHE_DIR": "/x"})
    Path(home, ".cache/dailies/compiled").chmod(0o777)  # others could put their code there
    assert environment(place, given)["TORCHINDUCTOR_CACHE_DIR"] == f"{place}/compiled/inductor"
    monkeypatch.setenv("HOME", str(place / "no-home"))
    assert environment(place, given)["TORCHINDUCTOR_CACHE_DIR"] == f"{place}/compiled/inductor"
    assert not (place / "no-home").exists()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with local_ray.changed(changes):
        assert "RAY_ADDRESS" not in os.environ and os.environ["PYTHONSAFEPATH"] == "1"
    assert os.environ["RAY_ADDRESS"] == "10.0.0.7:6379" and "PYTHONSAFEPATH" not in os.environ


def test_workers_never_import_from_the_folder_that_the_command_was_given_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    elsewhere = str(Path(__file__).parent)
    monkeypatch.setattr(sys, "path", [elsewhere])
    assert paths_kept([str(tmp_path), elsewhere, ".", str(tmp_path / "link")]) == [elsewhere]
    assert environment(tmp_path, {"PYTHONPATH": f":{elsewhere}:{tmp_path}"})["PYTHONPATH"] == elsewhere
    assert environment(tmp_path, {"PYTHONPATH": ":"})["PYTHONPATH"] is None
    for path in ("", str(tmp_path)):                    # a driver that imports from there: `python -c`, a checkout
        monkeypatch.setattr(sys, "path", [path, elsewhere])
        assert paths_kept([str(tmp_path), elsewhere]) == [str(tmp_path), elsewhere]


def test_a_working_directory_that_has_been_deleted_is_left(place, monkeypatch):
    (gone := place / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert paths_kept(["/usr/lib", "lib", "."]) == ["/usr/lib"]
    local_ray.stand_somewhere(place)
    assert os.getcwd() == str(place)
    monkeypatch.chdir("/")
    local_ray.stand_somewhere(place)
    assert os.getcwd() == "/"


@pytest.mark.parametrize("error, log, step", [
    (OSError(errno.ENOSPC, "No space left on device"), "", "is full: make room"),
    (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "", "is full: make room"),
    (OSError(errno.EROFS, "Read-only file system", "/.ray"), "", "may not be written"),
    (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "", "ulimit -n"),
    (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "", "ulimit -u"),
    (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "", "out of memory"),
    (OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes"), "", "RAY_TMPDIR"),
    (OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)), "", "RAY_.PORT"),
    (RuntimeError("The current node timed out during startup."), "", "too busy"),
    (RuntimeError("The current node timed out during startup."),
     "[2026-11-30 02:18:08,011 C 8 8] (raylet) No space left on device", "is full: .*Ray's log says: .*No space left"),
    (RuntimeError("Failed to start"), "[2026-11-30 02:18:08 E 30 30] (gcs_server) bind: Address already in use",
     "RAY_.PORT.*log says"),
    (RuntimeError("Failed to start GCS"), "WARNING http_server_agent.py: Error: Address already in use", "too busy"),
    (RuntimeError("Failed to start"), "[2026-11-30 02:18:08 I 30 30] Too many open files are no matter", "too busy"),
])
def test_every_failure_of_rays_start_has_its_own_advice(error, log, step, place):
    logs = place / "f" / SESSION / "session_2026-11-30" / "logs"
    logs.mkdir(parents=True)
    (logs / "gcs_server.out").write_text(f"[I] hello\n{log}\n")
    wrapped = RuntimeError("Ray has failed")
    wrapped.__cause__ = error
    for each in (error, wrapped):
        assert re.search(step, advice(each, place / "f")), advice(each, place / "f")
