"""What a store is, and the simplest one, a folder. A key is a relative path with slashes. Opened by store.py.

The promise everything rests on is `create`: of all writers of a key exactly one is told True, and nobody ever sees half
an object. A folder keeps it with link(), a bucket with `If-None-Match: *`. `probe` checks that this store really does.
"""

import errno
import fcntl
import hashlib
import io
import os
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"                      # in a folder: what is being written; a killed writer leaves its file there
PROBE = "probe-"                        # begins the key of what is written to try a store; a killed driver may leave one
STALE_S = 24 * 3600                     # nobody writes one file for a day


class StoreError(RuntimeError):
    """The store cannot be used; the message tells a person why and what to do."""


class NoAccess(StoreError):
    """This bucket is not there, or closed to these credentials; the store itself answers."""


class TooLarge(ValueError):
    """An object is larger than its reader takes."""


class NotFound(KeyError):
    """No object has this key."""

    def __str__(self) -> str:           # KeyError would show the message in quotes
        return self.args[0]


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    key: str
    num_bytes: int
    modified_s: float                   # since 1970
    sha256: str | None = None           # of the content; None in a list, where finding out would read every object
    etag: str | None = None             # of a bucket's list: another one where the content is another


class Store(ABC):
    """Objects by key. Can be pickled; each process makes its own connection, with its own credentials.

    Every method raises StoreError when the store itself is the trouble. A store that is busy is waited for.
    """

    uri: str

    def uri_of(self, key: str) -> str:
        return f"{self.uri}/{key}"

    @abstractmethod
    def create(self, key: str, data: bytes | Path, *, metadata: dict[str, str] | None = None) -> bool:
        """Store a new object. True: it is there and this call made it. False: there was one, and it is untouched.

        data: bytes, or a file to stream.  metadata: ASCII, shown by tools of a bucket; a folder has no place for it.
        """

    @abstractmethod
    def put(self, key: str, data: bytes | Path, *, metadata: dict[str, str] | None = None) -> None:
        """Store an object in place of any other; readers see the old or the new one, whole."""

    @abstractmethod
    def swap(self, key: str, old: bytes, new: bytes, *, atomic: bool = True) -> bool:
        """Replace the object if its content is `old`. True: this call did. Contents must never come a second time.

        atomic: of all who swap at once exactly one is told True. A store that cannot promise it (`can_swap`) must be
        asked without; then the last of several may win though all are told True.
        """

    @abstractmethod
    def can_swap(self) -> bool:
        """Whether this store swaps atomically; tried out on an object of its own."""

    @abstractmethod
    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        """The object's content.  Raises NotFound, and TooLarge before it reads more than `at_most` bytes."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Copy the object to a local file, which appears whole.  Raises NotFound."""

    @abstractmethod
    def head(self, key: str) -> ObjectInfo | None:
        """Size and SHA-256, or None where no object has this key. Reads the object if nothing else knows its hash."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose keys start with `prefix`, in the order of their keys, without hashes."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object if there is one."""

    def probe(self) -> None:
        """Write, read, list and delete one small object.  Raises StoreError unless a second create of it is refused."""
        key = f"{PROBE}{secrets.token_hex(8)}"
        first = self.create(key, b"first")
        try:
            second = self.create(key, b"second")
            kept = self.get(key)
            listed = [info.key for info in self.list(key)]
        finally:
            self.delete(key)
        if not first or second or kept != b"first":
            raise StoreError(f"{self.uri}: this store overwrites an object that should only be created "
                             "(it ignores If-None-Match), so two writers could spoil each other's clips. "
                             "Use a store with conditional writes, or a local folder")
        if listed != [key]:
            raise StoreError(f"{self.uri}: an object just written is not listed, so a run could not be continued. "
                             "Use a store whose lists are consistent, or a local folder")


