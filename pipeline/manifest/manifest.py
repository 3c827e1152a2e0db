"""Manifest rows in, checked column by column, with every error in one list.

A million rows pass through here, so cells stay in Arrow columns and each rule is asked of a whole column at once; a row
is looked at alone only when it broke one. What a particular model allows is asked later, by the plan.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dailies.model.settings import BY_NAME, SETTINGS, Setting
from dailies.pipeline.manifest.cells import REAL, TEXT, YES_OR_NO, in_hex, kept
from dailies.pipeline.manifest.columns import COLUMN_NAMES, Names, map_flag, repeated
from dailies.pipeline.manifest.files import SUFFIXES, ManifestFile, common_folder, find_files, from_prompts
from dailies.pipeline.manifest.part import ManifestPart, ManifestReader, concatenated, types_of_folders
from dailies.pipeline.manifest.raw_bytes import MAX_MANIFEST_BYTES, MAX_UNFOLDED, refuse_large
from dailies.pipeline.manifest.validation import ManifestError, ValidationErrors, shown

ID_BYTES = 8                            # of a made-up id; of ten million rows two are alike once in 400,000 nights
ROWS_AT_A_TIME = 4096                   # that live as Python objects
# of a row's columns those that decide what is made; the others may change and it is the same row
CONTENT = tuple(setting.name for setting in SETTINGS
                if setting.name not in ("id", "samples", "keep", "keep_by", "on_reject", "priority"))
MADE_ID = re.compile(rf"[0-9a-f]{{{2 * ID_BYTES}}}(-\d+)?")


@dataclass(frozen=True, kw_only=True)
class InvalidRow:
    """A row that is set aside: what its failed ledger row says."""

    row: int
    id: str                         # the row's own, or "row N" where that is unfit or another row's
    prompt: str | None
    error: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest's rows in columns.  A cell that was refused is null here and has its error."""

    name: str                       # as given
    digest: str                     # SHA-256 over the bytes of the files, in order, and what they were taken for
    files: list[tuple[str, int]]    # name and first row of each
    table: pa.Table                 # a column for each of SETTINGS, in its type; `id` has no null in a good row
    user: pa.Table                  # the other columns, as user.NAME
    errors: ValidationErrors = field(repr=False)
    notes: list[str] = field(default_factory=list)                     # what was not read, or not as one may think
    unnamed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)     # rows given no id

    @classmethod
    def read(cls, uri: str | Sequence[str] = (), *, mapping: Mapping[str, str] = {}, prompts: Sequence[str] = (),
             files: Sequence[ManifestFile] | None = None,
             also: Callable[["Manifest", ValidationErrors], None] | None = None) -> "Manifest":
        """Read and check Parquet, CSV, JSON or text: files, folders or globs; local, s3://, https://, - for stdin.

        mapping: name in a file -> column of ours, or "" to carry it along.  prompts: a row for each, without any file.
        files: what `uri` was found to be, which then is not looked for again.
        also: of a manifest that is refused as a whole, adds what else is wrong with its rows.
        Errors about single rows wait in `errors`, for the plan to add the model's own.
        Raises ManifestError when no row can be relied on: a file that is missing or cannot be read, a column that is
        missing, of a wrong type, or nearly one of ours.  Raises StoreError for a bucket that does not answer.
        """
        uris = [uri] if isinstance(uri, str) else list(uri)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        name = ", ".join(uris[:3]) + (f" and {len(uris) - 3:,} more" if len(uris) > 3 else "") or "--prompt"
        errors = ValidationErrors()
        notes: list[str] = []
        if files is None:
            files = _found(uris, prompts, errors, notes)
        if errors.whole:
            raise ManifestError(name, errors)
        names = Names(mapping)
        reader = ManifestReader(names, types_of_folders(files), errors, notes)
        parts, digest = _read(files, reader, mapping)
        for unused in names.unused() if parts else ():
            errors.about(name, None, map_flag(unused, mapping[unused]), f"a column that is there; none is called "
                             f"{shown(unused)}")
        for target in {ours for ours in mapping.values() if ours and ours not in COLUMN_NAMES}:
            errors.about(name, None, f"--map to {shown(target)}", f"a column of ours: {', '.join(COLUMN_NAMES)}")
        if not sum(part.num_rows for part in parts) and not errors.whole:
            errors.about(name, None, "no row", "at least one row")
        if any(part.num_rows for part in parts):       # what is wrong with rows is told as well
            known, user = concatenated(parts, notes)
            has_prompts = np.repeat([part.has_prompts for part in parts], [part.num_rows for part in parts])
            table, unnamed = _checked(known, has_prompts, errors)
            manifest = cls(name=name, digest=digest, files=errors.files, table=table, user=user, errors=errors,
                           notes=notes, unnamed=unnamed)
            if also and errors.whole:
                also(manifest, errors)
        if errors.whole:
            raise ManifestError(name, errors)
        return manifest

    def numbered(self) -> "Manifest":
        """With a row's position as its id where it was given none, as run folders before format 2 know their rows."""
        errors = self.errors.copy()
        names = pa.array(self.unnamed).cast(TEXT)
        ids = with_unique_ids(with_ids(self.table["id"], self.unnamed, names), errors)
        table = self.table.set_column(self.table.column_names.index("id"), "id", ids)
        return replace(self, table=table, errors=errors)

    def invalid_rows(self, errors: ValidationErrors) -> Iterator[InvalidRow]:
        """The rows that `errors` names, in order, with ids that no other row has."""
        unfit = errors.rows_with_error("id")
        prefix = "row "
        while pc.any(pc.starts_with(self.table["id"], prefix)).as_py():
            prefix = "invalid " + prefix
        for row, reasons in errors.by_row():
            row_id = None if row in unfit else self.table["id"][row].as_py()
            yield InvalidRow(row=row, id=f"{prefix}{row}" if row_id is None else row_id,
                             prompt=self.table["prompt"][row].as_py(),
                             error="; ".join(error.reason for error in reasons))


