"""A manifest's cells: what each column of ours allows, and its values from Parquet, from JSON and from text.

A column is converted as a whole; its cells are looked at one by one only where that fails. One that does not fit is
null and reported.
"""

import json
import re
from binascii import hexlify
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dailies.model.settings import BY_NAME, SETTINGS, Scalar
from dailies.pipeline.manifest.validation import SHOWN_CHARACTERS, ValidationErrors, shown

INT64_MAX = 2**63 - 1

TEXT, INTEGER, REAL = pa.large_string(), pa.int64(), pa.float64()     # 32-bit text offsets end at 2 GiB per column
YES_OR_NO = pa.bool_()
TYPES = {str: TEXT, int: INTEGER, float: REAL, bool: YES_OR_NO}
COLUMN_TYPES = {setting.name: TYPES[setting.type] for setting in SETTINGS}

JSON = pa.json_(TEXT)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)


def from_arrow(name: str, values: pa.ChunkedArray, first: int, errors: ValidationErrors) -> pa.ChunkedArray:
    """A known column in its own type; a cell that does not fit is null and reported.  Raises ArrowTypeError."""
    wanted, given = COLUMN_TYPES[name], values.type
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
            return cell_by_cell(name, values.cast(pa.large_binary()), first, errors)
    if pa.types.is_decimal(given):
        return cell_by_cell(name, values, first, errors)
    if wanted == YES_OR_NO:
        if given != YES_OR_NO:
            raise pa.ArrowTypeError("true or false")
        return values
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
    return kept(name, values, fits, first, errors).cast(INTEGER)


def cell_by_cell(name: str, values: pa.ChunkedArray, first: int, errors: ValidationErrors) -> pa.ChunkedArray:
    chunks = []
    for chunk in values.chunks:
        chunks.append(from_python(name, chunk.to_pylist(), first, errors))
        first += len(chunk)
    return pa.chunked_array(chunks, COLUMN_TYPES[name])


def from_json(name: str, cells: list, first: int, errors: ValidationErrors) -> pa.Array:
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
        errors.add([first + at for at in bad], name.removeprefix("user."),
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


def from_python(name: str, cells: list, first: int, errors: ValidationErrors, parse: bool = False) -> pa.Array:
    """Cells in the column's type; one that does not fit is null and reported.  parse: read numbers from text."""
    wanted = COLUMN_TYPES.get(name, TEXT)
    types = set(map(type, cells)) - {type(None)}
    try:
        if parse and wanted != TEXT:
            return pc.utf8_trim_whitespace(pa.array(cells, TEXT)).cast(wanted)
        fit: dict[pa.DataType, set[type]] = {TEXT: {str}, INTEGER: {int}, REAL: {int, float}, YES_OR_NO: {bool}}
        if types <= fit[wanted]:
            return pa.array(cells, wanted)
    except (pa.ArrowInvalid, UnicodeEncodeError, OverflowError):
        pass                                           # one of them does not fit: find out which
    fitting, bad = [], []
    for at, cell in enumerate(cells):
        try:
            fitting.append(None if cell is None else fitted(cell, wanted, parse=parse, is_id=name == "id"))
        except (ValueError, OverflowError):
            fitting.append(None)
            bad.append(at)
    allowed = BY_NAME[name].allowed if name in BY_NAME else "text in UTF-8"
    errors.add([first + at for at in bad], name.removeprefix("user."), [shown(cells[at]) for at in bad], allowed)
    return pa.array(fitting, wanted)


def fitted(cell: Any, wanted: pa.DataType, *, parse: bool, is_id: bool) -> Scalar:
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
    if wanted == YES_OR_NO:
        said = {"true": True, "false": False, "1": True, "0": False}.get(cell.strip().lower()) if parse else cell
        if type(said) is not bool:
            raise ValueError("neither true nor false")
        return said
    if parse and _NUMBER.fullmatch(cell.strip()):
        cell = Decimal(cell.strip())
    if type(cell) not in (int, float, Decimal):        # bool is an int to isinstance
        raise ValueError("not a number")
    if wanted == REAL:
        return float(cell)
    if cell != int(cell) or not -2**63 <= cell < 2**63 or (isinstance(cell, float) and abs(cell) > 2**53):
        raise ValueError("not a whole number of 64 bits")
    return int(cell)


def kept(name: str, values: pa.ChunkedArray, fits: pa.ChunkedArray, first: int,
         errors: ValidationErrors) -> pa.ChunkedArray:
    """values, null where `fits` is false; those are reported."""
    if pc.all(fits).as_py() is not False:              # null means no value, which is not wrong
        return values
    refused = pc.fill_null(pc.invert(fits), False)
    given = values.filter(refused)
    if given.type == TEXT:
        sizes = pc.binary_length(given).to_pylist()
        given = pc.utf8_slice_codeunits(given, 0, SHOWN_CHARACTERS).to_pylist()
        given = [shown(text, size) for text, size in zip(given, sizes, strict=True)]
    else:
        given = [shown(number) for number in given.to_pylist()]
    errors.add(first + np.flatnonzero(refused), name, given, BY_NAME[name].allowed)
    return pc.if_else(refused, pa.scalar(None, values.type), values)


def in_hex(values: bytes, size: int) -> pa.Array:
    """Each `size` bytes as text of twice as many digits."""
    text = hexlify(values)
    offsets = np.arange(0, len(text) + 1, 2 * size)
    return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(text))
