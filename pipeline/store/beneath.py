"""Files below a folder, reached without following a link, and opened only if they are regular files.

Whoever may write a folder that we work in can put a link, a pipe or a device where a file of ours belongs. So each
folder on the way is opened from the one above it, with O_NOFOLLOW: what openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
does, on every kernel. The folder that all begins at is the caller's own choice, and may be a link.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedRandom, BufferedReader
from pathlib import Path

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # to open a pipe without O_NONBLOCK waits for its other end
FILE_KINDS = {stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder",
         stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class Unfit(Exception):
    """Something else lies where a folder or a regular file belongs; `what` says where and what."""

    def __init__(self, path: str, mode: int):
        super().__init__(path, mode)
        self.what = f"{path} is {FILE_KINDS.get(stat.S_IFMT(mode), 'no regular file')}"


class FileTooLong(Exception):
    """A file has more bytes than it may have."""

    def __init__(self, num_bytes: int):
        super().__init__(num_bytes)
        self.num_bytes = num_bytes


@contextmanager
def top_folder(path: Path) -> Iterator[int]:
    """A folder, links followed, open.  Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def below(top: int, names: Sequence[str], *, make: bool = False) -> Iterator[int]:
    """The folder that `names` lead to from the open folder `top`, open itself.

    make: folders that are missing are made.  Raises OSError, Unfit for what is no folder and no regular file.
    """
    here = top
    try:
        for depth, name in enumerate(names):
            try:
                there = enter_folder(here, name, make)
            except OSError as error:
                if error.errno in (errno.ENOTDIR, errno.ELOOP):
                    refuse_strange(here, name, "/".join(names[:depth + 1]))
                raise
            if here != top:
                os.close(here)
            here = there
        yield here
    finally:
        if here != top:
            os.close(here)


def enter_folder(parent: int, name: str, make: bool) -> int:
    try:
        return os.open(name, FOLDER_FLAGS, dir_fd=parent)
    except FileNotFoundError:
        if not make:
            raise
    with suppress(FileExistsError):                     # another process was a moment faster
        os.mkdir(name, dir_fd=parent)
        sync(parent)
    return os.open(name, FOLDER_FLAGS, dir_fd=parent)


def refuse_strange(parent: int, name: str, path: str) -> None:
    """Raises Unfit unless it is a regular file, and OSError."""
    mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    if not stat.S_ISREG(mode):
        raise Unfit(path, mode)


def open_file(parent: int, name: str, path: str, flags: int = os.O_RDONLY) -> BufferedReader | BufferedRandom:
    """The regular file of this name in the open folder `parent`.

    path: what it is called in an error.  Raises OSError, Unfit for what is no regular file.
    """
    refuse_strange(parent, name, path)                  # to open a device may do something to it
    try:
        descriptor = os.open(name, flags | FILE_FLAGS, dir_fd=parent)
    except OSError as error:
        if error.errno == errno.ELOOP:                  # it has become a link just now
            refuse_strange(parent, name, path)
        raise
    file: BufferedReader | BufferedRandom = (os.fdopen(descriptor, "rb") if flags == os.O_RDONLY else
                                             os.fdopen(descriptor, "r+b"))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise Unfit(path, mode)
    return file


def read_below(path: Path, base: Path, *, at_most: int) -> bytes:
    """The regular file at `path`, to which no link leads from the folder `base`; bytes of one moment's file.

    Raises OSError, Unfit for what is no regular file, FileTooLong for more than `at_most` bytes.
    """
    *folders, name = path.relative_to(base).parts or ("",)
    if not name:
        raise Unfit(str(path), stat.S_IFDIR)
    with top_folder(base) as top, below(top, folders) as folder, open_file(folder, name, name) as file:
        if (num_bytes := os.fstat(file.fileno()).st_size) > at_most:
            raise FileTooLong(num_bytes)
        data = file.read(at_most + 1)
    if len(data) > at_most:                             # it grew meanwhile
        raise FileTooLong(len(data))
    return data


def sync(folder: int) -> None:
    """Puts the names in an open folder on the disk: without it a power cut may take a file that was there."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):     # file systems that keep no such promise
            raise
