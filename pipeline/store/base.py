"""What a store is: objects by key, a key being a relative path with slashes. The contract of every store, its probe.

The promise everything rests on is `create`: of all writers of a key exactly one is told True, and nobody ever sees half
an object. A folder keeps it with link(), a bucket with `If-None-Match: *`. `probe` checks that this store really does.

A store of another kind is a class in a file of its own, beside folder.py and s3.py, and its scheme in __init__.py.
"""

import hashlib
import io
import os
import re
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dailies.model.errors import DailiesError

PROBE = "probe-"                        # begins the key of what is written to try a store; a killed driver leaves one
PROBE_KEY = re.compile(PROBE + "[0-9a-f]{16}")


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


def not_a_store(uri: str) -> StoreError:
    shown = uri if "@" not in uri else f"{uri.partition('://')[0]}://..."     # before an @ may be a password
    return StoreError(f"{shown}: expected a local folder or s3://bucket/prefix")


class Store(ABC):
    """Objects by key. Can be pickled; each process makes its own connection, with its own credentials.

    Every method raises StoreError when the store itself is the trouble. A store that is busy is waited for.
    """

    uri: str
    path: Path | None = None            # of a store that is a folder of this machine

    def above(self) -> "tuple[Store, str] | None":
        """The store in which this one's prefix is a key, and that key; None for a folder, or one without prefix."""
        return None

    @property
    def cache_name(self) -> str:
        """A relative path, another one for each store and prefix: where what is downloaded of it is kept."""
        return f"stores/{hashlib.sha256(self.uri.encode()).hexdigest()[:32]}"

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

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        """Bytes from `start` on, at most `num_bytes`; fewer at the object's end.  Raises NotFound."""
        return self.get(key)[start: start + num_bytes]

    def presigned(self, key: str, lasts_s: float) -> str:
        """An address at which anybody may read the object for so long.  Raises StoreError where there is none."""
        raise StoreError(f"{self.uri}: links that are signed are of buckets. Leave --presign out: the clips of a "
                         "folder are found by where they lie")

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

    def create_from(self, other: "Store", info: ObjectInfo, key: str) -> bool | None:
        """As `create`, with the content of another store's object, which does not pass through this process.

        info: of the other's list.  None where these two stores cannot: the bytes have to be carried.
        Raises NotFound where that object is gone, or not the one that was listed.
        """
        return None

    def abandoned(self) -> "Iterator[ObjectInfo]":
        """What a writer that was killed has left behind and `list` does not show; by keys that `delete` takes."""
        yield from ()

    def tidy(self, *folders: str) -> None:  # noqa: B027  a store without folders has nothing to tidy
        """Remove what is empty of these folders and below, where there are folders; for who has the run alone."""

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


class Patience:
    """How long each thread of this process has waited for a store that was busy or away; any thread may ask."""

    def __init__(self) -> None:
        self.ended_s: dict[int, float] = {}             # by thread
        self.since: dict[int, float] = {}

    def begin(self) -> None:
        self.since.setdefault(threading.get_ident(), time.monotonic())

    def end(self) -> None:
        thread = threading.get_ident()
        if (since := self.since.pop(thread, None)) is not None:
            self.ended_s[thread] = self.ended_s.get(thread, 0.0) + time.monotonic() - since

    def seconds(self, thread: int) -> float:
        since = self.since.get(thread)
        return self.ended_s.get(thread, 0.0) + (time.monotonic() - since if since is not None else 0.0)

    def in_all_s(self) -> float:
        """Of all threads; what several waited at once counts for each."""
        return sum(self.seconds(thread) for thread in {*list(self.since), *list(self.ended_s)})


PATIENCE = Patience()


def checked_key(key: str) -> str:
    """A key that stays below its store.  Raises ValueError for one that would leave it."""
    if not key or "\0" in key or "\\" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"a key must be a relative path without '..'; got {key!r}")
    return key


def refuse_too_large(num_bytes: int, at_most: int | None) -> None:
    if at_most is not None and num_bytes > at_most:
        raise TooLarge(f"{num_bytes:,} bytes")


def sha256_of(data: bytes | Path) -> str:
    with open_data(data) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_data(data: bytes | Path) -> io.BufferedReader | io.BytesIO:
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
