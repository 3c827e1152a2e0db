"""The files of a folder of weights: opened only if they are files, read only if they are no longer than they may be."""

import json
import os
import re
import tempfile
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from dailies.model.errors import DailiesError
from dailies.model.private import open_regular

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
INDEX = ".index.json"                                   # of a file's shards, behind the file's name
BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")         # of the Hugging Face cache
SHARD = re.compile(r"[^/\x00]{1,250}")
INDEX_BYTES = 16_000_000
MAX_JSON_TABLES = 1_500_000                             # the pieces of a vocabulary are lists; the largest has 262,000


class CheckpointError(DailiesError, ValueError):
    """Weights that cannot be used; the message names the file or tensor and the next step."""


def weight_map(index: Path, kinds: tuple[str, ...] = (".safetensors",)) -> dict[str, str]:
    """Tensor name -> file name, of a sharded checkpoint's index.  Raises CheckpointError for anything else."""
    try:
        said = read_json(index, INDEX_BYTES)["weight_map"]
        # a shard lies beside its index: anything with a path in its name is not ours to open
        if all(SHARD.fullmatch(file) and file.isprintable() and file.endswith(kinds) for file in said.values()):
            return said
    except (KeyError, TypeError, AttributeError):
        pass
    raise CheckpointError(f"{index} is not a checkpoint index: it needs a weight_map, tensor names to "
                          f"{' or '.join(kinds)} files beside it")


def read_json(path: Path, at_most: int) -> Any:
    """A small file of a weights folder.  Raises CheckpointError for what is no regular file, longer, or no JSON."""
    return json_in(read_small(path, at_most), path)


def json_in(data: bytes, path: Path) -> Any:
    """What the file at `path` says, whose bytes these are.  Raises CheckpointError."""
    # every bracket and comma becomes an object of 50 bytes and more
    if max(data.count(b"["), data.count(b"{"), data.count(b",") // 4) > MAX_JSON_TABLES:
        raise CheckpointError(f"{path} has more than {MAX_JSON_TABLES:,} lists or tables; no such file of a model has")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {first_line(error)[:200]}. Fetch it again") from error


def read_small(path: Path, at_most: int, inside: Path | None = None) -> bytes:
    """inside: a folder of weights that the file must lie in, links counted.

    Raises CheckpointError for what is no regular file, or longer than at_most bytes, or lies elsewhere.
    """
    with weights_file(path) as file:
        if inside is not None:
            refuse_outside(file, path, inside)
        data = file.read(at_most + 1)
    if len(data) > at_most:
        raise CheckpointError(f"{path} is longer than the {at_most:,} bytes that such a file may have; is it another "
                              "one?")
    return data


def weights_file(path: Path) -> BufferedReader:
    """A file of a weights folder, open for reading; never waits.  Raises CheckpointError for all but regular files."""
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def refuse_outside(file: BinaryIO, path: Path, folder: Path) -> None:
    """Raises CheckpointError where an open file, called `path`, does not lie in the folder: who made that folder could
    otherwise have any file of this user's published as a part of a model. The Hugging Face cache is an exception: its
    snapshots are links to its blobs, which have hashes for names.
    """
    try:                                                # of what is open, not of what bears the name by now
        real = Path(os.readlink(f"/proc/self/fd/{file.fileno()}"))
    except OSError:
        real = path.resolve()
    folder = folder.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None
    if not real.is_relative_to(folder) and not (real.parent == blobs and BLOB.fullmatch(real.name)):
        raise CheckpointError(f"{path} is a link, or lies behind one, that leads out of {folder}; what it leads to is "
                              f"not published. Put the file itself there (cp -L)")


def write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(data)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def listed(names: Iterable[str], limit: int = 5) -> str:
    """For a message: the first few, and how many more. A file may name its tensors as it likes, at any length."""
    names = [name if len(name) <= 200 else f"{name[:200]}..." for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
