"""The rows of a manifest that is text: CSV, JSON lines, a list in JSON, a prompt per line.

Text is read row by row in plain Python, because a broken line must cost one row and be named by its number. A line is
bounded before it is parsed, and so is what is held at a time: 3 bytes of JSON can become 80 of objects.
"""

import codecs
import csv
import io
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from dailies.model.settings import SETTINGS
from dailies.pipeline.manifest.columns import COLUMN_NAMES, nearly, repeated
from dailies.pipeline.manifest.raw_bytes import MAX_COLUMNS
from dailies.pipeline.manifest.validation import shown

ROWS_PER_BLOCK = 20_000             # bounds, with the next, how much lives as Python objects at a time
BLOCK_CHARACTERS = 4 << 20
MAX_LINE = 4 << 20                  # characters, of a row too: a prompt has 8 KiB
MAX_ROW_LINES = 10_000              # of CSV; a prompt of nothing but line ends has fewer
FEW_LINES = 16                      # of a row, once more than this was read again:
MAX_REREAD = 64 << 20               # characters, and 100 for each line; stray quotes do not come to it
MAX_DOCUMENT = 16 << 20             # characters of a JSON object with the rows in it, which is parsed as a whole
MAX_SPARSE = 50                     # cells of JSON that are not there, for each that is: all become cells
FREELY_ABSENT = 1_000_000           # of a block
MAX_BROKEN = 100_000                # lines, after which the file is none of its kind

BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
                    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
BLANK = re.compile(r"[ \t\r\n]*")
WORD = re.compile(r"[^\W\d][\w\-.]{0,39}")             # as columns are called
PLAIN_NUMBER = re.compile(r"\s*[+-]?[\d.]+\s*")
_NUMBERS = tuple(setting.name for setting in SETTINGS if setting.type in (int, float))


@dataclass(kw_only=True)
class RowBlock:
    """Consecutive rows of a text file. A broken row is None in every column and has its reason in `broken`."""

    columns: dict[str, list]
    num_rows: int
    broken: list[tuple[int, str, str]] = field(default_factory=list)    # row in the block, given, allowed


class LineTooLong(Exception):
    """A line that is longer than any row."""


def _text_of(stream: BinaryIO) -> io.TextIOWrapper:
    """The text of a file in UTF-8, or in what its byte order mark says.  Raises ValueError for another encoding.

    In UTF-8 a wrong byte becomes a lone surrogate, and costs the row that it is in.
    """
    if not hasattr(stream, "peek"):
        stream = io.BufferedReader(cast(io.RawIOBase, stream))
    beginning = cast(io.BufferedReader, stream).peek(4096)[:4096]
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if beginning.startswith(mark)), None)
    if encoding is None and (nuls := beginning.count(0)) > len(beginning) / 4:
        order = "big" if beginning[0::2].count(0) > nuls / 2 else "little"
        raise ValueError(f"text that looks like UTF-16 ({order} endian) without a byte order mark; save it as UTF-8")
    return io.TextIOWrapper(stream, encoding=encoding or "utf-8", newline="",
                            errors="surrogateescape" if encoding in (None, "utf-8-sig") else "strict")


