"""What a store is, and the simplest one, a folder. A key is a relative path with slashes. Opened by store.py.

The promise everything rests on is `create`: of all writers of a key exactly one is told True, and nobody ever sees half
an object. A folder keeps it with link(), a bucket with `If-None-Match: *`. `probe` checks that this store really does.
"""

import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dailies.model.errors import DailiesError
from dailies.model.private import at_home
from dailies.pipeline.store.beneath import FILE, Unfit, below, open_file, refuse_strange, sync, top_folder

TEMPORARY = ".tmp"                      # in a folder: what is being written; a killed writer leaves its file there
PROBE = "probe-"                        # begins the key of what is written to try a store; a killed driver may leave one
PROBE_KEY = re.compile(PROBE + "[0-9a-f]{16}")
STALE_S = 24 * 3600                     # nobody writes one file for a day
MADE_HERE = re.compile(r"[0-9a-f]{32}")                 # a name in TEMPORARY
MAX_DEPTH = 32                          # of folders in a run folder; a run's own are two deep
# what a run keeps at the top of its folder
OF_A_RUN = {TEMPORARY, "run.json", "lease.json", "_SUCCESS.json", "ledger", "clips", "posters", "latents", "embeddings",
            "steps", "manifests", "picks", "report", "retried", "seal.key"}


class StoreError(DailiesError, RuntimeError):
    """The store cannot be used; the message tells a person why and what to do."""

    exit_code = 5


class NoAccess(StoreError):
    """This bucket is not there, or closed to these credentials; the store itself answers."""


class TooLarge(ValueError):
    """An object is larger than its reader takes."""


