"""What Ray needs on this machine for one run, and nobody else's: a folder, a token and an environment, gone at its end.

Left to itself Ray puts sockets and logs below /tmp/ray, opens them to everybody whatever the umask says, keeps them for
ever, and writes its token into the home. Here they lie in a folder that only this user can enter, whose path is short
enough for sockets; the token is made for this run. Nothing here imports Ray: cluster.py starts it.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from dailies.model.private import cache_folder, private_folder
from dailies.pipeline.scheduler.executor import ClusterError

PREFIX = "dailies-ray-"
OWNER = "owner"                         # the file in a run's folder that its driver keeps locked while it lives
SESSION = "r"                           # below it, what is Ray's: it opens all that it makes to everybody
LONGEST = 43                            # characters of SESSION's path: Ray's sockets below it take 64, and may take 107
_LEAST_BYTES = 64 * 2**20                # free on the disk of such a folder
OLD_S = 3600.0                          # of a folder without OWNER: who makes one has it within a second
REMOVING_S = 5.0                        # within which Ray's last processes have let go of what they write
CODE_CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
OF_OTHER_CLUSTERS = ("RAY_ADDRESS", "RAY_REDIS_ADDRESS", "RAY_GCS_SERVER_PORT", "RAY_AUTH_TOKEN")


@contextmanager
def session_folder(environ: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """The folder of this run, which is removed afterwards; before, those of runs that were killed are.

    In RAY_TMPDIR where that is set, or else in the first that will do of /tmp, TMPDIR, XDG_RUNTIME_DIR and /var/tmp.
    Raises ClusterError, with what is wrong with each of them.
    """
    asked = environ.get("RAY_TMPDIR")
    with folder_in(short_places(environ)) if not asked else folder_at(Path(asked), environ) as folder:
        (folder / SESSION).mkdir(exist_ok=True)
        with open(os.open(folder / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        yield folder


@contextmanager
def folder_at(asked: Path, environ: Mapping[str, str]) -> Iterator[Path]:
    """A folder there; where that path is too long for sockets, one in a short place, from which a link leads there."""
    if not asked.is_absolute():
        raise ClusterError(f"RAY_TMPDIR must be an absolute path; got {str(asked)!r}. Unset, /tmp is taken")
    with folder_in([asked], said="RAY_TMPDIR") as folder:
        if takes_sockets(folder):
            yield folder
            return
        (folder / SESSION).mkdir()
        try:
            with folder_in(short_places(environ)) as door:
                (door / SESSION).symlink_to(folder / SESSION)
                yield door
        except NoPlace as error:
            most = LONGEST - len(PREFIX) - 11
            raise ClusterError(f"RAY_TMPDIR={asked} is {len(os.fsencode(asked))} characters long, and Ray's sockets "
                               f"need a path of {most} or less. {error}") from None


class NoPlace(ClusterError):
    """None of the folders will do."""


def short_places(environ: Mapping[str, str]) -> list[Path]:
    names = ["/tmp", environ.get("TMPDIR"), environ.get("XDG_RUNTIME_DIR"), "/var/tmp"]
    return list(dict.fromkeys(Path(name) for name in names if name and os.path.isabs(name)))


@contextmanager
def folder_in(places: list[Path], said: str = "") -> Iterator[Path]:
    """A new folder of this user's alone in the first place that will do, locked while this process lives.

    said: the setting that named the place, which may then have a path of any length.  Raises NoPlace.
    """
    wrong = []
    for place in places:
        try:
            check_place(place)
            tidy(place)
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        except OSError as error:
            wrong.append(f"{place}: {error.strerror or error}")
            continue
        try:
            lock = own(folder)
            if not said:
                try_socket(folder)
            break
        except OSError as error:
            wrong.append(f"{place}: {error.strerror or error}")
            shutil.rmtree(folder, ignore_errors=True)
    else:
        advice = (f"Name another folder with {said}, or unset it" if said else
                  "Make room there, or name a folder of your own with RAY_TMPDIR=/a/short/path")
        within = f" in {said}" if said else ""
        raise NoPlace(f"Ray's sockets and logs have no place{within}: {'; '.join(wrong)}. {advice}")
    try:
        yield folder
    finally:
        remove(folder)
        os.close(lock)


def check_place(place: Path) -> None:
    """Raises OSError where a folder there could be exchanged by others, or has no room."""
    for each in (place.resolve(strict=True), *place.resolve().parents):
        mode = each.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(errno.EPERM, f"everybody may rename what lies in {each} (no sticky bit)")
    disk = os.statvfs(place)
    if disk.f_frsize * disk.f_bavail < _LEAST_BYTES:
        raise OSError(errno.ENOSPC, f"{disk.f_frsize * disk.f_bavail / 1e6:,.0f} MB are free, and "
                                    f"{_LEAST_BYTES / 1e6:,.0f} MB are needed")


def own(folder: Path) -> int:
    """Lock the folder for the life of this process: the descriptor.  Raises OSError where another tidied it away."""
    lock = os.open(folder / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(lock, kernel().encode())
        with suppress_no_locks():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(lock)
        raise
    return lock


@contextmanager
def suppress_no_locks() -> Iterator[None]:
    """Some network file systems have none: what is left there is not tidied away."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise


