"""Manifest rows in, checked column by column, with every complaint in one list.

A million rows pass through here, so cells stay in Arrow columns and each rule is asked of a whole column at once; a row
is looked at alone only when it broke one. What a particular model allows is asked later, by the plan.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.complaints import SHOWN_CHARACTERS, Complaints, ManifestError, shown
from pipeline.manifest_files import (
    MAX_BYTES, SUFFIXES, Block, ManifestFile, TooMuch, csv_blocks, find_files, json_blocks,
)
from pipeline.manifest_parquet import read_parquet

MAX_PROMPT_BYTES = 8192
MAX_ID_BYTES = 256
MAX_SAMPLES = 10_000
INT64_MAX = 2**63 - 1

TEXT, INTEGER, REAL = pa.large_string(), pa.int64(), pa.float64()     # 32-bit text offsets end at 2 GiB per column

JSON = pa.json_(TEXT)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)

# an id with a match is refused: characters that would break a log line, and what could climb out of a folder
UNSAFE_ID = r"[\p{Cc}\p{Zl}\p{Zp}\\]|^$|^/|^\p{Zs}|\p{Zs}$|(^|/)\.\.?(/|$)"


@dataclass(frozen=True, kw_only=True)
class Column:
    type: pa.DataType
    allowed: str
    low: float = 0                  # numbers: both ends allowed
    high: float = 0
    max_bytes: int = 0              # text, in UTF-8
    refuse: str | None = None       # text: a pattern that must not occur
    choices: tuple[str, ...] = ()   # text: nothing else, where there are any


COLUMNS = {
    "id": Column(type=TEXT, max_bytes=MAX_ID_BYTES, refuse=UNSAFE_ID,
                 allowed=f"a name of 1 to {MAX_ID_BYTES} bytes without control characters, outer blanks, backslashes, "
                         "a slash in front, or '.' or '..' between slashes"),
    "prompt": Column(type=TEXT, max_bytes=MAX_PROMPT_BYTES, refuse=r"^[\s\p{Z}\x00]*$",
                     allowed=f"text of 1 to {MAX_PROMPT_BYTES} bytes in UTF-8, not blank"),
    "negative_prompt": Column(type=TEXT, max_bytes=MAX_PROMPT_BYTES,
                              allowed=f"text of at most {MAX_PROMPT_BYTES} bytes in UTF-8"),
    "seed": Column(type=INTEGER, low=0, high=INT64_MAX, allowed="a whole number from 0 to 2**63 - 1"),
    "samples": Column(type=INTEGER, low=1, high=MAX_SAMPLES, allowed=f"a whole number from 1 to {MAX_SAMPLES}"),
    "resolution": Column(type=TEXT, max_bytes=32, refuse=r"\x00", allowed="a name such as 360p, or WIDTHxHEIGHT"),
    "duration_s": Column(type=REAL, low=1e-3, high=86_400, allowed="a number of seconds above 0"),
    "frames": Column(type=INTEGER, low=1, high=2**31 - 1, allowed="a whole number from 1"),
    "steps": Column(type=INTEGER, low=1, high=1000, allowed="a whole number from 1 to 1000"),
    "guidance": Column(type=REAL, low=0, high=1000, allowed="a number from 0 to 1000"),
    "image": Column(type=TEXT, max_bytes=1024, refuse=r"\x00", allowed="text of at most 1024 bytes"),
    "on_reject": Column(type=TEXT, max_bytes=32, choices=("fail", "reseed"), allowed="fail or reseed"),
    "priority": Column(type=INTEGER, low=-2**31, high=2**31 - 1, allowed="a whole number from -2**31 to 2**31 - 1"),
}

USER_TEXT = Column(type=TEXT, allowed="text in UTF-8")


@dataclass(frozen=True, kw_only=True)
class InvalidRow:
    """A row that is set aside: what its failed ledger row says."""

    row: int
    id: str                         # the row's own, or "row N" where that is unfit or another row's
    prompt: str | None
    error: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest's rows in columns.  A cell that was refused is null here and has its complaint."""

    name: str                       # as given
    digest: str                     # SHA-256 over the bytes of the files, in order
    files: list[tuple[str, int]]    # name and first row of each
    table: pa.Table                 # every column of COLUMNS, in its type; `id` has no null in a good row
    user: pa.Table                  # the other columns, as user.NAME
    complaints: Complaints = field(repr=False)

    @classmethod
    def read(cls, uri: str) -> "Manifest":
        """Read and check Parquet, CSV or JSON lines: a file, a folder or a glob; a local path or s3://.

        Complaints about single rows wait in `complaints`, for the plan to add the model's own.
        Raises ManifestError when no row can be relied on: a file that is missing or cannot be read, a column that is
        missing or of a wrong type.  Raises StoreError for a bucket that does not answer.
        """
        complaints = Complaints()
        try:
            files = find_files(uri)
        except OSError as error:
            complaints.about(uri, None, str(error), f"a file, a folder or a glob, ending in {SUFFIXES}")
            raise ManifestError(uri, complaints) from error
        parts, digest, first, room = [], hashlib.sha256(), 0, MAX_BYTES
        for file in files:
            complaints.files.append((file.name, first))
            try:
                with file.open() as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
                    stream.seek(0)
                    part = _read_file(file, stream, first, room, complaints)
            except (OSError, ValueError, pa.ArrowException) as error:
                complaints.about(file.name, None, str(error).strip(), "a readable file of " + (file.format or SUFFIXES))
                continue
            parts.append(part)
            first += part.num_rows
            room -= part.num_bytes
        if not first and not complaints.whole:
            complaints.about(uri, None, "no row", "at least one row")
        if first:
            table = _checked(_joined([part.known for part in parts]), complaints)
            try:
                user = _joined([part.user for part in parts])
            except pa.ArrowException as error:
                complaints.about(uri, None, str(error), "files that agree on the type of each column")
        if complaints.whole:
            raise ManifestError(uri, complaints)
        return cls(name=uri, digest=digest.hexdigest(), files=complaints.files, table=table, user=user,
                   complaints=complaints)

    def invalid_rows(self, complaints: Complaints) -> Iterator[InvalidRow]:
        """The rows that `complaints` names, in order, with ids that no other row has."""
        unfit = complaints.rows_of("id")
        prefix = "row "
        while pc.any(pc.starts_with(self.table["id"], prefix)).as_py():
            prefix = "invalid " + prefix
        for row, reasons in complaints.by_row():
            row_id = None if row in unfit else self.table["id"][row].as_py()
            yield InvalidRow(row=row, id=f"{prefix}{row}" if row_id is None else row_id,
                             prompt=self.table["prompt"][row].as_py(),
                             error="; ".join(complaint.reason for complaint in reasons))


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Some rows of a manifest, each known column in its own type."""

    num_rows: int
    known: pa.Table
    user: pa.Table

    @property
    def num_bytes(self) -> int:
        return self.known.nbytes + self.user.nbytes

    @classmethod
    def of(cls, num_rows: int, known: dict[str, pa.Array], user: dict[str, pa.Array]) -> "_Part":
        full = {name: known[name] if name in known else pa.nulls(num_rows, COLUMNS[name].type) for name in COLUMNS}
        # with no column at all a table would forget how many rows it has
        user_columns = {f"user.{name}": values for name, values in user.items()} or {"": pa.nulls(num_rows)}
        return cls(num_rows=num_rows, known=pa.table(full), user=pa.table(user_columns))


def _joined(tables: list[pa.Table]) -> pa.Table:
    table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    table = table.drop_columns([""]) if "" in table.column_names else table
    for at, column in enumerate(table.schema):
        if pa.types.is_null(column.type):              # not every reader of Parquet knows a column without a type
            table = table.set_column(at, column.name, table[column.name].cast(TEXT))
    return table


def _read_file(file: ManifestFile, stream: BinaryIO, first: int, room: int, complaints: Complaints) -> _Part:
    """One file, whose first row is the manifest's row `first`, and which may take `room` bytes of memory.

    Raises OSError, ValueError or ArrowException.
    """
    beginning = stream.read(4)
    stream.seek(0)
    if not beginning:
        raise ValueError("an empty file")
    if file.format == "parquet" or beginning == b"PAR1":
        return _from_parquet(file, read_parquet(stream, room), first, complaints)
    if file.format == "jsonl":
        return _from_blocks(file, json_blocks(stream), first, room, complaints, typed=True)
    if file.format:
        blocks = csv_blocks(stream, "\t" if file.format == "tsv" else ",")
        return _from_blocks(file, blocks, first, room, complaints, typed=False)
    raise ValueError("a file whose name does not say its format")


def _need_prompt(file: ManifestFile, names: list[str], complaints: Complaints) -> None:
    if "prompt" not in names:
        listed = ", ".join(map(shown, names[:20])) + (", ..." if len(names) > 20 else "")
        complaints.about(file.name, None, f"the columns {listed or '(none)'}", "a column named exactly 'prompt'")


def _from_parquet(file: ManifestFile, table: pa.Table, first: int, complaints: Complaints) -> _Part:
    _need_prompt(file, table.column_names, complaints)
    known, user = {}, {}
    for name in table.column_names:
        try:
            if name in COLUMNS:
                known[name] = _from_arrow(name, table[name], first, complaints)
            else:
                table[name].validate(full=True)
                user[name] = table[name]
        except pa.ArrowTypeError as error:
            complaints.about(file.name, name, f"a column of type {table[name].type}", str(error))
        except pa.ArrowInvalid as error:
            complaints.about(file.name, name, f"damaged content ({error})", "whole values, text in UTF-8")
    return _Part.of(table.num_rows, known, user)


def _from_arrow(name: str, values: pa.ChunkedArray, first: int, complaints: Complaints) -> pa.ChunkedArray:
    """A known column in its own type; a cell that does not fit is null and complained of.  Raises ArrowTypeError."""
    wanted, given = COLUMNS[name].type, values.type
    if pa.types.is_null(given):
        return values.cast(wanted)
    if wanted == TEXT:
        if pa.types.is_integer(given) and name == "id":
            return values.cast(TEXT)
        if not any(is_type(given) for is_type in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary,
                                                  pa.types.is_large_binary)):
            raise pa.ArrowTypeError("text")
        try:
            return values.cast(pa.large_binary()).cast(TEXT)           # text in Parquet need not be UTF-8
        except pa.ArrowInvalid:
            return _cell_by_cell(name, values.cast(pa.large_binary()), first, complaints)
    if pa.types.is_decimal(given):
        return _cell_by_cell(name, values, first, complaints)
    if not pa.types.is_integer(given) and not pa.types.is_floating(given):
        raise pa.ArrowTypeError("whole numbers" if wanted == INTEGER else "numbers")
    if wanted == REAL:
        return values.cast(REAL, safe=False)           # an integer above 2**53 is rounded, and refused for its size
    if pa.types.is_floating(given):                    # pandas makes floats of integers when one is missing
        values = values.cast(REAL)
        fits = pc.and_(pc.equal(pc.floor(values), values), pc.less_equal(pc.abs(values), 2.0**53))
    elif given == pa.uint64():
        fits = pc.less_equal(values, pa.scalar(INT64_MAX, pa.uint64()))
    else:
        return values.cast(INTEGER)
    return _kept(name, values, fits, first, complaints).cast(INTEGER)


def _cell_by_cell(name: str, values: pa.ChunkedArray, first: int, complaints: Complaints) -> pa.ChunkedArray:
    chunks = []
    for chunk in values.chunks:
        chunks.append(_from_python(name, chunk.to_pylist(), first, complaints))
        first += len(chunk)
    return pa.chunked_array(chunks, COLUMNS[name].type)


def _from_blocks(file: ManifestFile, blocks: Iterable[Block], first: int, room: int, complaints: Complaints, *,
                 typed: bool) -> _Part:
    """The rows of a text file.  typed: cells have JSON's types; else all are text, and numbers are read from it."""
    columns: dict[str, list[pa.Array]] = {}
    num_rows = size = 0
    for block in blocks:
        for allowed in {allowed for _, _, allowed in block.broken}:
            broken = [(at, given) for at, given, rule in block.broken if rule == allowed]
            complaints.add([first + num_rows + at for at, _ in broken], None, [given for _, given in broken], allowed)
        for name in [*columns, *(name for name in block.columns if name not in columns)]:
            if name not in block.columns:
                cells = pa.nulls(block.num_rows, columns[name][0].type if name in COLUMNS else None)
            elif name in COLUMNS or not typed:
                cells = _from_python(name, block.columns[name], first + num_rows, complaints, parse=not typed)
            else:
                cells = _from_json(block.columns[name])
            before = [] if name in columns or not num_rows else [pa.nulls(num_rows, cells.type)]
            size += sum(part.nbytes for part in (*before, cells))
            columns.setdefault(name, before).append(cells)
            if size > room:
                raise TooMuch(size, room)
        num_rows += block.num_rows
    if num_rows:
        _need_prompt(file, list(columns), complaints)
    known = {name: pa.chunked_array(chunks) for name, chunks in columns.items() if name in COLUMNS}
    user = {name: _of_one_type(chunks) for name, chunks in columns.items() if name not in COLUMNS}
    return _Part.of(num_rows, known, user)


