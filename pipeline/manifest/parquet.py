"""A manifest's Parquet file as a table, with never more of it in memory than a manifest may hold.

A file says little of what it unfolds to: in a megabyte a million rows can point to one prompt. So its footer is asked
first, and text is then read as it is stored, distinct values and which of them each row has; what that comes to is
counted before any row gets a text of its own.
"""

from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as is_

from dailies.pipeline.manifest.columns import repeated
from dailies.pipeline.manifest.raw_bytes import MAX_COLUMNS, MAX_ROWS, TooMuch
from dailies.pipeline.manifest.stored_types import converted
from dailies.pipeline.manifest.validation import shown

_ROWS_PER_BATCH = 65_536
MAX_CHUNKS = 1_000_000                                 # row groups times columns: of ten million rows far fewer
BATCH_BYTES = 1 << 30                                  # of text that cannot be read as it is stored
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12, "BYTE_ARRAY": 4}


def read_parquet(stream: BinaryIO, room: int) -> pa.Table:
    """The whole file, without dictionaries and extension types.

    room: bytes that it may take in memory.  Raises TooMuch for more; ValueError for too many rows or columns, and for
    two of one name; ArrowException for a file that is damaged.
    """
    metadata = pq.read_metadata(stream)
    if metadata.num_rows > MAX_ROWS:                   # a few bytes can announce any number of rows
        raise ValueError(f"{metadata.num_rows:,} rows; a manifest may have {MAX_ROWS:,}")
    refuse_wide(metadata)
    if (size := announced(metadata)) > room:
        raise TooMuch(size, room)
    texts = [leaf.path for leaf in leaves(metadata) if is_text_leaf(leaf)]
    parquet = pq.ParquetFile(stream, metadata=metadata, read_dictionary=texts, arrow_extensions_enabled=False)
    names = parquet.schema_arrow.names
    if twice := repeated(names):
        raise ValueError(f"two columns named {', '.join(map(shown, twice))}")
    schema = pa.schema([(name, plain(kind)) for name, kind in zip(names, parquet.schema_arrow.types, strict=True)])
    parts, size = [], 0
    for part in row_groups_of(parquet, stream):
        size += sum(unfolded_bytes(chunk) for column in part.columns for chunk in column.chunks)
        if size > room:
            raise TooMuch(size, room)
        columns = [converted(column, kind) for column, kind in zip(part.columns, schema.types, strict=True)]
        parts.append(pa.table(columns, schema))
    return pa.concat_tables(parts) if parts else schema.empty_table()


def refuse_wide(metadata: pq.FileMetaData) -> None:
    """Before the schema is built or a chunk is looked at: each column costs much more than its bytes in the footer.

    Raises ValueError.
    """
    if metadata.num_columns > MAX_COLUMNS:
        raise ValueError(f"{metadata.num_columns:,} columns, those in structs and lists counted; {MAX_COLUMNS:,} may "
                         f"be there")
    if (chunks := metadata.num_columns * metadata.num_row_groups) > MAX_CHUNKS:
        raise ValueError(f"{metadata.num_row_groups:,} row groups, which cut its columns into {chunks:,} pieces; "
                         f"{MAX_CHUNKS:,} may be there. Write it with more rows in each")


def row_groups_of(parquet: pq.ParquetFile, stream: BinaryIO) -> Iterator[pa.Table]:
    """Row group by row group, with text as dictionaries; where some of it cannot be, a few rows at a time, none as one.

    It cannot where it is stored as lengths or prefixes, or where the file's own schema wraps its type. Then each row
    has a text of its own, which may be as long as all pages of its column.
    """
    metadata = parquet.metadata
    texts = [chunk for leaf, chunks in zip(leaves(metadata), chunks_of(metadata), strict=True) if is_text_leaf(leaf)
             for chunk in chunks]
    if not any("DELTA" in said for chunk in texts for said in chunk.encodings) \
            and not any(map(holds_text, parquet.schema_arrow.types)):
        yield from map(parquet.read_row_group, range(metadata.num_row_groups))
        return
    rows = BATCH_BYTES // max([1, *(chunk.total_uncompressed_size for chunk in texts)])
    for batch in pq.ParquetFile(stream, metadata=metadata).iter_batches(max(1, min(_ROWS_PER_BATCH, rows))):
        yield pa.table(batch)


def leaves(metadata: pq.FileMetaData) -> list[pq.ColumnSchema]:
    return [metadata.schema.column(place) for place in range(metadata.num_columns)]


def is_text_leaf(leaf: pq.ColumnSchema) -> bool:
    """Values of any length; a decimal has 32 bytes at most, however it is stored."""
    return leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "DECIMAL"


def announced(metadata: pq.FileMetaData) -> int:
    """Bytes that the footer admits to: of its pages, or of its values if larger. Text may be many times that."""
    return sum(max(chunk.total_uncompressed_size, chunk.num_values * width(leaf))
               for leaf, chunks in zip(leaves(metadata), chunks_of(metadata), strict=True) for chunk in chunks)


def width(leaf: pq.ColumnSchema) -> int:
    return leaf.length if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" else _WIDTHS[leaf.physical_type]


def chunks_of(metadata: pq.FileMetaData) -> list[list[pq.ColumnChunkMetaData]]:
    """Of each leaf, one per row group."""
    groups = [metadata.row_group(place) for place in range(metadata.num_row_groups)]
    return [[group.column(place) for group in groups] for place in range(metadata.num_columns)]


def holds_text(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return holds_text(kind.storage_type)
    if is_.is_nested(kind):
        return any(holds_text(kind.field(place).type) for place in range(kind.num_fields))
    return any(is_kind(kind) for is_kind in (is_.is_string, is_.is_large_string, is_.is_string_view, is_.is_binary,
                                             is_.is_large_binary, is_.is_binary_view))


def unfolded_bytes(values: pa.Array) -> int:
    """Bytes that they take without dictionaries."""
    values = values.storage if isinstance(values, pa.ExtensionArray) else values
    if is_.is_dictionary(values.type) and holds_text(values.type.value_type):
        lengths = pc.binary_length(values.dictionary).cast(pa.int64())
        return 4 * len(values) + (pc.sum(lengths.take(values.indices)).as_py() or 0)
    if is_.is_struct(values.type):
        return sum(map(unfolded_bytes, values.flatten()))
    if is_.is_map(values.type):
        first, last = values.offsets[0].as_py(), values.offsets[-1].as_py()
        return 4 * len(values) + sum(unfolded_bytes(part.slice(first, last - first))
                                     for part in (values.keys, values.items))
    if is_.is_nested(values.type):
        return 4 * len(values) + unfolded_bytes(values.flatten())
    return values.nbytes


def plain(kind: pa.DataType) -> pa.DataType:
    """The type without wrapping: extension types as what they store, dictionaries as their values."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain(kind.storage_type)
    if is_.is_dictionary(kind) or is_.is_run_end_encoded(kind):
        return plain(kind.value_type)
    if is_.is_struct(kind):
        return pa.struct([field.with_type(plain(field.type)) for field in kind])
    if is_.is_map(kind):
        return pa.map_(plain(kind.key_type), plain(kind.item_type))
    for is_list, make in ((is_.is_large_list, pa.large_list), (is_.is_list, pa.list_), (is_.is_list_view, pa.list_),
                          (is_.is_large_list_view, pa.large_list)):
        if is_list(kind):
            return make(kind.value_field.with_type(plain(kind.value_type)))
    if is_.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(plain(kind.value_type)), kind.list_size)
    return kind
