"""Types that every reader of Parquet knows, and values made to fit them: at the top, and in lists, structs and maps.

Spark has no columns without a type, no nanoseconds, no time of day and no 16 bits of float; Polars no list views;
pandas no bytes of a fixed size in a list; few have decimals of more than 38 digits. An encoding (a dictionary, runs)
and an extension are no types of a value.
"""

import json
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as is_

MAX_NESTING = 12                      # of lists, structs and maps in each other; deeper is kept as JSON
ANY_DEPTH = 1 << 20
MAX_DIGITS = 38                     # of a decimal
_TEXT = pa.large_string()


def stored_type(given: pa.DataType, depth: int = 0) -> pa.DataType:
    """The type in the ledger of a column of type `given`."""
    if isinstance(given, pa.BaseExtensionType):
        return stored_type(given.storage_type, depth)
    if is_.is_dictionary(given) or is_.is_run_end_encoded(given):
        return stored_type(given.value_type, depth)
    if is_.is_timestamp(given):
        return pa.timestamp("us" if given.unit == "ns" else given.unit, tz="UTC" if given.tz else None)
    if is_.is_decimal(given):
        fits = given.precision <= MAX_DIGITS and 0 <= given.scale <= given.precision
        return pa.decimal128(given.precision, given.scale) if fits else pa.string()
    if is_.is_nested(given):
        return stored_nest(given, depth + 1)
    if is_.is_duration(given):
        return pa.duration("us") if given.unit == "ns" else given
    for is_kind, kind in ((is_.is_null, pa.string()), (is_.is_time, pa.string()), (is_.is_date64, pa.date32()),
                          (is_.is_float16, pa.float32()), (is_.is_string_view, pa.string()),
                          (is_.is_binary_view, pa.binary()), (is_.is_fixed_size_binary, pa.binary()),
                          (is_.is_interval, pa.string())):
        if is_kind(given):
            return kind
    return given


def stored_nest(given: pa.DataType, depth: int) -> pa.DataType:
    if depth > MAX_NESTING or given.num_fields == 0 or is_.is_union(given):
        return pa.string()
    if is_.is_struct(given):
        taken: set[str] = set()
        # to Spark and DuckDB two names that differ in case are one
        names = [free_name(field.name, taken) for field in given]
        return pa.struct([(name, stored_type(field.type, depth)) for name, field in zip(names, given, strict=True)])
    if is_.is_map(given):
        return pa.map_(stored_type(given.key_type, depth), stored_type(given.item_type, depth))
    return pa.list_(stored_type(given.value_type, depth))


def free_name(name: str, taken: set[str]) -> str:
    """The name, with a number where it is taken, in whatever case.  taken: casefolded; what is returned is added."""
    number, free = 1, name
    while free.casefold() in taken:
        number += 1
        free = f"{name}_{number}"
    taken.add(free.casefold())
    return free


def converted(values: pa.Array | pa.ChunkedArray, wanted: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """values in a type that stored_type gave, or that differs from theirs by encodings and extensions alone.

    Parts of a microsecond are cut off. What no type can hold becomes text, nested values JSON.
    """
    if isinstance(values, pa.ChunkedArray):
        return pa.chunked_array([converted(chunk, wanted) for chunk in values.chunks], wanted)
    given = values.type
    if given == wanted:
        return values
    if isinstance(given, pa.BaseExtensionType):
        return converted(values.storage, wanted)
    if is_.is_dictionary(given):
        return converted(values.dictionary_decode(), wanted)
    if is_.is_run_end_encoded(given):
        return converted(pc.run_end_decode(values), wanted)
    if is_.is_null(given):
        return pa.nulls(len(values), wanted)
    if is_.is_nested(given):
        return converted_nest(values, wanted)
    if wanted == pa.string() and not is_string(given):
        return as_text(values).cast(wanted)
    return values.cast(wanted, safe=False)


def converted_nest(values: pa.Array, wanted: pa.DataType) -> pa.Array:
    given = values.type
    if is_.is_struct(wanted) and is_.is_struct(given):
        parts = [converted(values.field(place), wanted.field(place).type) for place in range(given.num_fields)]
        return pa.StructArray.from_arrays(parts, fields=list(wanted), mask=values.is_null())
    if is_.is_map(wanted) and is_.is_map(given):
        first, last = values.offsets[0].as_py(), values.offsets[-1].as_py()
        keys, items = (part.slice(first, last - first) for part in (values.keys, values.items))
        return pa.MapArray.from_arrays(offsets_of(values, pa.int32(), values.offsets), converted(keys, wanted.key_type),
                                       converted(items, wanted.item_type), type=wanted)
    if is_list(wanted) and is_list(given):
        return converted_list(values, wanted)
    return as_text(values).cast(wanted)


def converted_list(values: pa.Array, wanted: pa.DataType) -> pa.Array:
    inner = converted(values.flatten(), wanted.value_type)
    if is_.is_fixed_size_list(wanted):
        if values.null_count:                          # a null takes its places there
            inner = converted(values.values.slice(values.offset * wanted.list_size, len(values) * wanted.list_size),
                              wanted.value_type)
        return pa.FixedSizeListArray.from_arrays(inner, type=wanted, mask=values.is_null())
    kind, make = (pa.int64(), pa.LargeListArray) if is_.is_large_list(wanted) else (pa.int32(), pa.ListArray)
    return make.from_arrays(offsets_of(values, kind), inner, type=wanted)


def offsets_of(values: pa.Array, kind: pa.DataType, begins: pa.Array | None = None) -> pa.Array:
    """Where each list begins among all items that are in one, null for one that is null; and where the last ends."""
    if begins is None:
        lengths = pc.fill_null(pc.list_value_length(values), 0).cast(pa.int64())
        ends = pc.cumulative_sum(lengths)
    else:
        begins = begins.cast(pa.int64())
        ends = pc.subtract(begins.slice(1), begins[0])
    offsets = pa.concat_arrays([pa.array([0], pa.int64()), ends]).cast(kind)
    if values.null_count:
        there = pa.concat_arrays([values.is_valid(), pa.array([True])])
        offsets = pc.if_else(there, offsets, pa.scalar(None, kind))
    return offsets


def as_text(values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Any column as text: what it says, JSON where it is nested."""
    if isinstance(values, pa.ChunkedArray):
        return pa.chunked_array([as_text(chunk) for chunk in values.chunks], _TEXT)
    given = values.type
    if isinstance(given, pa.BaseExtensionType):
        return as_text(values.storage)
    if is_.is_null(given):
        return pa.nulls(len(values), _TEXT)
    if not is_.is_nested(given):
        try:
            return values.cast(_TEXT)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return pa.array([None if value is None else plain_text(value) for value in values.to_pylist()], _TEXT)
    if given.num_fields and not is_.is_union(given):   # Python has no nanoseconds
        values = converted(values, stored_type(given, -ANY_DEPTH))
    return pa.array([None if value is None else json.dumps(value, default=plain_text, ensure_ascii=False)
                     for value in values.to_pylist()], _TEXT)


def plain_text(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def is_string(kind: pa.DataType) -> bool:
    return is_.is_string(kind) or is_.is_large_string(kind) or is_.is_string_view(kind)


def is_list(kind: pa.DataType) -> bool:
    checks: tuple[Callable[[pa.DataType], bool], ...] = (
        is_.is_list, is_.is_large_list, is_.is_fixed_size_list, is_.is_list_view, is_.is_large_list_view)
    return any(is_kind(kind) for is_kind in checks)