def _from_json(cells: list) -> pa.Array:
    """A user column in the type its cells share; as JSON text where they share none or are lists or objects."""
    types = set(map(type, cells)) - {type(None)}
    try:
        if not types:
            return pa.nulls(len(cells))
        if types == {str}:
            return pa.array(cells, TEXT)
        if types == {bool}:
            return pa.array(cells, pa.bool_())
        if types <= {int, float}:
            return pa.array(cells, REAL if float in types else INTEGER)
    except (UnicodeEncodeError, OverflowError):
        pass
    return pa.ExtensionArray.from_storage(JSON, _json_text(cells))


def _json_text(cells: list) -> pa.Array:
    return pa.array([None if cell is None else json.dumps(cell) for cell in cells], TEXT)


def _of_one_type(chunks: list[pa.Array]) -> pa.ChunkedArray:
    types = {chunk.type for chunk in chunks} - {pa.null()}
    if JSON in types or (len(types) > 1 and not types <= {INTEGER, REAL}):
        return pa.chunked_array([chunk.storage if chunk.type == JSON else _json_text(chunk.to_pylist())
                                 for chunk in chunks])
    wanted = REAL if REAL in types else types.pop() if types else pa.null()
    return pa.chunked_array([chunk.cast(wanted) for chunk in chunks])


