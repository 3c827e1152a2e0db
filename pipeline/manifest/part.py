"""One file of a manifest as columns, and the columns of all files put together."""

import io
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

import pyarrow as pa

from dailies.pipeline.manifest.cells import COLUMN_TYPES, INTEGER, TEXT, from_arrow, from_json, from_python, of_one_type
from dailies.pipeline.manifest.columns import Names
from dailies.pipeline.manifest.files import SUFFIXES, ManifestFile
from dailies.pipeline.manifest.parquet import MAX_CHUNKS, read_parquet
from dailies.pipeline.manifest.raw_bytes import MAX_COLUMNS, MAX_ROWS, TooMuch, in_memory, unfolded
from dailies.pipeline.manifest.stored_types import as_text, free_name
from dailies.pipeline.manifest.text import RowBlock, csv_blocks, document_blocks, json_blocks, prompt_blocks, sniffed
from dailies.pipeline.manifest.validation import ValidationErrors, shown

USER = "user."
INT32_MAX = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class ManifestPart:
    """Some rows of a manifest, each column of ours in its own type."""

    file: str
    num_rows: int
    has_prompts: bool               # the column is there and can be read
    known: pa.Table
    user: pa.Table                  # as user.NAME

    @property
    def num_bytes(self) -> int:
        return self.known.nbytes + self.user.nbytes

    @classmethod
    def of(cls, file: str, num_rows: int, columns: Mapping[str, pa.Array]) -> "ManifestPart":
        """columns: by their targets."""
        full = {name: columns[name] if name in columns else pa.nulls(num_rows, kind)
                for name, kind in COLUMN_TYPES.items()}
        # with no column at all a table would forget how many rows it has
        user = {name: cells for name, cells in columns.items() if name not in COLUMN_TYPES} or {"": pa.nulls(num_rows)}
        return cls(file=file, num_rows=num_rows, has_prompts="prompt" in columns, known=pa.table(full),
                   user=pa.table(user))