class Lines:
    """A text's lines with their numbers; what was read too far can be handed back."""

    def __init__(self, text: io.TextIOWrapper):
        self.text, self.number, self.waiting = text, 0, deque[str]()
        self.taken: list[str] = []                     # since `begin`
        self.readline, self.take = text.readline, self.taken.append
        self.owes = False                              # a line that was too long, in the middle of a row
        self.length, self.most = 0, MAX_ROW_LINES      # characters in `taken`; lines that may be in it
        self.reread = 0

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        if not self.taken:
            self.length = 0
        elif self.length > MAX_LINE or len(self.taken) >= self.most:
            raise LineTooLong(f"a row of more than {len(self.taken):,} lines" if self.length <= MAX_LINE else
                              f"a row of {MAX_LINE:,} characters and more")
        if self.waiting:
            line = self.waiting.popleft()
        elif self.owes:
            self.owes = False
            raise LineTooLong(f"a line of {MAX_LINE:,} characters and more")
        else:
            line = self.readline(MAX_LINE)
            if len(line) == MAX_LINE and line[-1] not in "\r\n":
                self.number += 1
                self.owes = bool(self.taken)           # in the middle of a row: it costs one of its own, too
                while line and line[-1] not in "\r\n":
                    line = self.readline(MAX_LINE)
                raise LineTooLong(f"a line of {MAX_LINE:,} characters and more")
            if not line:
                raise StopIteration
        self.number += 1
        self.length += len(line)
        self.take(line)
        return line

    def begin(self) -> int:
        """Forget the lines so far; the number of the line to come."""
        self.taken.clear()
        return self.number + 1

    def hand_back(self, keep: int) -> None:
        """All lines since `begin` but the first `keep`.

        Each row may open a quote that swallows what follows: when much has been read again, rows may swallow little.
        """
        if len(self.taken) > 1:
            self.reread += self.length + 100 * len(self.taken)
        if self.reread > MAX_REREAD:
            self.most = FEW_LINES
        self.waiting.extendleft(reversed(self.taken[keep:]))
        self.number -= len(self.taken) - keep
        del self.taken[keep:]


# CSV

def csv_blocks(stream: BinaryIO, delimiter: str, known: Iterable[str] = (), notes: list[str] | None = None
               ) -> Iterator[RowBlock]:
    """The rows of a CSV with a header line. An empty cell is None, every other cell is its text.

    delimiter: what its name says; another one is taken where only that makes sense of the header.  known: names that
    the header may have beside ours.  notes: is told what a person should know of the file.
    Raises ValueError for a header that cannot name columns.
    """
    lines = Lines(_text_of(stream))
    delimiter, names = csv_header(lines, delimiter, {*COLUMN_NAMES, *known})
    previous_limit = csv.field_size_limit(MAX_LINE)
    try:
        reader = CsvRows(lines, names, delimiter)
        while block := reader.block():
            yield block
        if notes is not None and reader.tall:
            first, most = min(reader.tall), max(reader.tall.values())
            said = "rows go" if len(reader.tall) > 1 else "row goes"
            notes.append(f"{len(reader.tall):,} {said} over several lines: the first from line {first}, "
                         f"the tallest over {most}")
    finally:
        csv.field_size_limit(previous_limit)


def csv_header(lines: Lines, delimiter: str, known: set[str]) -> tuple[str, list[str]]:
    """What stands between the cells, and the columns' names.  Raises ValueError."""
    try:
        first = next(lines, "")
        if said := re.fullmatch(r"sep=(.)\s*", first):                 # as Excel begins a file
            delimiter, first = said[1], next(lines, "")
    except LineTooLong as error:
        raise ValueError(f"a header line that cannot be read: {error}") from error
    lines.hand_back(len(lines.taken) - 1 if first else 0)
    choices = {}
    for choice in dict.fromkeys((delimiter, ",", ";", "\t", "|")):
        with suppress(csv.Error):
            choices[choice] = next(csv.reader([first], delimiter=choice, strict=True), [])
    is_right = (lambda cells: any(cell.strip() in known for cell in cells), lambda cells: any(map(nearly, cells)),
                lambda cells: len(cells) > 1)
    choice = next((choice for check in is_right for choice, cells in choices.items() if check(cells)), delimiter)
    lines.begin()
    try:
        header = next(csv.reader(lines, delimiter=choice, strict=True), [])        # a name may go over lines
    except (csv.Error, LineTooLong) as error:
        raise ValueError(f"a header line that cannot be read: {error}") from error
    names = [name.strip() or f"column_{at}" for at, name in enumerate(header)]     # pandas does not name its index
    if any("\0" in name or not is_text(name) for name in names):
        raise ValueError(f"a header that is not UTF-8 text: {shown(choice.join(header))}")
    if len(names) > MAX_COLUMNS:
        raise ValueError(f"{len(names):,} names of columns; a manifest may have {MAX_COLUMNS:,}")
    if twice := repeated(names):
        raise ValueError(f"a header that names a column twice: {', '.join(map(shown, twice))}")
    return choice, names