def kernel() -> str:
    """Which run of which kernel this is: on another, locks say nothing about who lives."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def takes_sockets(folder: Path) -> bool:
    try:
        try_socket(folder)
    except OSError:
        return False
    return True


def try_socket(folder: Path) -> None:
    """Raises OSError: the path is too long, or the file system has no sockets."""
    if len(os.fsencode(folder / SESSION)) > LONGEST:
        raise OSError(errno.ENAMETOOLONG, "the path is too long for sockets")
    with socket.socket(socket.AF_UNIX) as here:
        here.bind(str(folder / "s"))
    (folder / "s").unlink()


def tidy(place: Path) -> None:
    """Remove what runs of this user that were killed have left there. Whose driver lives keeps its own."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):                         # its driver lives, or another tidies too
            if is_left_over(folder):
                remove(folder, within_s=0.0)


def is_left_over(folder: Path) -> bool:
    """Raises OSError where its driver lives."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return False
    try:
        lock = os.open(folder / OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return time.time() - found.st_mtime > OLD_S
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.read(lock, 100).decode("ascii", "replace") == kernel()
    finally:
        os.close(lock)


def remove(folder: Path, within_s: float = REMOVING_S) -> None:
    """Ray's last processes may still write there: what they keep alive is left to the next run's tidy."""
    until = time.monotonic() + within_s
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists() or time.monotonic() > until:
            return
        time.sleep(0.1)


def environment(folder: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str | None]:
    """What Ray's processes on this machine, and those that they start, are to have set; None: not set.

    They import from where this process does, never from the folder that the command was given in.
    """
    changes: dict[str, str | None] = dict.fromkeys(OF_OTHER_CLUSTERS)
    changes |= {"RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",       # Ray's name for: this machine alone, on loopback
                # figures that nobody asks for, on ports that everybody knows: no such port, and Ray goes on without
                "AUTOSCALER_METRIC_PORT": "-1", "DASHBOARD_METRIC_PORT": "-1",
                "PYTHONSAFEPATH": "1"}
    if "PYTHONPATH" in environ:
        changes["PYTHONPATH"] = os.pathsep.join(paths_kept(
            entry or os.curdir for entry in environ["PYTHONPATH"].split(os.pathsep))) or None
    cache = code_cache(folder)
    for name, kind in CODE_CACHES.items():
        if not environ.get(name) and not (kind == "triton" and environ.get("TRITON_HOME")):
            changes[name] = str(cache / kind)
    return changes


def stand_somewhere(folder: Path) -> None:
    """Ray asks for the working directory, which may have been deleted meanwhile."""
    try:
        os.getcwd()
    except FileNotFoundError:
        os.chdir(folder)


def paths_kept(paths: Iterator[str] | list[str]) -> list[str]:
    """Without the working directory, where this process does not import from it either."""
    try:
        here = os.path.realpath(os.curdir)
    except FileNotFoundError:                           # it has been deleted
        return [path for path in paths if os.path.isabs(path)]
    mine = {os.path.realpath(path) for path in sys.path}        # "" is the working directory
    return [os.path.abspath(path) for path in paths if os.path.realpath(path) != here or here in mine]


def code_cache(folder: Path) -> Path:
    """Where compiled code is kept for the next run: in the user's cache, or in the run's folder where there is none.
    Never in a place of /tmp that everybody knows: whoever makes it first would have their code run."""
    cache = cache_folder()
    with suppress(OSError):
        if cache.parents[1].is_dir():                   # a home that is not there is not made
            compiled = private_folder(cache / "compiled", below=cache)
            if os.access(compiled, os.W_OK | os.X_OK):
                return compiled
    return folder / "compiled"


@contextmanager
def changed(changes: Mapping[str, str | None]) -> Iterator[None]:
    """This process's environment, with these changes for the time of the block."""
    before = {name: os.environ.get(name) for name in changes}
    try:
        put(changes)
        yield
    finally:
        put(before)