class FolderStore(Store):
    """A folder on one file system with hard links; made when the first object is written."""

    def __init__(self, root: Path):
        self.root = root.expanduser().absolute()
        self.uri = str(self.root)

    def create(self, key: str, data: bytes | Path, *, metadata: dict[str, str] | None = None) -> bool:
        path = self.path(key)
        with self.explained("write"), self.written(data) as temporary:
            make_folder(path.parent)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            sync_folder(path.parent)
        return True

    def put(self, key: str, data: bytes | Path, *, metadata: dict[str, str] | None = None) -> None:
        path = self.path(key)
        with self.explained("write"), self.written(data) as temporary:
            make_folder(path.parent)
            os.replace(temporary, path)
            sync_folder(path.parent)

    def swap(self, key: str, old: bytes, new: bytes, *, atomic: bool = True) -> bool:
        path = self.path(key)
        with self.explained("write"), self.written(new) as temporary:
            while True:
                try:
                    file = open(path, "r+b")            # network file systems lock only what may be written
                except FileNotFoundError:
                    return False
                with file:
                    if atomic:                          # the system lets go of it when a process is killed
                        fcntl.flock(file, fcntl.LOCK_EX)
                    if not is_still(file, path):
                        continue                        # somebody swapped while we waited
                    if file.read() != old:
                        return False
                    os.replace(temporary, path)
                    sync_folder(path.parent)
                    return True

    def can_swap(self) -> bool:
        with self.explained("write"), self.written(b"") as temporary, open(temporary, "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    return False
                raise
        return True

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        with self.explained("read", key), open(self.path(key), "rb") as file:
            check_size(os.fstat(file.fileno()).st_size, at_most)
            return file.read()

    def download(self, key: str, path: Path) -> None:
        with self.explained("read", key), arriving(path) as temporary:
            shutil.copyfile(self.path(key), temporary)

    def head(self, key: str) -> ObjectInfo | None:
        path = self.path(key)
        try:
            with self.explained("read", key):
                stat = path.stat()
                return ObjectInfo(key=key, num_bytes=stat.st_size, modified_s=stat.st_mtime, sha256=sha256_of(path))
        except NotFound:
            return None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        with self.explained("read"):
            yield from self.walk(self.path(folder) if folder else self.root, f"{folder}/" if folder else "", prefix)

    def walk(self, folder: Path, base: str, prefix: str) -> Iterator[ObjectInfo]:
        try:
            with os.scandir(folder) as scan:
                # with its slash a folder sorts as its keys do
                entries = sorted((f"{entry.name}/" if entry.is_dir() else entry.name, entry) for entry in scan)
        except (FileNotFoundError, NotADirectoryError):
            return
        for name, entry in entries:
            key = base + name
            if key == f"{TEMPORARY}/" or not key.startswith(prefix):
                continue
            if name.endswith("/"):
                yield from self.walk(folder / entry.name, key, prefix)
                continue
            with suppress(FileNotFoundError):           # removed since the scan
                stat = entry.stat()
                yield ObjectInfo(key=key, num_bytes=stat.st_size, modified_s=stat.st_mtime)

    def delete(self, key: str) -> None:
        with suppress(NotFound), self.explained("write", key):
            self.path(key).unlink()

    def probe(self) -> None:
        super().probe()
        for left in (self.root / TEMPORARY).iterdir():
            with suppress(FileNotFoundError):
                if left.stat().st_mtime < time.time() - STALE_S:
                    left.unlink()

    def path(self, key: str) -> Path:
        return self.root / checked(key)

    @contextmanager
    def written(self, data: bytes | Path) -> Iterator[Path]:
        """A temporary file of this file system that holds `data`, on the disk and not only in memory."""
        make_folder(self.root / TEMPORARY)
        temporary = self.root / TEMPORARY / secrets.token_hex(16)
        try:
            with open(temporary, "xb") as file:
                if isinstance(data, Path):
                    with open(data, "rb") as source:
                        shutil.copyfileobj(source, file, 1 << 20)
                else:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def explained(self, action: str, key: str | None = None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if key is not None and isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
                raise NotFound(f"{self.uri_of(key)}: no such object") from None
            advice = {errno.ENOSPC: "Free some space", errno.EDQUOT: "Free some of your quota",
                      errno.EXDEV: "Keep the whole folder on one file system",
                      errno.EPERM: "If its file system has no hard links, choose a folder on another one",
                      errno.EOPNOTSUPP: "Its file system has no hard links: choose a folder on another one",
                      errno.EMFILE: "Raise the limit of open files (ulimit -n)"}
            step = advice.get(error.errno or 0, "Check that it is a folder that you may use, or choose another one")
            raise StoreError(f"{self.uri}: cannot {action}: {error.strerror or error}. {step}") from error


def checked(key: str) -> str:
    """A key that stays below its store.  Raises ValueError for one that would leave it."""
    if not key or "\0" in key or "\\" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"a key must be a relative path without '..'; got {key!r}")
    return key


def check_size(num_bytes: int, at_most: int | None) -> None:
    if at_most is not None and num_bytes > at_most:
        raise TooLarge(f"{num_bytes:,} bytes")


def is_still(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def sha256_of(data: bytes | Path) -> str:
    with opened(data) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def opened(data: bytes | Path) -> BinaryIO:
    return open(data, "rb") if isinstance(data, Path) else io.BytesIO(data)


@contextmanager
def arriving(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Puts the names in a folder on the disk: without it a power cut may take a file that was there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):     # file systems that keep no such promise
            raise
    finally:
        os.close(descriptor)