def _found(uris: Sequence[str], prompts: Sequence[str], errors: ValidationErrors,
           notes: list[str]) -> list[ManifestFile]:
    files = [from_prompts(prompts)] if prompts else []
    base = common_folder(uris) if len(uris) > 1 else None
    for uri in uris:
        try:
            found = find_files(uri, base)
        except OSError as error:
            errors.about(uri, None, str(error), f"a file, a folder or a glob, ending in {SUFFIXES}")
            continue
        files += found.files
        notes += [note for note in found.notes() if note not in notes]
    names = [file.name for file in files]
    for twice in repeated(names) if len(uris) > 1 else ():
        errors.about(twice, None, "a file that is named twice", "each file once")
    return files


def _read(files: Sequence[ManifestFile], reader: ManifestReader,
          mapping: Mapping[str, str]) -> tuple[list[ManifestPart], str]:
    """Every file that can be read, and the digest of all."""
    errors, parts, digest, first, room = reader.errors, [], hashlib.sha256(), 0, MAX_MANIFEST_BYTES
    unread = MAX_UNFOLDED
    for file in files:
        errors.files.append((file.name, first))
        try:
            with file.open() as stream:
                unread -= refuse_large(stream, unread)
                digest.update(hashlib.file_digest(stream, "sha256").digest())
                if file.partition:
                    digest.update(json.dumps(sorted(file.partition.items())).encode())
                stream.seek(0)
                part = reader.count_columns(reader.read(file, stream, first, room))
        except (OSError, ValueError, pa.ArrowException) as error:
            errors.about(file.name, None, str(error).strip(), "a readable file of " + (file.format or SUFFIXES))
            continue
        parts.append(part)
        first += part.num_rows
        room -= part.num_bytes
    if mapping:                                        # the same bytes, taken for something else
        digest.update(json.dumps(sorted(mapping.items())).encode())
    return parts, digest.hexdigest()


def _checked(table: pa.Table, has_prompts: np.ndarray, errors: ValidationErrors) -> tuple[pa.Table, np.ndarray]:
    """The known columns with every rule asked that no model can change, and an id in every row; which were given none.

    has_prompts: of each row whether its file has that column; where it has not, one error is enough.
    """
    columns = {setting.name: table[setting.name] for setting in SETTINGS}
    for setting in SETTINGS:
        values = columns[setting.name]
        if values.null_count < len(values) and setting.type is not bool:
            columns[setting.name] = kept(setting.name, values, values_allowed(setting, values), 0, errors)

    rows = rows_without(columns["prompt"], "prompt", errors)
    rows = rows[has_prompts[rows]]
    errors.add(rows, "prompt", ["nothing"] * len(rows), BY_NAME["prompt"].allowed)

    both = np.flatnonzero(pc.and_(columns["duration_s"].is_valid(), columns["frames"].is_valid()))
    given = [f"{duration:g} s and {frames} frames" for duration, frames in
             zip(columns["duration_s"].take(both).to_pylist(), columns["frames"].take(both).to_pylist(),
                  strict=True)]
    errors.add(both, "duration_s", given, "duration_s or frames, not both")

    last = pc.add(columns["seed"], pc.subtract(columns["samples"], 1))
    rows = np.flatnonzero(pc.fill_null(pc.less(last, columns["seed"]), False))     # wrapped around
    errors.add(rows, "samples", [f"seeds from {seed}" for seed in columns["seed"].take(rows).to_pylist()],
                   "seeds seed, seed + 1, ... up to 2**63 - 1")

    for one, other in (("keep", "keep_by"), ("keep_by", "keep")):
        rows = np.flatnonzero(pc.and_(columns[one].is_valid(), columns[other].is_null()))
        errors.add(rows, one, [shown(said) for said in columns[one].take(rows).to_pylist()],
                   f"{one} beside {other}: how many of a row's samples are selected, and by which measure")
    rows = np.flatnonzero(pc.fill_null(pc.greater(columns["keep"], columns["samples"].fill_null(1)), False))
    errors.add(rows, "keep", [shown(said) for said in columns["keep"].take(rows).to_pylist()], "at most samples")

    unnamed = rows_without(columns["id"], "id", errors)
    columns["id"] = with_ids(columns["id"], unnamed, ids_of_content(columns, unnamed))
    if len(unnamed) < len(columns["id"]):               # names that were made up differ from each other
        columns["id"] = with_unique_ids(columns["id"], errors)
    return pa.table(columns), unnamed