class CsvRows:
    """Rows under a header. A quote that nothing closes costs its own line, and the lines after it are read on."""

    def __init__(self, lines: Lines, names: list[str], delimiter: str):
        self.lines, self.names, self.delimiter = lines, names, delimiter
        self.reader = csv.reader(lines, delimiter=delimiter, strict=True)
        self.numbers = [at for at, name in enumerate(names) if name in _NUMBERS]
        self.tall: dict[int, int] = {}                 # rows that go over several lines: the first, and how many
        self.num_broken = 0

    def block(self) -> RowBlock | None:
        rows: list[list[str | None]] = []
        broken: list[tuple[int, str, str]] = []
        lines, reader, taken, delimiter = self.lines, self.reader, self.lines.taken, self.delimiter
        width, size, quoted = len(self.names), 0, True
        while len(rows) < ROWS_PER_BLOCK and size < BLOCK_CHARACTERS:
            taken.clear()
            number = lines.number + 1
            try:
                if not quoted and '"' in (line := next(lines)):
                    quoted = True
                    lines.hand_back(0)
                if quoted:
                    row = next(reader)
                    quoted = '"' in taken[0]
                elif line := line.rstrip("\r\n"):     # a line without quotes is its cells
                    row = line.split(delimiter)
                else:                                  # a blank line
                    continue
                if len(row) == width and len(taken) == 1:
                    rows.append([cell or None for cell in row])
                    size += len(taken[0])
                    continue
                reason = self.suspicion() if len(taken) > 1 else ""
            except StopIteration:
                break
            except (csv.Error, LineTooLong) as error:
                row, reason = [], str(error)
            if len(taken) > 1 or reason:
                row, reason = self.looked_at_again(row, reason, number)
            size += sum(map(len, taken))
            if reason:
                broken.append((len(rows), f"line {number} ({reason})", "a line of CSV"))
            elif len(row) == width:
                rows.append([cell or None for cell in row])
                continue
            elif not row:                              # a blank line
                continue
            else:
                cells = shown(self.delimiter.join(row[:99]))
                broken.append((len(rows), f"line {number} with {len(row)} cells: {cells}",
                               f"{width} cells, as in the header; quote text that holds "
                               + {",": "commas", ";": "semicolons", "\t": "tabs"}.get(self.delimiter, self.delimiter)))
            rows.append([None] * width)
            self.num_broken += 1
            refuse_too_many(self.num_broken, broken[-1][1])
        if not rows:
            return None
        columns = dict(zip(self.names, map(list, zip(*rows, strict=True)), strict=True))
        return RowBlock(columns=columns, num_rows=len(rows), broken=broken)

    def suspicion(self) -> str:
        """Why what was read as one row over several lines is rather several rows; "" where it is not."""
        first, *inner, last = [self.is_like_a_row(line) for line in [*self.lines.taken[:1000], self.lines.taken[-1]]]
        if self.numbers:
            is_odd = any(inner[:-1] if len(self.lines.taken) <= 1000 else inner) or first and last
        else:                                          # a prompt of several lines may have as many commas
            is_odd = len(inner) > 3 and all(inner[:-1])
        return "its quote is closed only by that of a later row" if is_odd else ""

    def is_like_a_row(self, line: str) -> bool:
        """Whether a line has as many cells as the header, with numbers where ours are."""
        cells = line.replace('"', "").rstrip("\r\n").split(self.delimiter)
        if not len(cells) == len(self.names) > 1:
            return False
        numbers = [cells[at] for at in self.numbers]
        return not numbers or any(numbers) and all(not cell or PLAIN_NUMBER.fullmatch(cell) for cell in numbers)

    def looked_at_again(self, row: list[str], reason: str, number: int) -> tuple[list[str], str]:
        """A row that went over several lines, or could not be read: the row, and what is wrong with it."""
        lines = self.lines
        if self.delimiter == "\t" and lines.taken and (reason or len(lines.taken) > 1):
            cells = lines.taken[0].rstrip("\r\n").split("\t")          # quotes are mostly plain text between tabs
            if len(cells) == len(self.names):
                lines.hand_back(1)
                return cells, ""
        if not reason:
            self.tall[number] = len(lines.taken)
            return row, ""
        if len(lines.taken) > 1:
            reason = f"a quote is opened here that would swallow {len(lines.taken) - 1:,} more lines: {reason}"
            lines.hand_back(1)
        return [], reason