class ManifestReader:
    """Reads a manifest's files one after the other; what is wrong goes to `errors`, what is odd to `notes`."""

    def __init__(self, names: Names, partitions: Mapping[str, pa.DataType], errors: ValidationErrors, notes: list[str]):
        """partitions: the columns that folders are called by, and their types."""
        self.names, self.partitions, self.errors, self.notes = names, partitions, errors, notes
        self.asked: set[str] = set()                   # columns that were asked about already
        self.columns: set[str] = set()                 # the user's, of all files
        self.num_columns = 0                           # those of each file added up

    def read(self, file: ManifestFile, stream: BinaryIO, first: int, room: int) -> ManifestPart:
        """One file, whose first row is the manifest's row `first`, and which may take `room` bytes of memory.

        Raises OSError, ValueError or ArrowException.
        """
        if not stream.read(1):
            raise ValueError("an empty file")
        stream.seek(0)
        content = unfolded(stream)
        buffered = content if isinstance(content, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, content))
        beginning = buffered.peek(4)[:4]
        if not beginning:
            raise ValueError("an empty file")
        if file.format == "parquet" or beginning == b"PAR1":
            content = in_memory(buffered, room) if content is not stream else stream
            content.seek(0)
            return self.from_parquet(file, read_parquet(content, room), first)
        if beginning[:1] == b"<" and file.name.startswith("https://"):
            raise ValueError("a web page or XML and not a file of rows; give the address of the raw file")
        notes: list[str] = []
        known = self.names.mapping
        kind = file.format or (sniffed(buffered) if file.name == "-" else "")
        if kind == "jsonl":
            part = self.from_blocks(file, json_blocks(buffered), first, room, typed=True)
        elif kind == "json":
            part = self.from_blocks(file, document_blocks(buffered, known, notes), first, room, typed=True)
        elif kind == "txt":
            part = self.from_blocks(file, prompt_blocks(buffered, notes), first, room, typed=False)
        elif kind:
            blocks = csv_blocks(buffered, "\t" if kind == "tsv" else ",", known, notes)
            part = self.from_blocks(file, blocks, first, room, typed=False)
        else:
            raise ValueError(f"a file whose name does not say its format: {SUFFIXES}")
        if not file.format:
            notes.insert(0, f"read as {'a prompt per line' if kind == 'txt' else kind.upper()}")
        self.notes += [f"{file.name}: {note}" for note in notes]
        return part

    def count_columns(self, part: ManifestPart) -> ManifestPart:
        """The part itself.  Raises ValueError where the files together have more columns than a manifest may have."""
        self.columns.update(part.user.column_names)
        self.num_columns += part.user.num_columns
        if self.num_columns > MAX_CHUNKS:
            raise ValueError(f"{self.num_columns:,} columns, those of each file before it added up; a manifest may "
                             f"have {MAX_CHUNKS:,}. Put the rows of many files into one")
        if len(self.columns) > MAX_COLUMNS:
            raise ValueError(f"{len(self.columns):,} columns with those of the files before; a manifest may have "
                             f"{MAX_COLUMNS:,}")
        return part

    def check_names(self, file: ManifestFile, names: list[str]) -> None:
        """Ask about what is nearly ours; report where there is no prompt, or several columns would be one."""
        targets = {self.names.target(name) for name in names}
        questions = self.names.questions(names)
        if "prompt" not in targets:
            listed = ", ".join(map(shown, names[:20])) + (", ..." if len(names) > 20 else "")
            may_be = [question for name, ours, question in questions if ours == "prompt"]
            self.errors.about(file.name, None, f"the columns {listed or '(none)'}",
                                  "a column named exactly 'prompt'" + "".join(f". {question}" for question in may_be))
            questions = [asked for asked in questions if asked[1] != "prompt"]
        for name, _, question in questions:
            if name not in self.asked:
                self.asked.add(name)
                self.errors.about(file.name, None, f"the column {shown(name)}", question, question=question)
        for target, sources in self.names.collisions(names):
            said = f"{' and '.join(map(shown, sources))} for {target.removeprefix(USER)}"
            self.errors.about(file.name, None, said, "one column for each; --map NAME= carries the other along")

    def columns_of_folders(self, file: ManifestFile, num_rows: int, first: int,
                           there: Iterable[str]) -> dict[str, pa.Array]:
        """What the folders are called by, the same in every row; a column of the file itself counts instead."""
        columns = {}
        for name, kind in self.partitions.items():
            target, value = self.names.target(name), file.partition.get(name)
            if target in there:
                if name in file.partition:
                    self.notes.append(f"{file.name}: has a column {shown(name)} of its own, which counts, and not its "
                                      "folder's name")
                continue
            if target in COLUMN_TYPES:
                wrong = ValidationErrors()
                cells = from_python(target, [value], 0, wrong, parse=True)
                for error in wrong:
                    given, allowed = [error.given] * num_rows, error.allowed
                    self.errors.add(range(first, first + num_rows), target, given, allowed)
                scalar = cells[0]
            else:
                scalar = pa.scalar(None if value is None else value if kind == pa.string() else int(value), kind)
            columns[target] = pa.repeat(scalar, num_rows)
        return columns

    def from_parquet(self, file: ManifestFile, table: pa.Table, first: int) -> ManifestPart:
        names = table.column_names
        self.check_names(file, [*names, *(name for name in file.partition if name not in names)])
        columns = {}
        for name in table.column_names:
            target = self.names.target(name)
            try:
                if target in COLUMN_TYPES:
                    columns[target] = from_arrow(target, table[name], first, self.errors)
                else:
                    table[name].validate(full=True)
                    columns[target] = table[name]
            except pa.ArrowTypeError as error:
                self.errors.about(file.name, name, f"a column of type {table[name].type}", str(error))
            except pa.ArrowInvalid as error:
                self.errors.about(file.name, name, f"damaged content ({error})", "whole values, text in UTF-8")
        columns |= self.columns_of_folders(file, table.num_rows, first, columns)
        return ManifestPart.of(file.name, table.num_rows, columns)

    def from_blocks(self, file: ManifestFile, blocks: Iterable[RowBlock], first: int, room: int, *,
                    typed: bool) -> ManifestPart:
        """The rows of a text file.  typed: cells have JSON's types; else all are text, and numbers are read from it."""
        columns: dict[str, list[pa.Array]] = {}
        sources: dict[str, str] = {}
        num_rows = size = 0
        for block in blocks:
            for allowed in {allowed for _, _, allowed in block.broken}:
                broken = [(at, given) for at, given, rule in block.broken if rule == allowed]
                self.errors.add([first + num_rows + at for at, _ in broken], None, [given for _, given in broken],
                                    allowed)
            given = {self.names.target(name): cells for name, cells in block.columns.items()}
            sources |= {name: "" for name in block.columns}
            if len(sources) > MAX_COLUMNS:
                raise ValueError(f"{len(sources):,} names of columns; a manifest may have {MAX_COLUMNS:,}")
            for target in [*columns, *(target for target in given if target not in columns)]:
                if target not in given:
                    cells = pa.nulls(block.num_rows, columns[target][0].type if target in COLUMN_TYPES else None)
                elif target in COLUMN_TYPES or not typed:
                    cells = from_python(target, given[target], first + num_rows, self.errors, parse=not typed)
                else:
                    cells = from_json(target, given[target], first + num_rows, self.errors)
                before = [] if target in columns or not num_rows else [pa.nulls(num_rows, cells.type)]
                size += sum(part.nbytes for part in (*before, cells))
                columns.setdefault(target, before).append(cells)
                if size > room:
                    raise TooMuch(size, room)
            num_rows += block.num_rows
            if num_rows > MAX_ROWS:
                raise ValueError(f"more than {MAX_ROWS:,} rows; split the manifest")
        if num_rows:
            self.check_names(file, [*sources, *(name for name in file.partition if name not in sources)])
        done = {target: pa.chunked_array(chunks) if target in COLUMN_TYPES else of_one_type(chunks)
                for target, chunks in columns.items()}
        done |= self.columns_of_folders(file, num_rows, first, done)
        return ManifestPart.of(file.name, num_rows, done)


