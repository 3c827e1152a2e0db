"""Where a manifest's files are, and the rows of those that are text: CSV and JSON lines.

Text is read row by row in plain Python, because a broken line must cost one row and be named by its number.
"""

import csv
import glob
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from model.private import at_home
from pipeline.complaints import shown

FORMATS = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
SUFFIXES = ", ".join(FORMATS)
ROWS_PER_BLOCK = 20_000             # bounds how many rows live as Python objects at a time
MAX_CELL_CHARACTERS = 16 << 20
MAX_COLUMNS = 1_000                 # of JSON lines, where every row can bring new ones and all rows then have them
MAX_BYTES = 2 << 30                 # of content, all files together: what a machine of 16 GB can plan


class TooMuch(ValueError):
    """A manifest that would take more memory than it may."""

    def __init__(self, size: int, room: int):
        super().__init__(f"content of {size:,} bytes or more, unfolded, where {room:,} are left of the {MAX_BYTES:,} "
                         "that a manifest may have; split it")


@dataclass(frozen=True, kw_only=True)
class ManifestFile:
    name: str                       # as a person knows it
    format: str                     # a value of FORMATS, or "" for a suffix that is not there
    open: Callable[[], BinaryIO]


@dataclass(kw_only=True)
class Block:
    """Consecutive rows of a text file. A broken row is None in every column and has its reason in `broken`."""

    columns: dict[str, list]
    num_rows: int
    broken: list[tuple[int, str, str]] = field(default_factory=list)    # row in the block, given, allowed


def find_files(uri: str) -> list[ManifestFile]:
    """The manifest's files in order of name: one file, the files of a folder, or those a glob matches.

    uri: a local path or s3://bucket/key.  In a folder only files directly in it whose suffix is known are taken, and no
    name that begins with "." or "_".  Raises FileNotFoundError where there is none; StoreError for a bucket.
    """
    files = _in_bucket(uri) if uri.startswith("s3://") else _on_disk(uri)
    if not files and at_home(uri).is_dir():
        raise FileNotFoundError(f"a folder without a file in it that ends in {SUFFIXES}")
    if not files:
        raise FileNotFoundError("no such file")
    return files


def _on_disk(uri: str) -> list[ManifestFile]:
    path = at_home(uri)
    if path.is_file():
        return [_local(path)]
    if path.is_dir():
        inside = [entry for entry in path.iterdir() if entry.is_file()]
        return [_local(entry) for entry in sorted(inside) if _is_wanted(entry.name)]
    matches = map(Path, glob.glob(str(path), recursive=True))
    return [_local(match) for match in sorted(matches) if match.is_file() and _is_wanted(match.name)]


def _local(path: Path) -> ManifestFile:
    return ManifestFile(name=str(path), format=FORMATS.get(path.suffix.lower(), ""), open=lambda: path.open("rb"))


def _in_bucket(uri: str) -> list[ManifestFile]:
    from pipeline.store import open_store              # boto3 is wanted only for a manifest in a bucket

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    parts = key.rstrip("/").split("/")
    fixed = next((at for at, part in enumerate(parts) if glob.has_magic(part)), None)
    if fixed is not None:                              # a glob: list what lies under its fixed beginning
        store = open_store("/".join(["s3://" + bucket, *parts[:fixed]]))
        names = [info.key for info in store.list("") if _matches(info.key.split("/"), parts[fixed:])]
        names = [name for name in names if _is_wanted(name)]
    else:
        store, names = open_store("/".join(["s3://" + bucket, *parts[:-1]])), parts[-1:]
        if key == "" or key.endswith("/") or names[0] not in (info.key for info in store.list(names[0])):
            store = open_store(uri.rstrip("/"))
            names = [info.key for info in store.list("") if "/" not in info.key and _is_wanted(info.key)]

    def remote(name: str) -> ManifestFile:
        suffix = PurePosixPath(name).suffix.lower()
        return ManifestFile(name=store.uri_of(name), format=FORMATS.get(suffix, ""),
                            open=lambda: io.BytesIO(store.get(name, at_most=MAX_BYTES)))

    return [remote(name) for name in sorted(names)]


def _is_wanted(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in FORMATS and path.name[0] not in "._"


def _matches(parts: list[str], patterns: list[str]) -> bool:
    """Whether a key, cut at its slashes, fits a glob cut the same way; "**" stands for any number of folders."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_matches(parts[skipped:], patterns[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


def csv_blocks(stream: BinaryIO, delimiter: str) -> Iterator[Block]:
    """The rows of a CSV with a header line. An empty cell is None, every other cell is its text.

    Raises ValueError for a header that cannot name columns.
    """
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    previous_limit = csv.field_size_limit(MAX_CELL_CHARACTERS)         # Python's own would be met before a prompt's
    try:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise ValueError(f"a header line that cannot be read: {error}") from error
        names = [name.strip() or f"column_{at}" for at, name in enumerate(header)]     # pandas does not name its index
        if any("\0" in name or not _is_text(name) for name in names):
            raise ValueError(f"a header that is not UTF-8 text: {shown(delimiter.join(header))}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"a header that names a column twice: {', '.join(map(shown, twice))}")
        while True:
            rows, broken = _csv_rows(reader, len(names))
            if not rows:
                return
            yield Block(columns=dict(zip(names, map(list, zip(*rows)))), num_rows=len(rows), broken=broken)
    finally:
        csv.field_size_limit(previous_limit)


def _csv_rows(reader: Any, width: int) -> tuple[list[list[str | None]], list[tuple[int, str, str]]]:
    rows: list[list[str | None]] = []
    broken = []
    while len(rows) < ROWS_PER_BLOCK:
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            broken.append((len(rows), f"line {reader.line_num} ({error})", "a line of CSV"))
            rows.append([None] * width)
            continue
        if len(row) == width:
            rows.append([cell or None for cell in row])
        elif row:                                      # [] is a blank line
            given = f"line {reader.line_num} with {len(row)} cells: {shown(','.join(row))}"
            broken.append((len(rows), given, f"{width} cells, as in the header; quote text that holds commas"))
            rows.append([None] * width)
    return rows, broken


def json_blocks(stream: BinaryIO) -> Iterator[Block]:
    """The rows of a file with one JSON object per line; a key that a row lacks is None. Blank lines are skipped."""
    lines = enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="\n"), start=1)
    numbered = ((number, line) for number, line in lines if not line.isspace())
    while chunk := list(islice(numbered, ROWS_PER_BLOCK)):
        rows, broken = [], []
        for at, (number, line) in enumerate(chunk):
            try:
                row = json.loads(line)
                reason = "" if isinstance(row, dict) else "no object"
            except (ValueError, RecursionError) as error:
                reason = str(error)
            if reason:
                broken.append((at, f"line {number}: {shown(line.rstrip())} ({reason})", "one JSON object per line"))
                row = {}
            rows.append(row)
        names = dict.fromkeys(name for row in rows for name in row)
        if len(names) > MAX_COLUMNS:
            raise ValueError(f"{len(names):,} names of columns; a manifest may have {MAX_COLUMNS:,}")
        columns = {name: [row.get(name) for row in rows] for name in names}
        yield Block(columns=columns, num_rows=len(rows), broken=broken)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:                         # a byte that was no UTF-8 came through as a lone surrogate
        return False
    return True