# JSON

def json_blocks(stream: BinaryIO) -> Iterator[RowBlock]:
    """The rows of a file with one JSON object per line; a key that a row lacks is None. Blank lines are skipped."""
    yield from blocks_of_json(Lines(_text_of(stream)))


def blocks_of_json(lines: Lines) -> Iterator[RowBlock]:
    num_broken = 0
    ended = False
    while not ended:
        rows: list[dict] = []
        broken: list[tuple[int, str, str]] = []
        size = 0
        while len(rows) < ROWS_PER_BLOCK and size < BLOCK_CHARACTERS:
            try:
                line = next(lines)
            except StopIteration:
                ended = True
                break
            except LineTooLong as error:
                line, reason = "", str(error)
            else:
                lines.taken.clear()
                if line.isspace():
                    continue
                size += len(line)
                try:
                    row = json.loads(line)
                    reason = "" if isinstance(row, dict) else "no object"
                    if not reason and line.count('":') > len(row):     # names inside of cells, or one of its own twice
                        reason = twice_in(line)
                except (ValueError, RecursionError) as error:
                    reason = str(error)
            if reason:
                broken.append((len(rows), f"line {lines.number}: {shown(line.rstrip())} ({reason})",
                               "one JSON object per line"))
                row = {}
                num_broken += 1
                refuse_too_many(num_broken, broken[-1][1])
            rows.append(row)
        if rows:
            yield block_of(rows, broken)


def twice_in(line: str) -> str:
    """What is wrong with a JSON object that names a cell twice, of which Python would keep the last; "" for others."""
    twice: list[str] = []                              # of the object that was read last, which is the outermost

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        twice[:] = repeated(name for name, _ in found)
        return {}

    json.loads(line, object_pairs_hook=pairs)
    return f"{shown(twice[0])} is there twice" if twice else ""


def block_of(rows: list[dict], broken: list[tuple[int, str, str]]) -> RowBlock:
    names = dict.fromkeys(name for row in rows for name in row)
    if len(names) > MAX_COLUMNS:
        raise ValueError(f"{len(names):,} names of columns; a manifest may have {MAX_COLUMNS:,}")
    if len(names) * len(rows) > FREELY_ABSENT + MAX_SPARSE * sum(map(len, rows)):
        raise ValueError(f"{len(names):,} names of columns in {len(rows):,} rows, of which hardly one has a cell of "
                         f"its own; give rows the same names, or split the manifest")
    if bad := {name for name in names if not is_text(name)}:
        names = {name: None for name in names if name not in bad}
        known = {at for at, _, _ in broken}
        found = [(at, next((name for name in row if name in bad), None)) for at, row in enumerate(rows)]
        broken += [(at, f"a name that is no text: {shown(name)}", "names in UTF-8") for at, name in found
                   if name is not None and at not in known]
    gone = {at for at, _, allowed in broken if allowed == "names in UTF-8"}
    columns = {name: [None if at in gone else row.get(name) for at, row in enumerate(rows)] if gone else
               [row.get(name) for row in rows] for name in names}
    return RowBlock(columns=columns, num_rows=len(rows), broken=sorted(broken))