def _from_python(name: str, cells: list, first: int, complaints: Complaints, parse: bool = False) -> pa.Array:
    """Cells in the column's type; one that does not fit is null and complained of.  parse: read numbers from text."""
    column = COLUMNS.get(name, USER_TEXT)
    types = set(map(type, cells)) - {type(None)}
    try:
        if parse and column.type != TEXT:
            return pc.utf8_trim_whitespace(pa.array(cells, TEXT)).cast(column.type)
        if types <= {TEXT: {str}, INTEGER: {int}, REAL: {int, float}}[column.type]:
            return pa.array(cells, column.type)
    except (pa.ArrowInvalid, UnicodeEncodeError, OverflowError):
        pass                                           # one of them does not fit: find out which
    fitting, bad = [], []
    for at, cell in enumerate(cells):
        try:
            fitting.append(None if cell is None else _fitted(cell, column.type, parse=parse, is_id=name == "id"))
        except (ValueError, OverflowError):
            fitting.append(None)
            bad.append(at)
    complaints.add([first + at for at in bad], name, [shown(cells[at]) for at in bad], column.allowed)
    return pa.array(fitting, column.type)


def _fitted(cell: object, wanted: pa.DataType, *, parse: bool, is_id: bool) -> str | int | float:
    """The cell as the wanted type.  Raises ValueError or OverflowError if it is no such value."""
    if wanted == TEXT:
        if isinstance(cell, bytes):
            return cell.decode()
        if is_id and type(cell) is int:
            return str(cell)
        if not isinstance(cell, str):
            raise ValueError("not text")
        cell.encode()                                  # a lone surrogate stands for a byte that was no UTF-8
        return cell
    if parse and NUMBER.fullmatch(cell.strip()):
        cell = Decimal(cell.strip())
    if type(cell) not in (int, float, Decimal):        # bool is an int to isinstance
        raise ValueError("not a number")
    if wanted == REAL:
        return float(cell)
    if cell != int(cell) or not -2**63 <= cell < 2**63 or (isinstance(cell, float) and abs(cell) > 2**53):
        raise ValueError("not a whole number of 64 bits")
    return int(cell)


