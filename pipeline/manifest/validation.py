"""What is wrong with a manifest, gathered so that a person hears all of it at once.

An error is one cell: row, column, what was given, what is allowed. They are kept by the check that found them, in
columns, because a manifest of a million rows can be wrong in every one.
"""

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from heapq import merge
from itertools import groupby, islice, repeat
from operator import attrgetter
from typing import Any

from dailies.model.errors import DailiesError, printable

SHOWN_IN_FULL = 20
SHOWN_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True)
class RowError:
    row: int | None                 # position in the whole manifest, from 0; None: the file or column as a whole
    place: str                      # the row, or the file, in words
    column: str | None
    given: str                      # shortened, unprintable characters escaped
    allowed: str
    question: str = ""              # said instead of what is allowed

    def __str__(self) -> str:
        return f"{self.place}, {self.reason}" if self.column else f"{self.place}: {self.reason}"

    @property
    def reason(self) -> str:
        """The error without its place, for a record of the row itself."""
        said = f"got {self.given}. {self.question}" if self.question else f"got {self.given}; allowed: {self.allowed}"
        return f"{self.column}: {said}" if self.column else said


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """One check that failed: the same rule broken in one or more rows."""

    rows: array                     # of int64, ascending
    column: str | None
    given: Sequence[str]            # one per row
    allowed: str


class ValidationErrors:
    """A growing list of errors; iterates by row, those about no single row first."""

    def __init__(self, files: Sequence[tuple[str, int]] = ()):
        """files: name and first row of each manifest file, in order; named in an error when there are several."""
        self.files = list(files)
        self._whole: list[RowError] = []
        self._findings: list[_Finding] = []

    def __len__(self) -> int:
        return len(self._whole) + sum(len(finding.rows) for finding in self._findings)

    def about(self, place: str, column: str | None, given: str, allowed: str, *, question: str = "") -> None:
        """An error about a whole file or column: no row can be set aside to cure it."""
        self._whole.append(RowError(row=None, place=place, column=column, given=given, allowed=allowed,
                                     question=question))

    def add(self, rows: Iterable[int], column: str | None, given: Sequence[str], allowed: str) -> None:
        """One error for each of `rows`, which ascend; nothing for none."""
        rows = array("q", rows)
        if rows:
            self._findings.append(_Finding(rows=rows, column=column, given=given, allowed=allowed))

    def copy(self) -> "ValidationErrors":
        twin = ValidationErrors(self.files)
        twin._whole, twin._findings = list(self._whole), list(self._findings)
        return twin

    @property
    def whole(self) -> bool:
        """Whether one of them is about a whole file or column."""
        return bool(self._whole)

    def rows(self) -> set[int]:
        """Positions of the bad rows."""
        return {row for finding in self._findings for row in finding.rows}

    def rows_with_error(self, column: str | None) -> set[int]:
        """Positions of the rows with an error about this column (None: about the row as a whole)."""
        return {row for finding in self._findings if finding.column == column for row in finding.rows}

    def __iter__(self) -> Iterator[RowError]:
        yield from self._whole
        cells = merge(*(zip(finding.rows, repeat(number), range(len(finding.rows)))
                        for number, finding in enumerate(self._findings)))
        for row, number, at in cells:
            finding = self._findings[number]
            yield RowError(row=row, place=self._place(row), column=finding.column, given=finding.given[at],
                            allowed=finding.allowed)

    def by_row(self) -> Iterator[tuple[int, list[RowError]]]:
        """The bad rows in order, each with its errors."""
        about_rows = (error for error in self if error.row is not None)
        for row, errors in groupby(about_rows, key=attrgetter("row")):
            yield row, list(errors)

    def _place(self, row: int) -> str:
        if len(self.files) < 2:
            return f"row {row}"
        name, first = self.files[bisect_right(self.files, row, key=lambda file: file[1]) - 1]
        return f"row {row} ({name}, row {row - first})"

    def first(self, count: int = SHOWN_IN_FULL) -> list[RowError]:
        return list(islice(self, count))

    def rest(self, after: int = SHOWN_IN_FULL) -> list[tuple[int, str]]:
        """What comes after the first ones, counted by rule: (how many, "column: allowed"), most frequent first."""
        rules = Counter((error.column, error.allowed) for error in islice(self, after, None))
        return [(count, f"{column}: {allowed}" if column else allowed)
                for (column, allowed), count in rules.most_common(SHOWN_IN_FULL)]

    def as_json(self) -> dict[str, Any]:
        """{"count", "first": [error...], "rest": [{"count", "rule"}...]}"""
        return {"count": len(self), "first": [asdict(error) for error in self.first()],
                "rest": [{"count": count, "rule": rule} for count, rule in self.rest()]}


class ManifestError(DailiesError):
    """The manifest cannot be rendered as it is; nothing was started.  `errors` says all that is wrong with it."""

    def __init__(self, manifest: str, errors: ValidationErrors):
        self.manifest, self.errors = manifest, errors
        super().__init__(manifest, errors)

    def __str__(self) -> str:
        total = len(self.errors)
        lines = [f"{self.manifest}: {total:,} error{'s' if total > 1 else ''}; rows count from 0"]
        lines += [f"  {error}" for error in self.errors.first()]
        if total > SHOWN_IN_FULL:
            lines.append(f"and {total - SHOWN_IN_FULL:,} more:")
            lines += [f"  {count:,} x {rule}" for count, rule in self.errors.rest()]
        lines.append("Correct the manifest." if self.errors.whole else
                     "Correct the manifest, or set these rows aside with --skip-invalid.")
        return "\n".join(map(printable, lines))


def shown(value: object, num_bytes: int | None = None) -> str:
    """A value for a message: quoted if text, shortened, with nothing in it that a terminal would obey.

    num_bytes: its size in UTF-8, when `value` is only its beginning.
    """
    if not isinstance(value, str):
        text = repr(value)
        return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
    if num_bytes is None:
        num_bytes = len(value.encode("utf-8", "surrogatepass"))
    cut = value[:SHOWN_CHARACTERS]
    is_whole = len(cut.encode("utf-8", "surrogatepass")) >= num_bytes
    return repr(cut) if is_whole else f"{cut!r}... ({num_bytes:,} bytes)"