def document_blocks(stream: BinaryIO, known: Iterable[str] = (), notes: list[str] | None = None) -> Iterator[RowBlock]:
    """The rows of a .json file: a list of texts or objects, an object that holds one, objects by name, or one a line.

    A list may be as long as a manifest may be, and is never in memory as a whole.  Raises ValueError for what is none.
    """
    text = _text_of(stream)
    begun = next((begun for begun in iter(lambda: text.read(1 << 16), "") if not begun.isspace()), "")
    if begun.lstrip()[:1] == "[":
        yield from list_blocks(begun, text)
        return
    begun += text.readline(MAX_LINE)
    pieces = [piece for piece in io.StringIO(begun, newline="") if not piece.isspace()]
    if len(pieces) == 1:
        pieces += [following for following in iter(lambda: text.readline(MAX_LINE), "") if not following.isspace()][:1]
    if not pieces:
        return
    whole = parsed(pieces[0])
    if isinstance(whole, dict) and len(pieces) > 1:
        lines = Lines(text)
        lines.waiting.extend(pieces)
        yield from blocks_of_json(lines)
        return
    if not isinstance(whole, dict):
        content = "".join(pieces) + text.read(MAX_DOCUMENT)
        if len(content) > MAX_DOCUMENT:
            raise ValueError(f"a JSON object of more than {MAX_DOCUMENT:,} characters; write a list, or one object per "
                             "line (.jsonl)")
        try:
            whole = json.loads(content)
        except RecursionError:
            raise ValueError("JSON that is nested too deeply") from None
        if not isinstance(whole, dict):
            raise ValueError(f"JSON that holds no rows: {shown(content[:100])}")
    rows = rows_of_document(whole, {*COLUMN_NAMES, *known}, [] if notes is None else notes)
    for at in range(0, len(rows), ROWS_PER_BLOCK):
        yield block_from(rows[at: at + ROWS_PER_BLOCK], at)


def parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def rows_of_document(document: dict[str, Any], known: set[str], notes: list[str]) -> list[Any]:
    """The rows of one JSON object.  Raises ValueError where it cannot be said which they are."""
    if any(name in known and isinstance(value, str) for name, value in document.items()):
        return [document]                              # a single row, whatever else it holds
    lists = {name: value for name, value in document.items() if isinstance(value, list)
             and any(isinstance(item, (dict, str)) for item in value)}
    if len(lists) == 1 and not known & {*document}:
        [(name, rows)] = lists.items()
        if others := [other for other in document if other != name]:
            notes.append(f"rows are those of {shown(name)}; not read: {', '.join(map(shown, others[:10]))}"
                         + (f" and {len(others) - 10:,} more" if len(others) > 10 else ""))
        return rows
    if document and all(isinstance(value, dict) for value in document.values()) and not known & {*document}:
        notes.append("rows are the objects of a JSON object; their names are their ids where they have none")
        return [value if "id" in value else {"id": name, **value} for name, value in document.items()]
    raise ValueError(f"a JSON object with {', '.join(map(shown, list(document)[:10])) or 'nothing'}; allowed: a list "
                     "of texts or of objects, an object with one such list in it, or one object per line, as pandas "
                     "writes with to_json(orient='records', lines=True)")


def block_from(items: list[Any], first: int) -> RowBlock:
    """Rows of a list: objects, or texts that are prompts."""
    rows, broken = [], []
    for at, item in enumerate(items):
        if not isinstance(item, (dict, str)):
            broken.append((at, f"item {first + at}: {shown(item)}", "a text, or an object"))
        rows.append(item if isinstance(item, dict) else {"prompt": item} if isinstance(item, str) else {})
    return block_of(rows, broken)


def list_blocks(begun: str, text: io.TextIOWrapper) -> Iterator[RowBlock]:
    """The items of a JSON list, of which `begun` has been read already."""
    items: list[Any] = []
    size = count = num_broken = 0
    for item, length in json_items(begun, text):
        items.append(item)
        size += length
        if len(items) == ROWS_PER_BLOCK or size >= BLOCK_CHARACTERS:
            yield (block := block_from(items, count))
            num_broken += len(block.broken)
            refuse_too_many(num_broken, block.broken[-1][1] if block.broken else "")
            count, items, size = count + len(items), [], 0
    if items:
        yield block_from(items, count)


def blank_until(text: str, at: int) -> int:
    blank = BLANK.match(text, at)
    return blank.end() if blank else at