def _kept(name: str, values: pa.ChunkedArray, fits: pa.ChunkedArray, first: int,
          complaints: Complaints) -> pa.ChunkedArray:
    """values, null where `fits` is false; those are complained of."""
    if pc.all(fits).as_py() is not False:              # null means no value, which is not wrong
        return values
    refused = pc.fill_null(pc.invert(fits), False)
    given = values.filter(refused)
    if given.type == TEXT:
        sizes = pc.binary_length(given).to_pylist()
        given = pc.utf8_slice_codeunits(given, 0, SHOWN_CHARACTERS).to_pylist()
        given = [shown(text, size) for text, size in zip(given, sizes)]
    else:
        given = [shown(number) for number in given.to_pylist()]
    complaints.add(first + np.flatnonzero(refused), name, given, COLUMNS[name].allowed)
    return pc.if_else(refused, pa.scalar(None, values.type), values)


def _checked(table: pa.Table, complaints: Complaints) -> pa.Table:
    """The known columns with every rule asked that no model can change, and an id in every row that was given none."""
    columns = {name: table[name] for name in COLUMNS}
    for name, column in COLUMNS.items():
        values = columns[name]
        if values.null_count == len(values):
            continue
        if column.type == TEXT:
            fits = pc.less_equal(pc.binary_length(values), column.max_bytes)
            if column.refuse:
                fits = pc.and_(fits, pc.invert(pc.match_substring_regex(values, column.refuse)))
            if column.choices:
                fits = pc.and_(fits, pc.is_in(values, pa.array(column.choices, TEXT)))
        else:
            fits = pc.and_(pc.greater_equal(values, column.low), pc.less_equal(values, column.high))
        columns[name] = _kept(name, values, fits, 0, complaints)

    if not complaints.whole:                           # where the column is missing, one complaint is enough
        rows = rows_without(columns["prompt"], "prompt", complaints)
        complaints.add(rows, "prompt", ["nothing"] * len(rows), COLUMNS["prompt"].allowed)

    both = np.flatnonzero(pc.and_(columns["duration_s"].is_valid(), columns["frames"].is_valid()))
    given = [f"{duration:g} s and {frames} frames" for duration, frames in
             zip(columns["duration_s"].take(both).to_pylist(), columns["frames"].take(both).to_pylist())]
    complaints.add(both, "duration_s", given, "duration_s or frames, not both")

    last = pc.add(columns["seed"], pc.subtract(columns["samples"], 1))
    rows = np.flatnonzero(pc.fill_null(pc.less(last, columns["seed"]), False))     # wrapped around
    complaints.add(rows, "samples", [f"seeds from {seed}" for seed in columns["seed"].take(rows).to_pylist()],
                   "seeds seed, seed + 1, ... up to 2**63 - 1")

    columns["id"] = _with_ids(columns["id"], complaints)
    return pa.table(columns)