def put(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


# What Ray, its logs and the kernel say when a start fails, and what to do about it; the first that is found counts.
_ADVICE = {
    r"AF_UNIX path|File ?name too long": "The path of Ray's sockets is too long: name a short folder with RAY_TMPDIR",
    r"No space left|Disk quota exceeded|over \d+% full": "The disk or quota under {folder} is full: make room, or name "
                                                         "another folder with RAY_TMPDIR=/a/short/path",
    r"Read-only file system|Permission denied|Operation not permitted": "Something may not be written here: the folder "
                                                                        "{folder}, or what the message names",
    r"Too many open files": "Too many files are open: allow more with `ulimit -n 65536`",
    r"Cannot allocate memory|bad_alloc|MemoryError|Out of memory|Killed": "The machine, or this container, is out of "
                                                                         "memory: Ray itself takes about 1 GB",
    r"Resource temporarily unavailable|can't start new thread|pthread_create|fork": "No more processes may be started "
        "here: raise `ulimit -u`, or the container's limit of pids",
    r"Address already in use|Failed to bind|port \d+ is": "A port is taken: unset what names ports in the environment "
                                                          "(RAY_*PORT*), and Ray takes free ones",
}
BUSY = "The machine may be too busy for Ray's start: the same command tries again; --cpus N begins fewer processes"
TAIL_BYTES = 20_000
COMPLAINT = re.compile(r"\b[EFC] |rror|ailed|FATAL|annot|xception")
WARNING = re.compile(r"RNING|\b[IW] \d")               # of what it tries again, such as a port that is taken


def advice(error: BaseException, folder: Path) -> str:
    """The next step for a start of Ray that failed, and the line of its logs that says why, where one does.

    folder: of `session_folder`, while it is there.
    """
    said = []
    cause: BaseException | None = error
    while cause is not None:
        said.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    logged = [line for path in sorted(folder.glob(f"{SESSION}/session_2*/logs/*"))
              if path.name.partition(".")[0] in ("gcs_server", "raylet", "dashboard_agent", "runtime_env_agent")
              for line in tail_of(path)]
    for pattern, step in _ADVICE.items():
        if re.search(pattern, "\n".join(said)):
            return step.format(folder=folder.parent)
        for line in logged:
            if re.search(pattern, line):
                return f"{step.format(folder=folder.parent)}. Ray's log says: {line.strip()[-200:]}"
    try:
        check_place(folder.parent)
    except OSError as wrong:
        return f"{folder.parent}: {wrong.strerror or wrong}"
    return BUSY


def tail_of(path: Path) -> list[str]:
    """Its last lines that complain."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if COMPLAINT.search(line) and not WARNING.search(line)]