def json_items(begun: str, text: io.TextIOWrapper) -> Iterator[tuple[Any, int]]:
    """Each item of a JSON list, and its length in characters; an item is bounded, the list not.  Raises ValueError."""
    decode = json.JSONDecoder().raw_decode
    buffer, at, line, ended, first = begun, begun.index("[") + 1, 1, False, True

    def more() -> None:
        nonlocal buffer, at, line, ended
        line += buffer.count("\n", 0, at)
        read = text.read(max(1 << 16, len(buffer) - at))
        buffer, at, ended = buffer[at:] + read, 0, not read

    def sign() -> str:
        nonlocal at
        while (at := blank_until(buffer, at)) == len(buffer) and not ended:
            more()
        return buffer[at: at + 1]

    while (found := sign()) != "]":
        if not first:
            if found != ",":
                raise ValueError(f"a JSON list that is broken in line {line + buffer.count(chr(10), 0, at)}: "
                                 f"{shown(buffer[at: at + 60]) if found else 'it ends without its bracket'}")
            at += 1
            sign()
        first = False
        while True:
            try:
                item, end = decode(buffer, at)
                if end < len(buffer) or ended:         # a number at the end of what was read may go on
                    break
            except RecursionError:
                raise ValueError(f"JSON that is nested too deeply, in line {line + buffer.count(chr(10), 0, at)}"
                                 ) from None
            except ValueError as error:
                if ended or len(buffer) - at > MAX_LINE:
                    raise ValueError(f"a JSON list that is broken in line {line + buffer.count(chr(10), 0, at)}: "
                                     f"{shown(buffer[at: at + 60])} ({str(error).partition(':')[0]})") from None
            more()
        yield item, end - at
        at = end
    at += 1
    if sign():
        raise ValueError(f"a JSON list with more behind it: {shown(buffer[at: at + 60])}")


# a prompt per line

def prompt_blocks(stream: BinaryIO, notes: list[str] | None = None) -> Iterator[RowBlock]:
    """The rows of a file with a prompt per line, without the blanks around it. Blank lines are no rows, and counted."""
    lines = Lines(_text_of(stream))
    blank = num_broken = 0
    ended = False
    while not ended:
        prompts: list[str | None] = []
        broken: list[tuple[int, str, str]] = []
        size = 0
        while len(prompts) < ROWS_PER_BLOCK and size < BLOCK_CHARACTERS:
            try:
                line = next(lines)
                lines.taken.clear()
            except StopIteration:
                ended = True
                break
            except LineTooLong as error:
                broken.append((len(prompts), f"line {lines.number}: {error}", "a prompt per line"))
                prompts.append(None)
                num_broken += 1
                refuse_too_many(num_broken, broken[-1][1])
                continue
            if not (prompt := line.strip(" \t\r\n\ufeff")):
                blank += 1
                continue
            if lines.number == 1 and looks_like_header(prompt):
                raise ValueError(f"a first line that names columns, {shown(prompt)}: what has columns is called .csv "
                                 "or .tsv, and .txt is a prompt per line")
            size += len(prompt)
            prompts.append(prompt)
        if prompts:
            yield RowBlock(columns={"prompt": prompts}, num_rows=len(prompts), broken=broken)
    if notes is not None and blank:
        notes.append(f"{blank:,} blank {'lines' if blank > 1 else 'line'} passed over")


def looks_like_header(line: str) -> bool:
    """Whether a line names columns, of which one is a prompt's."""
    cells = [cell.strip().strip('"') for cell in re.split(r"[,;\t|]", line.strip())]
    ours = [cell for cell in cells if cell in COLUMN_NAMES or nearly(cell)]
    if not all(map(WORD.fullmatch, cells)) or "prompt" not in {nearly(cell) or cell for cell in ours}:
        return False
    return "prompt" in map(str.lower, ours) or len(ours) > 1           # "text" alone may be all that is prompted


def sniffed(stream: io.BufferedReader) -> str:
    """The format of text that has no name: csv, json, jsonl or txt."""
    beginning = stream.peek(1 << 16)[:1 << 16]
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if beginning.startswith(mark)), "utf-8")
    text = beginning.decode(encoding, "replace").lstrip()
    if text[:1] in ("[", "{"):
        return "json"
    return "csv" if looks_like_header(text.partition("\n")[0].rstrip("\r")) else "txt"


def refuse_too_many(num_broken: int, last: str) -> None:
    if num_broken > MAX_BROKEN:
        raise ValueError(f"more than {MAX_BROKEN:,} broken rows, the last of them {last}; is it the format that its "
                         "name says?")


def is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:                         # a byte that was no UTF-8 came through as a lone surrogate
        return False
    return True
