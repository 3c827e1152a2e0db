"""A manifest's cells: what each column of ours allows, and its values from Parquet, from JSON and from text.

A column is converted as a whole; its cells are looked at one by one only where that fails. One that does not fit is
null and complained of.
"""

import json
import re
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dailies.pipeline.manifest.validation import SHOWN_CHARACTERS, Complaints, shown

MAX_PROMPT_BYTES = 8192
MAX_ID_BYTES = 256
MAX_SAMPLES = 10_000
INT64_MAX = 2**63 - 1

TEXT, INTEGER, REAL = pa.large_string(), pa.int64(), pa.float64()     # 32-bit text offsets end at 2 GiB per column

JSON = pa.json_(TEXT)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)

# an id with a match is refused: characters that would break a log line, and what could climb out of a folder
UNSAFE_ID = r"[\p{Cc}\p{Zl}\p{Zp}\\]|^$|^/|^\p{Zs}|\p{Zs}$|(^|/)\.\.?(/|$)"

# text in which nothing is to be seen: blanks, marks of format and direction, fillers; to an encoder it is nothing
NOTHING_SEEN = (r"^[\s\p{Z}\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{M}\x{115F}\x{1160}\x{2065}\x{2800}\x{3164}\x{FFA0}"
                r"\x{FFF0}-\x{FFF8}\x{FFFC}\x{1D159}\x{E0000}-\x{E0FFF}]*$")


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
    "prompt": Column(type=TEXT, max_bytes=MAX_PROMPT_BYTES, refuse=NOTHING_SEEN,
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


def from_arrow(name: str, values: pa.ChunkedArray, first: int, complaints: Complaints) -> pa.ChunkedArray:
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
            return cell_by_cell(name, values.cast(pa.large_binary()), first, complaints)
    if pa.types.is_decimal(given):
        return cell_by_cell(name, values, first, complaints)
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
    return kept(name, values, fits, first, complaints).cast(INTEGER)


def cell_by_cell(name: str, values: pa.ChunkedArray, first: int, complaints: Complaints) -> pa.ChunkedArray:
    chunks = []
    for chunk in values.chunks:
        chunks.append(from_python(name, chunk.to_pylist(), first, complaints))
        first += len(chunk)
    return pa.chunked_array(chunks, COLUMNS[name].type)


def from_json(name: str, cells: list, first: int, complaints: Complaints) -> pa.Array:
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
    try:
        texts = json_text(cells)
    except RecursionError:                             # what could be read can still be too deep to be written
        texts, bad = [], []
        for at, cell in enumerate(cells):
            try:
                texts.append(None if cell is None else json.dumps(cell))
            except RecursionError:
                texts.append(None)
                bad.append(at)
        complaints.add([first + at for at in bad], name.removeprefix("user."),
                       ["JSON that is nested too deeply"] * len(bad), "less of it")
        texts = pa.array(texts, TEXT)
    return pa.ExtensionArray.from_storage(JSON, texts)


def json_text(cells: list) -> pa.Array:
    return pa.array([None if cell is None else json.dumps(cell) for cell in cells], TEXT)


def of_one_type(chunks: list[pa.Array]) -> pa.ChunkedArray:
    types = {chunk.type for chunk in chunks} - {pa.null()}
    if JSON in types or (len(types) > 1 and not types <= {INTEGER, REAL}):
        return pa.chunked_array([chunk.storage if chunk.type == JSON else json_text(chunk.to_pylist())
                                 for chunk in chunks])
    wanted = REAL if REAL in types else types.pop() if types else pa.null()
    return pa.chunked_array([chunk.cast(wanted) for chunk in chunks])


def from_python(name: str, cells: list, first: int, complaints: Complaints, parse: bool = False) -> pa.Array:
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
            fitting.append(None if cell is None else fitted(cell, column.type, parse=parse, is_id=name == "id"))
        except (ValueError, OverflowError):
            fitting.append(None)
            bad.append(at)
    said_name = name.removeprefix("user.")
    complaints.add([first + at for at in bad], said_name, [shown(cells[at]) for at in bad], column.allowed)
    return pa.array(fitting, column.type)


def fitted(cell: object, wanted: pa.DataType, *, parse: bool, is_id: bool) -> str | int | float:
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


def kept(name: str, values: pa.ChunkedArray, fits: pa.ChunkedArray, first: int,
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
