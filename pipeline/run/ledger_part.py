"""A part of the ledger as a table, read as a file from outside: its types, its values and its size are checked first.

Whoever can write the run folder can write a part, and a disk can spoil one. What is wrong is said with the column's
name; nothing of such a part is used.
"""

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as is_

from dailies.pipeline.manifest.columns import repeated
from dailies.pipeline.manifest.parquet import announced, chunks_of, is_text_leaf, leaves, plain, unfolded_bytes
from dailies.pipeline.run.ledger_row import limited, there

MAX_PART_BYTES = 2**28                  # of a part as it is stored: ours have a thousand rows
ROOM_BYTES = 2**31                      # of its columns in memory
MAX_PART_ROWS = 100_000                 # of a part: in a few bytes one can announce any number
MAX_ROWS_IN_ALL = 20_000_000            # of a ledger: twice the rows of the largest manifest
MAX_PART_COLUMNS = 2_000                # those of a manifest, twice, and ours
_ROWS_PER_BATCH = 4096                   # where text cannot be read as it is stored
NEEDED = ("id", "seed", "status")
STATUSES = ("done", "failed", "pending", "dropped")
_KINDS = (lambda kind: is_.is_string(kind) or is_.is_large_string(kind) or is_.is_string_view(kind), is_.is_integer,
         lambda kind: is_.is_floating(kind) or is_.is_integer(kind), is_.is_boolean, is_.is_timestamp, is_.is_list)
LATEST_US = 253_402_300_799_000_000     # the end of the year 9999, which is Python's


def read_part(data: bytes, columns: Sequence[str] | None, schema: pa.Schema, *, needs: Sequence[str] = NEEDED,
              known_alone: bool = False) -> pa.Table:
    """The columns that are asked for and there; those of `schema` in its types.

    columns: None for all, as `there` takes them.  needs: columns without which it is no such file.  known_alone: one
    that `schema` does not have is refused.  Raises ValueError, saying what is wrong with which column;
    ArrowException and OSError for bytes that are no Parquet file.
    """
    stream = pa.BufferReader(data)
    metadata = pq.read_metadata(stream)
    for number, most, what in ((metadata.num_rows, MAX_PART_ROWS, "rows"),
                               (metadata.num_columns, MAX_PART_COLUMNS, "columns"),
                               (metadata.num_row_groups, MAX_PART_ROWS, "row groups")):
        if number > most:
            raise ValueError(f"it has {number:,} {what}; a part has at most {most:,}")
    # page checksums are of our own parts; a part without them is read as it is
    options = dict(metadata=metadata, page_checksum_verification=True, arrow_extensions_enabled=False)
    stored = pq.ParquetFile(stream, **options).schema_arrow
    names = stored.names
    if twice := repeated(names):
        raise ValueError(f"two columns are named {twice[0]!r}")
    wanted = names if columns is None else list(there(columns, names))
    if missing := [name for name in needs if name not in names]:
        raise ValueError(f"it has no column {missing[0]}")
    if known_alone and (strange := [name for name in names if name not in schema.names]):
        raise ValueError(f"it has a column {strange[0][:100]!r}, which no such file has")
    for name in names:                                  # also of what is not asked for: the footer is read anyway
        check_type(name, plain(stored.field(name).type), schema)
    size = announced(metadata)
    if size > ROOM_BYTES:
        raise ValueError(f"it unfolds to {size:,} bytes; at most {ROOM_BYTES:,} are read")
    texts = [leaf for leaf in leaves(metadata) if is_text_leaf(leaf) and leaf.path.partition(".")[0] in wanted]
    parquet = pq.ParquetFile(stream, read_dictionary=[leaf.path for leaf in texts], **options)
    tables, size = [], 0
    for table in row_groups(parquet, metadata, wanted):
        size += sum(unfolded_bytes(chunk) for column in table.columns for chunk in column.chunks)
        if size > ROOM_BYTES:
            raise ValueError(f"it unfolds to more than {ROOM_BYTES:,} bytes")
        tables.append(pa.table([column.cast(plain(column.type)) for column in table.columns], names=wanted))
    if not tables:
        return pa.schema([schema.field(name) for name in wanted if name in schema.names]).empty_table()
    table = checked_types(pa.concat_tables(tables), schema)
    check_values(table)
    return table


def row_groups(parquet: pq.ParquetFile, metadata: pq.FileMetaData, wanted: list[str]):
    """Row group by row group, text as dictionaries; a few rows at a time where a file stores it as lengths."""
    spread = any("DELTA" in said for chunks in chunks_of(metadata) for chunk in chunks for said in chunk.encodings)
    if spread:
        yield from (pa.table(batch) for batch in parquet.iter_batches(_ROWS_PER_BATCH, columns=wanted))
    else:
        yield from (parquet.read_row_group(place, wanted) for place in range(metadata.num_row_groups))


def check_type(name: str, found: pa.DataType, schema: pa.Schema) -> None:
    """Raises ValueError for a column of `schema` that is of another kind."""
    if name not in schema.names or found == (wanted := schema.field(name).type) or is_.is_null(found):
        return
    if not any(kind(found) and kind(wanted) for kind in _KINDS):
        raise ValueError(f"its column {name} must be {wanted}; it is {found}")
    if is_.is_list(wanted):
        check_type("item", found.value_type, pa.schema([("item", wanted.value_type)]))


def checked_types(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """With the columns of `schema` in its types.  Raises ValueError for one of another kind."""
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        check_type(name, column.type, schema)
        columns.append(column.cast(schema.field(name).type) if name in schema.names else column)
    table = pa.table(columns, names=table.column_names)
    table.validate(full=True)                           # text that is no UTF-8, offsets that point elsewhere
    return table


def check_values(table: pa.Table) -> None:
    """Raises ValueError for what no writer of ours puts down."""
    columns: Mapping[str, pa.ChunkedArray] = dict(zip(table.column_names, table.columns, strict=True))
    if "id" in columns and (columns["id"].null_count or pc.any(pc.equal(columns["id"], "")).as_py()):
        raise ValueError("a row of it has no id")
    if "status" in columns:
        for said in columns["status"].unique().to_pylist():
            if said not in STATUSES:
                raise ValueError(f"status must be one of {', '.join(STATUSES)}; got {said!r}")
    for name, column in columns.items():
        if (limits := limited(name)) and limits.most is not None and not within(column, limits.least, limits.most):
            raise ValueError(f"{name} must be a number from {limits.least:g} to {limits.most:g}")
    if "finished_at" in columns and not within(columns["finished_at"].cast(pa.int64()), 0, LATEST_US):
        raise ValueError("finished_at must be a time from 1970 to 9999")


def within(column: pa.ChunkedArray, least: float, most: float) -> bool:
    if is_.is_floating(column.type) and pc.any(pc.is_nan(column)).as_py():
        return False
    found = pc.min_max(column).as_py()
    return found["min"] is None or least <= found["min"] and found["max"] <= most
