"""A manifest file's bytes: unfolded where they are compressed, and never more of them than a manifest may have.

What is compressed is known by its first bytes, whatever the file is called; what is no manifest at all, too, and named.
"""

import bz2
import gzip
import io
import lzma
from typing import Any, BinaryIO

import pyarrow as pa

MAX_MANIFEST_BYTES = 2 << 30                 # of content, all files together: what a machine of 16 GB can plan
MAX_ROWS = 10_000_000               # of one file
MAX_COLUMNS = 1_000                 # of all files together, those in structs and lists counted
# of a compressed file, and of all files as they lie: text is longer than what is kept
MAX_UNFOLDED = 2 * MAX_MANIFEST_BYTES
FREELY = 64 << 20                   # a compressed file may unfold to this, however small it is
MAX_RATIO = 500                     # beyond it: more than real rows come to, unless all are the same
_CHUNK = 1 << 16

COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
NO_MANIFEST = {
    b"PK\x03\x04": "a ZIP archive (a workbook of Excel is one); save the sheet as CSV in UTF-8, or unpack it",
    b"\xd0\xcf\x11\xe0": "an old workbook of Excel; save the sheet as CSV in UTF-8",
    b"ARROW1": "an Arrow file; write it as Parquet", b"FEA1": "a Feather file; write it as Parquet",
    b"ORC": "an ORC file; write it as Parquet", b"Obj\x01": "an Avro file; write it as Parquet",
    b"SQLite format 3": "a SQLite database; write the table as Parquet",
    b"\x80\x04\x95": "a pickle; write it as Parquet",
    b"\x80\x05\x95": "a pickle; write it as Parquet", b"\x89PNG": "an image", b"\xff\xd8\xff": "an image",
    b"%PDF": "a PDF document", b"\x7fELF": "a program", b"\x93NUMPY": "a NumPy array; write it as Parquet",
}


class TooMuch(ValueError):
    """A manifest that would take more memory than it may."""

    def __init__(self, size: int, room: int):
        super().__init__(f"content of {size:,} bytes or more, unfolded, where {room:,} are left of the "
                         f"{MAX_MANIFEST_BYTES:,} that a manifest may have; split it")


class Unfolding(io.RawIOBase):
    """Reads on from `source`, which unfolds a file of `packed` bytes.  Raises ValueError for what is a trap."""

    def __init__(self, source: BinaryIO, packed: int):
        self.source, self.packed, self.size = source, packed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.source.read(len(buffer))
        except (EOFError, lzma.LZMAError, pa.ArrowException) as error:
            raise OSError(f"a compressed file that is damaged: {error}") from error
        self.size += len(data)
        if self.size > MAX_UNFOLDED:
            raise ValueError(f"a file that unfolds to more than {MAX_UNFOLDED:,} bytes; split it")
        if self.size > max(FREELY, MAX_RATIO * self.packed):
            raise ValueError(f"a file of {self.packed:,} bytes that unfolds to {self.size:,} and more, over "
                             f"{MAX_RATIO} times its size; unpack it if it is meant")
        buffer[:len(data)] = data
        return len(data)


def refuse_large(stream: BinaryIO, room: int) -> int:
    """The bytes of a file, by its end: one that is all holes takes no disk, and hours to read.  Raises ValueError."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if size > room:
        raise ValueError(f"{size:,} bytes, where {room:,} are left of the {MAX_UNFOLDED:,} that a manifest's files may "
                         "have; split it")
    return size


def unfolded(stream: BinaryIO) -> BinaryIO:
    """The file itself, or what is compressed in it: from its beginning, once through.  Raises OSError, ValueError."""
    beginning = stream.read(16)
    packed = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    for magic, what in NO_MANIFEST.items():
        if beginning.startswith(magic):
            raise ValueError(what)
    kind = next((kind for magic, kind in COMPRESSED.items() if beginning.startswith(magic)), None)
    if kind is None:
        return stream
    if kind == "zstd":
        source = pa.CompressedInputStream(stream, "zstd")
    else:
        source = gzip.GzipFile(fileobj=stream) if kind == "gzip" else {"bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}[kind](
            stream)
    return io.BufferedReader(Unfolding(source, packed), _CHUNK)


def in_memory(stream: BinaryIO, room: int) -> BinaryIO:
    """All of a stream that can be read once, so that it can be read anywhere.  Raises TooMuch for more than `room`."""
    data = stream.read(room + 1)
    if len(data) > room:
        raise TooMuch(len(data), room)
    return io.BytesIO(data)
