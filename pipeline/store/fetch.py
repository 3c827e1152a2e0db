"""What lies in a bucket, brought into a cache of this user's: downloaded once, and again when it has changed."""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dailies.model.private import cache_folder, open_regular, private_folder
from dailies.pipeline.store import open_store
from dailies.pipeline.store.base import NotFound, ObjectInfo, Store, StoreError, checked_key

RECORD_BYTES = 100_000_000


def bring(uri: str | Path, cache: Path) -> Path:
    """What lies at `uri`, one object or all that is below it, as a local path; a local `uri` is returned as it is.

    cache: a folder of this user's alone, which is made. A file there is taken only if this program downloaded it,
    nobody has touched it since, and the bucket still says the same ETag. What is no longer in the bucket is removed,
    but nothing else is, and no link is followed.
    Raises NotFound where there is nothing, StoreError.
    """
    store = open_store(uri)
    if store.path is not None:
        return store.path
    top = cache_folder() if cache.is_relative_to(cache_folder()) else cache
    target = cache / store.cache_name
    with explained(store.uri), locked(target, top) as record:
        if above := store.above():
            siblings, name = above
            alone = next(siblings.list(name), None)     # the key itself sorts before all it begins
            if alone is not None and alone.key == name:
                refresh(siblings, alone, target, record, top)
                return target
        infos = list(store.list())
        if not infos:
            raise NotFound(f"{store.uri}: there is no such object, and nothing below it")
        private_folder(target, below=top)
        for info in infos:
            refresh(store, info, target / relative(store, info.key), record, top)
        for key in record.keys() - {info.key for info in infos}:
            forget(target / relative(store, key), record, key, top)
    return target


def relative(store: Store, key: str) -> str:
    try:
        return checked_key(key)
    except ValueError:
        raise StoreError(f"{store.uri}: {key[:200]!r} is not a key that can become a file's path. Rename that object, "
                         "or name a prefix without it") from None


@contextmanager
def explained(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{uri}: cannot be kept in the cache: {error.strerror or error}"
                         f"{f' ({error.filename})' if error.filename else ''}") from error


@contextmanager
def locked(target: Path, top: Path) -> Iterator["Downloads"]:
    """The record of what was downloaded there; the processes of one machine share one download."""
    private_folder(target.parent, below=top)
    with os.fdopen(os.open(target.with_name(f".{target.name}.lock"),
                           os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Downloads(target.with_name(f".{target.name}.downloads"))


class Downloads(dict):
    """Key -> ETag and the file's stamp, kept beside the files."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        # none yet, or spoilt: all is fetched
        with suppress(OSError, ValueError, AttributeError, RecursionError), open_regular(path) as file:
            self.update({str(key): list(said) for key, said in json.loads(file.read(RECORD_BYTES)).items()})

    def save(self) -> None:
        temporary = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")
        with created(temporary) as file:
            file.write(json.dumps(self).encode())
        os.replace(temporary, self.path)


def refresh(store: Store, info: ObjectInfo, path: Path, record: Downloads, top: Path) -> None:
    said = [info.etag, info.num_bytes]
    with suppress(OSError):
        if info.etag and record.get(info.key) == [*said, *stamp(path)]:
            return
    private_folder(path.parent, below=top)
    store.download(info.key, path)                      # arrives under another name and then takes this one
    record[info.key] = [*said, *stamp(path)]
    record.save()


def forget(path: Path, record: Downloads, key: str, top: Path) -> None:
    """Remove a file that was downloaded and is no longer in the bucket; one that somebody put there since stays."""
    with suppress(OSError):
        private_folder(path.parent, below=top)
        if record[key][2:] == stamp(path):
            path.unlink()
    del record[key]
    record.save()


def stamp(path: Path) -> list[int]:
    """What changes when a file is written to or replaced; nobody but root can set a file's ctime back."""
    found = path.lstat()
    return [found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def created(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb")