def values_allowed(setting: Setting, values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Which values any model could take."""
    if setting.type is not str:
        return pc.and_(pc.greater_equal(values, setting.low), pc.less_equal(values, setting.high))
    fitting = pc.less_equal(pc.binary_length(values), setting.max_bytes)
    if setting.refuse:
        fitting = pc.and_(fitting, pc.invert(pc.match_substring_regex(values, setting.refuse)))
    if setting.must:
        fitting = pc.and_(fitting, pc.match_substring_regex(values, setting.must))
    if setting.choices:
        fitting = pc.and_(fitting, pc.is_in(values, pa.array(setting.choices, TEXT)))
    return fitting


def rows_without(values: pa.ChunkedArray, column: str, errors: ValidationErrors) -> np.ndarray:
    """Rows that have no value and no error that says why."""
    explained = errors.rows_with_error(column) | errors.rows_with_error(None)
    return np.setdiff1d(np.flatnonzero(values.is_null()), np.fromiter(explained, np.int64, len(explained)))


def with_ids(ids: pa.ChunkedArray, rows: np.ndarray, names: pa.Array) -> pa.ChunkedArray:
    """The ids, with these names in these rows."""
    if len(rows) == len(ids):
        return pa.chunked_array([names.cast(TEXT)])
    if not len(rows):
        return ids
    mask = np.zeros(len(ids), bool)
    mask[rows] = True
    return pa.chunked_array([pc.replace_with_mask(ids.combine_chunks(), pa.array(mask), names.cast(TEXT))])


def ids_of_content(columns: Mapping[str, pa.ChunkedArray], rows: np.ndarray) -> pa.Array:
    """A name for each of these rows, from what it asks for, as it says it: 16 hexadecimal digits.

    What decides no pixels is no part of it, nor is a column that says nothing; so a row keeps its name wherever it
    stands, in whatever format, and with whatever columns beside. The k-th row of equal ones has -k behind.
    """
    said = {name: columns[name] for name in CONTENT if columns[name].null_count < len(columns[name])}
    if not said:
        heads = bytes(ID_BYTES * len(rows))
    else:
        blocks = []
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            block = pa.array(rows[start: start + ROWS_AT_A_TIME])
            cells = [cells_of(name, column.take(block).combine_chunks()) for name, column in said.items()]
            texts = pc.binary_join_element_wise(*cells, pa.scalar("", TEXT)).cast(pa.large_binary()).to_pylist()
            blocks.append(b"".join([hashlib.sha256(text).digest()[:ID_BYTES] for text in texts]))
        heads = b"".join(blocks)
    names = in_hex(heads, ID_BYTES)
    encoded = pa.array(np.frombuffer(heads, np.int64)).dictionary_encode()
    if len(encoded.dictionary) == len(rows):
        return names
    codes = encoded.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    is_first = np.diff(codes[order], prepend=-1) != 0
    nth = np.empty(len(codes), np.int64)
    nth[order] = np.arange(len(codes)) - np.maximum.accumulate(np.where(is_first, np.arange(len(codes)), 0))
    again = pa.array(nth > 0)
    more = pc.binary_join_element_wise(names.filter(again), pa.array(nth[nth > 0]).cast(TEXT), pa.scalar("-", TEXT))
    return pc.replace_with_mask(names, again, more)


def cells_of(name: str, values: pa.Array) -> pa.Array:
    """What each value of a column adds to the name of its row, as text: nothing where it says nothing."""
    if values.type in (REAL, YES_OR_NO):               # as Python writes them; -0.0 is 0.0
        encoded = values.dictionary_encode()
        texts = [repr(value + 0.0 if values.type == REAL else value) for value in encoded.dictionary.to_pylist()]
        values = pa.array(texts, TEXT).take(encoded.indices)
    values = values.cast(TEXT)
    sizes = pc.utf8_length(values).cast(TEXT)
    return pc.binary_join_element_wise(pa.scalar(name, TEXT), sizes, values, pa.scalar(" ", TEXT)).fill_null("")


def with_unique_ids(ids: pa.ChunkedArray, errors: ValidationErrors) -> pa.ChunkedArray:
    """The ids; one that an earlier row has is reported."""
    positions = np.arange(len(ids))
    encoded = ids.combine_chunks().dictionary_encode()
    if len(encoded.dictionary) + encoded.null_count < len(ids):
        is_given = encoded.is_valid().to_numpy(zero_copy_only=False)
        rows, codes = positions[is_given], encoded.indices.drop_null().to_numpy()
        first = rows[np.unique(codes, return_index=True)[1]]           # of each code; they count up from 0
        again = rows[first[codes] != rows]
        given = [f"{shown(name)}, the id of row {first[code]}" for name, code in
                 zip(ids.take(again).to_pylist(), encoded.indices.take(again).to_pylist(), strict=True)]
        errors.add(again, "id", given, "an id that no other row has")
    return ids
