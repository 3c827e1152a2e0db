"""Folders that are this user's alone, and files that are files: what other people on the machine may plant is refused.

A name below /tmp or in a shared cache can be made by anybody first: as a link to what they want deleted or overwritten,
as a folder that they can write to, as a pipe that nobody ever writes to.
"""

import contextlib
import errno
import os
import socket
import stat
import tempfile
from io import BufferedReader
from pathlib import Path


class NotPrivate(PermissionError):
    """A folder that somebody else made or may write to; the message names it and the next step."""


class NotAFile(OSError):
    """A name that is a folder, a pipe, a socket or a device."""


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/dailies, ~/.cache/dailies, or, of a user without a home, a folder beside the temporary files.

    It need not be there, and whether it is private is asked by who writes to it (private_folder).
    """
    said = os.environ.get("XDG_CACHE_HOME")
    if said and Path(said).is_absolute():               # as its specification has it, others are to be ignored
        return Path(said) / "dailies"
    try:
        return Path.home() / ".cache" / "dailies"
    except RuntimeError:                                # a user id without an entry, and no HOME
        return Path(tempfile.gettempdir()) / f"dailies-{os.geteuid()}"


def at_home(path: str | Path) -> Path:
    """With the home in place of a leading ~; as it is where there is no such user, or none with a home."""
    return Path(os.path.expanduser(path))


def private_folder(path: Path, below: Path | None = None) -> Path:
    """The folder, made where it is not there, with every folder between `below` and it. They are mode 0700 afterwards.

    Raises NotPrivate where one of them is a link, another user's, or was open for all to write to; OSError where they
    cannot be made.
    """
    between = [path, *path.parents]
    between = between[:between.index(below) + 1] if below is not None else between[:1]
    between[-1].parent.mkdir(parents=True, exist_ok=True)
    for folder in reversed(between):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise NotPrivate(f"{folder} must be a folder of this user's alone; it is {_kind_of(found.st_mode)}. Move "
                             "it away, or name another place with XDG_CACHE_HOME")
        if found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
            whose = "everybody may write to it" if found.st_uid == os.geteuid() else f"user {found.st_uid} has made it"
            raise NotPrivate(f"{folder} must be a folder of this user's alone; {whose}. Move it away, or name another "
                             "place with XDG_CACHE_HOME")
        if found.st_mode & 0o077:
            folder.chmod(0o700)
    return path


def lock_folder() -> Path:
    """Where the processes of this user on this machine agree on locks: beside the temporary files, or, where somebody
    else has taken that name, in the cache.  Raises OSError where neither is private.
    """
    try:
        return private_folder(Path(tempfile.gettempdir()) / f"dailies-{os.geteuid()}")
    except OSError:
        cache = cache_folder()
        return private_folder(cache / f"locks-{socket.gethostname()}", below=cache)     # a home may be on many machines


def open_regular(path: Path) -> BufferedReader:
    """The file, open for reading; at once, whatever lies there.  Raises NotAFile, and OSError as open does."""
    try:
        # without O_NONBLOCK opening a pipe waits for a writer, which no signal of Python's ends in a thread
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError as error:                         # a NUL in the name
        raise NotAFile(None, "not a name of a file", str(path)) from error
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise NotAFile(None, "it is a socket, or a device that is not there", str(path)) from error
        raise
    try:
        mode = os.fstat(file).st_mode
        if not stat.S_ISREG(mode):
            raise NotAFile(None, f"it is {_kind_of(mode)}, where a file is needed", str(path))
        return os.fdopen(file, "rb")
    except BaseException:
        os.close(file)
        raise


def _kind_of(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISLNK: "a link", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket",
             stat.S_ISCHR: "a device", stat.S_ISBLK: "a device", stat.S_ISREG: "a file"}
    return next((name for asked, name in kinds.items() if asked(mode)), "no file")
