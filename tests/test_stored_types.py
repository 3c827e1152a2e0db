"""What the ledger makes of any type that Parquet can hold: one that Spark, Polars, pandas and DuckDB read."""

import io
import json
from datetime import date, datetime, time, timedelta
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.manifest.stored_types import MAX_NESTING, converted, stored_type
from dailies.pipeline.run.ledger import Ledger, read
from dailies.pipeline.store import open_store

NS, NOW = pa.timestamp("ns"), datetime(2026, 1, 2, 3, 4, 5, 123456)
LEAVES = {                                              # given, stored, a value, the value that is stored
    "null": (pa.null(), pa.string(), None, None),
    "nanoseconds": (NS, pa.timestamp("us"), NOW, NOW),
    "a zone that nobody knows": (pa.timestamp("ms", "+02:00"), pa.timestamp("ms", "UTC"), None, None),
    "half floats": (pa.float16(), pa.float32(), np.float16(1.5), 1.5),
    "long decimals": (pa.decimal256(60, 2), pa.string(), Decimal("1.50"), "1.50"),
    "wide decimals": (pa.decimal256(20, 2), pa.decimal128(20, 2), Decimal("1.50"), Decimal("1.50")),
    "short decimals": (pa.decimal32(5, 2), pa.decimal128(5, 2), Decimal("1.50"), Decimal("1.50")),
    "times of day": (pa.time64("us"), pa.string(), time(1, 2, 3), "01:02:03.000000"),
    "dates in milliseconds": (pa.date64(), pa.date32(), date(2026, 1, 2), date(2026, 1, 2)),
    "durations": (pa.duration("ns"), pa.duration("us"), timedelta(seconds=1), timedelta(seconds=1)),
    "views of text": (pa.string_view(), pa.string(), "a", "a"),
    "views of bytes": (pa.binary_view(), pa.binary(), b"a\xff", b"a\xff"),
    "bytes of one size": (pa.binary(2), pa.binary(), b"ab", b"ab"),
    "a record of nothing": (pa.struct([]), pa.string(), {}, "{}"),
}
NESTS = {
    "alone": (lambda kind: kind, lambda value: value),
    "list": (pa.list_, lambda value: [value]), "large list": (pa.large_list, lambda value: [value]),
    "list of two": (lambda kind: pa.list_(kind, 2), lambda value: [value, value]),
    "list view": (pa.list_view, lambda value: [value, value]),
    "large view": (pa.large_list_view, lambda value: [value]),
    "record": (lambda kind: pa.struct({"x": kind}), lambda value: {"x": value}),
    "map": (lambda kind: pa.map_(pa.string(), kind), lambda value: [("k", value)]),
    "all": (lambda kind: pa.list_view(pa.struct({"m": pa.map_(pa.string(), pa.large_list(kind))})),
            lambda value: [{"m": [("k", [value])]}]),
}


def unreadable(kind: pa.DataType) -> bool:
    """Whether a type holds something that one of the readers does not know."""
    odd = (pa.types.is_null, pa.types.is_float16, pa.types.is_time, pa.types.is_date64, pa.types.is_dictionary,
           pa.types.is_string_view, pa.types.is_binary_view, pa.types.is_list_view, pa.types.is_large_list_view,
           pa.types.is_fixed_size_list, pa.types.is_fixed_size_binary, pa.types.is_decimal256, pa.types.is_decimal32,
           pa.types.is_run_end_encoded)
    if any(is_kind(kind) for is_kind in odd) or isinstance(kind, pa.BaseExtensionType):
        return True
    if (pa.types.is_timestamp(kind) or pa.types.is_duration(kind)) and kind.unit == "ns":
        return True
    return pa.types.is_nested(kind) and (not kind.num_fields
                                         or any(unreadable(kind.field(at).type) for at in range(kind.num_fields)))


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("leaf", LEAVES)
def test_every_type_becomes_one_that_every_reader_knows_wherever_it_is(nest, leaf):
    given, _, value, stored = LEAVES[leaf]
    wrap, put = NESTS[nest]
    values = pa.array([put(value), None, put(value)], wrap(given))
    kind = stored_type(values.type)
    assert not unreadable(kind)
    assert nest != "alone" or kind == LEAVES[leaf][1]
    for part in (values, values.slice(1), values.slice(0, 0), pa.concat_arrays([values, values]).slice(2, 3)):
        found = converted(part, kind)
        found.validate(full=True)
        assert found.type == kind and found.to_pylist() == [
            None if cell is None else put(stored) for cell in part.to_pylist()]


def test_encodings_and_extensions_inside_lists_and_records_are_undone():
    texts = pa.array(["x", "y"]).dictionary_encode()
    uuids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16] * 2, pa.binary(16)))
    for values in (texts, uuids, pa.RunEndEncodedArray.from_arrays([1, 2], ["x", "y"])):
        for held in (values, pa.ListArray.from_arrays([0, 1, 2], values),
                     pa.StructArray.from_arrays([values], ["x"]) if values is not uuids else values):
            found = converted(held, stored_type(held.type))
            assert not unreadable(found.type) and len(found) == 2 and not found.null_count


def test_names_that_differ_in_case_alone_and_lists_without_end_are_readable_too():
    twins = pa.StructArray.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], ["a", "a", "A"])
    assert converted(twins, stored_type(twins.type)).to_pylist() == [{"a": 1, "a_2": 2, "A_3": 3}]
    deep, value = NS, NOW
    for _ in range(2 * MAX_NESTING):
        deep, value = pa.list_(deep), [value]
    values = pa.array([value], deep)
    [found] = converted(values, stored_type(deep)).to_pylist()
    while isinstance(found, list):
        [found] = found
    assert json.loads(found) and "2026-01-02 03:04:05.123456" in found


def test_the_ledger_has_user_columns_as_every_reader_wants_them(tmp_path):
    columns = {f"{nest} {leaf}": pa.array([put(value), None], wrap(given))
               for leaf, (given, _, value, _) in LEAVES.items() for nest, (wrap, put) in NESTS.items()
               if leaf not in ("a record of nothing", "short decimals") and nest != "list of two"}
    sink = io.BytesIO()
    try:
        pq.write_table(pa.table({"prompt": ["a", "b"], **columns}), sink)
    except (pa.ArrowException, OSError) as error:
        pytest.fail(str(error))
    (tmp_path / "night.parquet").write_bytes(sink.getvalue())
    manifest = Manifest.read(str(tmp_path / "night.parquet"))
    store = open_store(tmp_path / "out")
    with Ledger.open(store, manifest.user.schema) as ledger:
        ledger.append([{"id": name, "status": "failed"} for name in "ab"], manifest.user)
    [part] = (tmp_path / "out" / "ledger").iterdir()
    kinds = pq.read_schema(part)
    assert not [field.name for field in kinds if field.name.startswith("user.") and unreadable(field.type)]
    assert read(store)["user.all nanoseconds"].to_pylist() == [[{"m": [("k", [NOW])]}], None]
