"""A disk that is really full (ENOSPC), at the moment when a run comes to write its clips, its ledger or its latents."""

import errno
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dailies.actors.clip_file import read_clip
from dailies.pipeline.run.intermediates import Persisted, anything, restored
from dailies.pipeline.run.layout import EMBEDDINGS, LATENTS
from dailies.pipeline.run.seal import seal_of
from dailies.pipeline.store import FolderStore, open_store

DISK_BYTES = 24 * 2**20
CLIPS_BEFORE = 4                        # are published, so that there is something that could be spoilt


class NoDisk(RuntimeError):
    """A small file system cannot be mounted here; the message says why."""


class FillingStore(FolderStore):
    """A folder whose disk another program fills up whenever the run writes below one of its folders."""

    def __init__(self, uri: str, *, folder: str, ballast: str):
        """folder: clips, ledger or latents.  ballast: the other program's file, on the same disk."""
        super().__init__(Path(uri))
        self.folder, self.ballast = folder, Path(ballast)

    def create(self, key: str, *given, **options) -> bool:
        self.fill(key)
        return super().create(key, *given, **options)

    def put(self, key: str, *given, **options) -> None:
        self.fill(key)
        super().put(key, *given, **options)

    def fill(self, key: str) -> None:
        if key.startswith(f"{self.folder}/") and sum(1 for _ in self.list("clips/")) >= CLIPS_BEFORE:
            fill_up(self.ballast)


def fill_up(ballast: Path) -> None:
    for block in (2**16, 2**9):
        with open(ballast, "ab", buffering=0) as file:
            try:
                while file.write(bytes(block)) == block:
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


@contextmanager
def small_disk(folder: Path, num_bytes: int = DISK_BYTES) -> Iterator[Path]:
    """A file system of that size at `folder`.  Raises NoDisk where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes},mode=700", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        raise NoDisk(f"a full disk needs a small file system, and mount does not run here: {error}") from error
    if done.returncode:
        raise NoDisk(f"a full disk needs a small file system, and this user may not mount one: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def in_a_namespace(command: list[str]) -> list[str]:
    """The command for a user who may not mount, where users may be root of a namespace of their own."""
    try:
        may = subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True).returncode == 0
    except OSError:
        may = False
    return ["unshare", "--map-root-user", "--mount", *command] if may else command


def spoilt(out: str) -> list[str]:
    """A sentence for each object of a run folder that is not whole."""
    store, wrong = open_store(out), []
    for info in store.list():
        folder, suffix = info.key.partition("/")[0], info.key.rpartition(".")[2]
        try:
            data = store.get(info.key)
            if suffix == "mp4":
                read_clip(data)
            elif suffix == "parquet":
                pq.read_table(BytesIO(data))
            elif suffix == "json":
                json.loads(data)
            elif folder in (EMBEDDINGS, LATENTS):
                restored(store, Persisted(request=None, key=info.key), seal_of(store, fresh=False), anything)
        except (ValueError, pa.ArrowException) as error:
            wrong.append(f"{info.key} is damaged: {error}")
    return wrong