class NotFound(DailiesError, KeyError):
    """No object has this key."""

    exit_code = 5

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
    def put(self, key: str, data: bytes | Path, *, metadata: dict[str, str] | None = None,
            private: bool = False) -> None:
        """Store an object in place of any other; readers see the old or the new one, whole.

        private: a secret; in a folder only its owner may read it, whatever the umask. A bucket has rules of its own.
        """

    @abstractmethod
    def swap(self, key: str, old: bytes, new: bytes, *, atomic: bool = True,
             metadata: dict[str, str] | None = None) -> bool:
        """Replace the object if its content is `old`. True: this call did. Contents must never come a second time.

        atomic: of all who swap at once exactly one is told True. A store that cannot promise it (`can_swap`) must be
        asked without; then the last of several may win though all are told True.
        """

    def replace(self, key: str, old: bytes, new: bytes, *, metadata: dict[str, str] | None = None) -> bool:
        """As swap, atomically where this store can."""
        return self.swap(key, old, new, atomic=self.swaps, metadata=metadata)

    @cached_property
    def swaps(self) -> bool:
        """`can_swap`, tried out once."""
        return self.can_swap()

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

    def create_again(self, key: str, data: bytes) -> bool:
        """As `create`, of a key that this process has just created and nobody else knows."""
        return self.create(key, data)

    def tidy(self, *folders: str) -> None:
        """Remove what is empty of these folders and below, where there are folders; for who has the run folder alone."""

    def probe(self) -> None:
        """Write, read, list and delete one small object.  Raises StoreError unless a second create of it is refused."""
        key = f"{PROBE}{secrets.token_hex(8)}"
        first = self.create(key, b"first")
        try:
            second = self.create_again(key, b"second")
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
    """A folder on one file system with hard links; made when the first object is written.

    The folder itself may be a link; below it none is followed, nothing but regular files is opened, and nothing but
    what was made here is swept away.
    """

    def __init__(self, root: Path):
        self.root = at_home(root).absolute()
        self.uri = str(self.root)

    def create(self, key: str, data: bytes | Path, *, metadata: dict[str, str] | None = None) -> bool:
        with self.explained("write"), self.written(data) as (top, source), self.place(top, key, make=True) as (at, name):
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
                open_file(source.folder, source.name, TEMPORARY, os.O_RDWR) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    return False
                raise
        return True

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        with self.explained("read", key), self.reading(key) as file:
            check_size(os.fstat(file.fileno()).st_size, at_most)
            return file.read()

    def download(self, key: str, path: Path) -> None:
        with self.explained("read", key), self.reading(key) as file, arriving(path) as temporary, \
                open(temporary, "xb") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)

    def head(self, key: str) -> ObjectInfo | None:
        try:
            with self.explained("read", key), self.reading(key) as file:
                stat = os.fstat(file.fileno())
                return ObjectInfo(key=key, num_bytes=stat.st_size, modified_s=stat.st_mtime,
                                  sha256=hashlib.file_digest(file, "sha256").hexdigest())
        except NotFound:
            return None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        names = checked(folder).split("/") if folder else []
        with self.explained("read"):
            try:
                with top_folder(self.root) as top, below(top, names) as at:
                    yield from self.walk(at, f"{folder}/" if folder else "", prefix)
            except (FileNotFoundError, NotADirectoryError):
                return

    def walk(self, at: int, base: str, prefix: str) -> Iterator[ObjectInfo]:
        if base.count("/") > MAX_DEPTH:
            raise StoreError(f"{self.uri}: folders lie {MAX_DEPTH} deep in it, which no run makes. Choose another one")
        with os.scandir(at) as scan:
            # with its slash a folder sorts as its keys do
            entries = sorted((f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name, entry)
                             for entry in scan)
        for name, entry in entries:
            key = base + name
            if key == f"{TEMPORARY}/" or not key.startswith(prefix):
                continue
            with suppress(FileNotFoundError):           # removed since the scan
                if name.endswith("/"):
                    with below(at, [entry.name]) as inner:
                        yield from self.walk(inner, key, prefix)
                    continue
                if not entry.is_file(follow_symlinks=False):
                    refuse_strange(at, entry.name, key)
                stat = entry.stat(follow_symlinks=False)
                yield ObjectInfo(key=key, num_bytes=stat.st_size, modified_s=stat.st_mtime)

    def delete(self, key: str) -> None:
        with suppress(NotFound), self.explained("write", key), top_folder(self.root) as top, \
                self.place(top, key) as (at, name):
            os.unlink(name, dir_fd=at)                  # of a link the link

    def tidy(self, *folders: str) -> None:
        with suppress(OSError, Unfit), top_folder(self.root) as top:
            for name in folders:
                remove_if_empty(top, name)

    def probe(self) -> None:
        super().probe()
        with self.explained("read"), top_folder(self.root) as top:
            self.refuse_planted(top)
            with suppress(FileNotFoundError), below(top, [TEMPORARY]) as temporary:     # tidied away meanwhile
                for name in os.listdir(temporary):
                    if MADE_HERE.fullmatch(name):
                        with suppress(FileNotFoundError):
                            stat = os.stat(name, dir_fd=temporary, follow_symlinks=False)
                            if stat.st_mtime < time.time() - STALE_S:
                                os.unlink(name, dir_fd=temporary)

    def refuse_planted(self, top: int) -> None:
        """Raises Unfit for a link or a special file among what a run keeps here, before anything is begun."""
        with os.scandir(top) as scan:
            names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in scan if entry.name in OF_A_RUN]
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
        *names, name = checked(key).split("/")
        with below(top, names, make=make) as folder:
            yield folder, name

    @contextmanager
    def reading(self, key: str) -> Iterator[BinaryIO]:
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
            with below(top, [TEMPORARY], make=True) as folder:
                try:
                    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | FILE, mode, dir_fd=folder)
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


def plain_uri(uri: str) -> str:
    """An S3 URI in the one spelling that the rest knows: s3a:// and S3:// are s3://; any other text as it is."""
    scheme, colon, rest = uri.partition("://")
    return f"s3://{rest}" if colon and scheme.lower() in ("s3", "s3a", "s3n") else uri


def remove_if_empty(parent: int, name: str) -> None:
    """A folder in the open folder `parent`, and those in it, as far as they hold nothing; a link is no folder."""
    with suppress(OSError, Unfit), below(parent, [name]) as here:
        with os.scandir(here) as scan:
            inner = [entry.name for entry in scan if entry.is_dir(follow_symlinks=False)]
        for each in inner:
            remove_if_empty(here, each)
    with suppress(OSError):
        os.rmdir(name, dir_fd=parent)


def checked(key: str) -> str:
    """A key that stays below its store.  Raises ValueError for one that would leave it."""
    if not key or "\0" in key or "\\" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"a key must be a relative path without '..'; got {key!r}")
    return key


def check_size(num_bytes: int, at_most: int | None) -> None:
    if at_most is not None and num_bytes > at_most:
        raise TooLarge(f"{num_bytes:,} bytes")


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
        with top_folder(path.parent) as parent:
            sync(parent)