def rows_without(values: pa.ChunkedArray, column: str, complaints: Complaints) -> np.ndarray:
    """Rows that have no value and no complaint that says why."""
    explained = complaints.rows_of(column) | complaints.rows_of(None)
    return np.setdiff1d(np.flatnonzero(values.is_null()), np.fromiter(explained, np.int64, len(explained)))


def _with_ids(ids: pa.ChunkedArray, complaints: Complaints) -> pa.ChunkedArray:
    """The ids, a row's position where it was given none; one that an earlier row has is complained of."""
    positions = np.arange(len(ids))
    missing = rows_without(ids, "id", complaints)
    if len(missing) == len(ids):
        return pa.chunked_array([pa.array(positions).cast(TEXT)])
    if len(missing):
        ids = pc.if_else(np.isin(positions, missing), pa.array(positions).cast(TEXT), ids)
    encoded = ids.combine_chunks().dictionary_encode()
    if len(encoded.dictionary) + encoded.null_count < len(ids):
        is_given = encoded.is_valid().to_numpy(zero_copy_only=False)
        rows, codes = positions[is_given], encoded.indices.drop_null().to_numpy()
        first = rows[np.unique(codes, return_index=True)[1]]           # of each code; they count up from 0
        again = rows[first[codes] != rows]
        given = [f"{shown(name)}, the id of row {first[code]}" for name, code in
                 zip(ids.take(again).to_pylist(), encoded.indices.take(again).to_pylist())]
        complaints.add(again, "id", given, "an id that no other row has")
    return ids