def types_of_folders(files: Sequence[ManifestFile]) -> dict[str, pa.DataType]:
    """The columns in the folders' names: whole numbers where all are, as pyarrow reads them, else text."""
    values: dict[str, list[str | None]] = {}
    for file in files:
        for name, value in file.partition.items():
            values.setdefault(name, []).append(value)
    return {name: pa.int32() if all(value is None or is_int32(value) for value in said) and any(said) else pa.string()
            for name, said in values.items()}


def is_int32(value: str) -> bool:
    digits = value.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) <= 19 and -INT32_MAX <= int(value) <= INT32_MAX


def concatenated(parts: Sequence[ManifestPart], notes: list[str]) -> tuple[pa.Table, pa.Table]:
    """The known columns and the user's of all parts.

    A user's column on whose type the files do not agree is carried along as text, with a note that names two of them.
    """
    known = in_one_piece(pa.concat_tables([part.known for part in parts]))
    types = types_of(parts)
    odd = {name for name, files in types.items() if len(files) > 1 and not unite_columns(name, parts)}
    tables = [as_texts(part.user, odd) for part in parts]
    user = pa.concat_tables(tables, promote_options="permissive")
    num_rows, columns, taken = known.num_rows, {}, set[str]()
    for name in types:
        free = free_name(name, taken)
        if free != name:                               # Spark and DuckDB take two names that differ in case for one
            notes.append(f"column {shown(name.removeprefix(USER))}: another differs from it in case alone; carried "
                         f"along as {shown(free)}")
        if name in odd:
            said: dict[str, str] = {}
            for kind, file in types[name].items():
                if not pa.types.is_null(kind):
                    said.setdefault(said_type(kind), file)
            listed = ", ".join(f"{kind} in {file}" for kind, file in list(said.items())[:2])
            notes.append(f"column {shown(name.removeprefix(USER))}: {listed}; carried along as text")
        column = user.select([name]).combine_chunks()[name]
        # not every reader of Parquet knows a column without a type
        columns[free] = column.cast(TEXT) if pa.types.is_null(column.type) else column
    # a table without columns has no rows
    return known, pa.table(columns) if columns else pa.table({"": pa.nulls(num_rows)}).drop_columns([""])


def in_one_piece(table: pa.Table) -> pa.Table:
    """The table with one chunk a column; columns of one type that say nothing share their memory."""
    nothing = {kind: pa.nulls(table.num_rows, kind) for kind in
               {column.type for column in table.columns if column.null_count == table.num_rows}}
    return pa.table({name: nothing[column.type] if column.null_count == table.num_rows else column.combine_chunks()
                     for name, column in zip(table.column_names, table.columns, strict=True)})


def types_of(parts: Sequence[ManifestPart]) -> dict[str, dict[pa.DataType, str]]:
    """The user's columns in their order, and of each the types that it has, with the first file of each."""
    types: dict[str, dict[pa.DataType, str]] = {}
    for part in parts:
        for field in part.user.schema:
            if field.name:
                types.setdefault(field.name, {}).setdefault(field.type, part.file)
    return types


def unite_columns(name: str, parts: Sequence[ManifestPart]) -> bool:
    """Whether a type holds all that a column has in the files."""
    chunks = [part.user.select([name]) for part in parts if part.user.schema.get_field_index(name) >= 0]
    try:
        pa.concat_tables(chunks, promote_options="permissive")
    except pa.ArrowException:
        return False
    return True


def as_texts(table: pa.Table, names: Container[str]) -> pa.Table:
    """The table with these columns as text."""
    for place, name in enumerate(table.column_names):
        if name in names:
            table = table.set_column(place, name, as_text(table.column(place)))
    return table


def said_type(kind: pa.DataType) -> str:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    return "whole numbers" if kind == INTEGER else str(kind)
