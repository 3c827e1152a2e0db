"""A store that is a folder of this machine, or one that all machines mount."""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import NamedTuple

from dailies.model.private import at_home
from dailies.pipeline.run import layout
from dailies.pipeline.store.base import (
    NotFound,
    ObjectInfo,
    Store,
    StoreError,
    arriving,
    checked_key,
    not_a_store,
    refuse_too_large,
)
from dailies.pipeline.store.beneath import FILE_FLAGS, Unfit, below, open_file, refuse_strange, sync, top_folder

TEMPORARY_FOLDER = ".tmp"               # what is being written; a killed writer leaves its file there
STALE_S = 24 * 3600                     # nobody writes one file for a day
TEMPORARY_NAME = re.compile(r"[0-9a-f]{32}")
MAX_FOLDER_DEPTH = 32                   # of folders in a run folder; a run's own are two deep


class FolderStore(Store):
    """A folder on one file system with hard links; made when the first object is written.

    The folder itself may be a link; below it none is followed, nothing but regular files is opened, and nothing but
    what was made here is swept away.
    """

    def __init__(self, root: Path):
        self.root = self.path = at_home(root).absolute()
        self.uri = str(self.root)

    @classmethod
    def at(cls, uri: str) -> "FolderStore":
        """uri: file:///PATH.  Raises StoreError."""
        path = uri.partition("://")[2]
        if not path.startswith("/"):
            raise not_a_store(uri)
        return cls(Path(path))

    def create(self, key: str, data: bytes | Path, *, metadata: dict[str, str] | None = None) -> bool:
        with self.explained("write"), self.written(data) as (top, source), \
                self.place(top, key, make=True) as (at, name):
            try:
                os.link(source.name, name, src_dir_fd=source.folder, dst_dir_fd=at, follow_symlinks=False)
            except FileExistsError:
                return False
            sync(at)
        return True

    def put(self, key: str, data: bytes | Path, *, metadata: dict[str, str] | None = None,
            private: bool = False) -> None:
        with self.explained("write"), self.written(data, 0o600 if private else 0o666) as (top, source), \
                self.place(top, key, make=True) as (at, name):
            os.replace(source.name, name, src_dir_fd=source.folder, dst_dir_fd=at)
            sync(at)

    def swap(self, key: str, old: bytes, new: bytes, *, atomic: bool = True,
             metadata: dict[str, str] | None = None) -> bool:
        with self.explained("write"), self.written(new) as (top, source):
            try:
                with self.place(top, key) as (at, name):
                    while True:                         # again where somebody swapped while we waited
                        if (done := self.swapped(at, name, key, old, source, atomic)) is not None:
                            return done
            except FileNotFoundError:
                return False

    def swapped(self, at: int, name: str, key: str, old: bytes, source: "Temporary", atomic: bool) -> bool | None:
        """Whether the content was `old`, and `source` is in its place; None where that cannot be told yet."""
        with open_file(at, name, key, os.O_RDWR) as file:       # network file systems lock only what may be written
            if atomic:                                  # the system lets go of it when a process is killed
                fcntl.flock(file, fcntl.LOCK_EX)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(name, dir_fd=at, follow_symlinks=False)):
                return None
            if file.read(len(old) + 1) != old:
                return False
            os.replace(source.name, name, src_dir_fd=source.folder, dst_dir_fd=at)
            sync(at)
            return True

    def can_swap(self) -> bool:
        with self.explained("write"), self.written(b"") as (_, source), \
                open_file(source.folder, source.name, TEMPORARY_FOLDER, os.O_RDWR) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    return False
                raise
        return True

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        with self.explained("read", key), self.reading(key) as file:
            refuse_too_large(os.fstat(file.fileno()).st_size, at_most)
            return file.read()

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        with self.explained("read", key), self.reading(key) as file:
            file.seek(start)
            return file.read(num_bytes)

    def download(self, key: str, path: Path) -> None:
        with self.explained("read", key), self.reading(key) as file, arriving(path) as temporary, \
                open(temporary, "xb") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)

    def head(self, key: str) -> ObjectInfo | None:
        try:
            with self.explained("read", key), self.reading(key) as file:
                found = os.fstat(file.fileno())
                return ObjectInfo(key=key, num_bytes=found.st_size, modified_s=found.st_mtime,
                                  sha256=hashlib.file_digest(file, "sha256").hexdigest())
        except NotFound:
            return None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        names = checked_key(folder).split("/") if folder else []
        with self.explained("read"):
            try:
                with top_folder(self.root) as top, below(top, names) as at:
                    yield from self.walk(at, f"{folder}/" if folder else "", prefix)
            except (FileNotFoundError, NotADirectoryError):
                return

    def walk(self, at: int, base: str, prefix: str) -> Iterator[ObjectInfo]:
        if base.count("/") > MAX_FOLDER_DEPTH:
            raise StoreError(f"{self.uri}: folders lie {MAX_FOLDER_DEPTH} deep in it, which no run makes. Choose "
                             "another one")
        with os.scandir(at) as scan:
            # with its slash a folder sorts as its keys do
            entries = sorted((f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name, entry)
                             for entry in scan)
        for name, entry in entries:
            key = base + name
            if key == f"{TEMPORARY_FOLDER}/" or not key.startswith(prefix):
                continue
            with suppress(FileNotFoundError):           # removed since the scan
                if name.endswith("/"):
                    with below(at, [entry.name]) as inner:
                        yield from self.walk(inner, key, prefix)
                    continue
                if not entry.is_file(follow_symlinks=False):
                    refuse_strange(at, entry.name, key)
                found = entry.stat(follow_symlinks=False)
                yield ObjectInfo(key=key, num_bytes=found.st_size, modified_s=found.st_mtime)

    def delete(self, key: str) -> None:
        with suppress(NotFound), self.explained("write", key), top_folder(self.root) as top, \
                self.place(top, key) as (at, name):
            os.unlink(name, dir_fd=at)                  # of a link the link

    def create_from(self, other: Store, info: ObjectInfo, key: str) -> bool | None:
        """A second link to the file, where both lie on one file system."""
        if not isinstance(other, FolderStore):
            return None
        make_folder(self.root)
        with self.explained("write"), top_folder(self.root) as top, self.place(top, key, make=True) as (at, name), \
                other.explained("read", info.key), top_folder(other.root) as theirs, \
                other.place(theirs, info.key) as (from_at, from_name):
            try:
                os.link(from_name, name, src_dir_fd=from_at, dst_dir_fd=at, follow_symlinks=False)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS):
                    return None
                raise
            found = os.stat(name, dir_fd=at, follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode) or found.st_size != info.num_bytes:
                os.unlink(name, dir_fd=at)              # a link, or another one than was listed
                raise NotFound(f"{other.uri_of(info.key)}: not the object that was listed")
            sync(at)
        return True

    def abandoned(self) -> Iterator[ObjectInfo]:
        with self.explained("read"):
            try:
                with top_folder(self.root) as top, below(top, [TEMPORARY_FOLDER]) as temporary:
                    found = [(name, os.stat(name, dir_fd=temporary, follow_symlinks=False))
                             for name in sorted(os.listdir(temporary)) if TEMPORARY_NAME.fullmatch(name)]
            except (FileNotFoundError, NotADirectoryError):
                return
        for name, seen in found:
            if seen.st_mtime < time.time() - STALE_S:
                yield ObjectInfo(key=f"{TEMPORARY_FOLDER}/{name}", num_bytes=seen.st_size, modified_s=seen.st_mtime)

    def tidy(self, *folders: str) -> None:
        with suppress(OSError, Unfit), top_folder(self.root) as top:
            for name in folders:
                remove_if_empty(top, name)

    def probe(self) -> None:
        super().probe()
        with self.explained("read"), top_folder(self.root) as top:
            self.refuse_planted(top)
            with suppress(FileNotFoundError), below(top, [TEMPORARY_FOLDER]) as temporary:  # tidied away meanwhile
                for name in os.listdir(temporary):
                    if TEMPORARY_NAME.fullmatch(name):
                        with suppress(FileNotFoundError):
                            found = os.stat(name, dir_fd=temporary, follow_symlinks=False)
                            if found.st_mtime < time.time() - STALE_S:
                                os.unlink(name, dir_fd=temporary)

    def refuse_planted(self, top: int) -> None:
        """Raises Unfit for a link or a special file among what a run keeps here, before anything is begun."""
        with os.scandir(top) as scan:
            names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in scan
                     if entry.name in {TEMPORARY_FOLDER, *layout.TOP}]
        for name, is_folder in names:
            with suppress(FileNotFoundError):           # a driver that ends removes what is empty
                if not is_folder:
                    refuse_strange(top, name, name)
                    continue
                with below(top, [name]) as folder, os.scandir(folder) as scan:
                    for entry in scan:
                        if not (entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False)):
                            refuse_strange(folder, entry.name, f"{name}/{entry.name}")

    @contextmanager
    def place(self, top: int, key: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """The open folder that has the key's object, and the object's name there."""
        *names, name = checked_key(key).split("/")
        with below(top, names, make=make) as folder:
            yield folder, name

    @contextmanager
    def reading(self, key: str) -> Iterator[BufferedReader | BufferedRandom]:
        with top_folder(self.root) as top, self.place(top, key) as (at, name), open_file(at, name, key) as file:
            yield file

    @contextmanager
    def written(self, data: bytes | Path, mode: int = 0o666) -> Iterator[tuple[int, "Temporary"]]:
        """The root, open, and a temporary file below it that holds `data`, on the disk and not only in memory."""
        make_folder(self.root)
        with top_folder(self.root) as top, self.temporary(top, mode) as (folder, name, descriptor):
            try:
                with open(descriptor, "wb") as file:
                    if isinstance(data, Path):
                        with open(data, "rb") as source:
                            shutil.copyfileobj(source, file, 1 << 20)
                    else:
                        file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield top, Temporary(folder, name)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)

    @contextmanager
    def temporary(self, top: int, mode: int) -> Iterator[tuple[int, str, int]]:
        """The open folder of temporary files, the name of a new one there, and the file, open."""
        name = secrets.token_hex(16)
        for last in (False,) * 9 + (True,):
            with below(top, [TEMPORARY_FOLDER], make=True) as folder:
                try:
                    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | FILE_FLAGS, mode, dir_fd=folder)
                except FileNotFoundError:               # another driver has just removed the empty folder (tidy)
                    if last:
                        raise
                    continue
                yield folder, name, descriptor
                return

    @contextmanager
    def explained(self, action: str, key: str | None = None) -> Iterator[None]:
        try:
            yield
        except Unfit as error:
            raise StoreError(f"{self.uri}: cannot {action}: {error.what}. A run folder holds folders and regular files "
                             "alone, and no link in it is followed. Move it away, or choose another folder") from None
        except OSError as error:
            if key is not None and isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise NotFound(f"{self.uri_of(key)}: no such object") from None
            advice = {errno.ENOSPC: "Free some space", errno.EDQUOT: "Free some of your quota",
                      errno.EXDEV: "Keep the whole folder on one file system",
                      errno.EPERM: "If its file system has no hard links, choose a folder on another one",
                      errno.EOPNOTSUPP: "Its file system has no hard links: choose a folder on another one",
                      errno.ENOSYS: "Its file system has no hard links: choose a folder on another one",
                      errno.EMFILE: "Raise the limit of open files (ulimit -n)"}
            step = advice.get(error.errno or 0, "Check that it is a folder that you may use, or choose another one")
            raise StoreError(f"{self.uri}: cannot {action}: {error.strerror or error}. {step}") from error


class Temporary(NamedTuple):
    """A file that only its writer knows."""

    folder: int                         # open
    name: str


def remove_if_empty(parent: int, name: str) -> None:
    """A folder in the open folder `parent`, and those in it, as far as they hold nothing; a link is no folder."""
    with suppress(OSError, Unfit), below(parent, [name]) as here:
        with os.scandir(here) as scan:
            inner = [entry.name for entry in scan if entry.is_dir(follow_symlinks=False)]
        for each in inner:
            remove_if_empty(here, each)
    with suppress(OSError):
        os.rmdir(name, dir_fd=parent)


def make_folder(path: Path) -> None:
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        with top_folder(path.parent) as parent:
            sync(parent)
