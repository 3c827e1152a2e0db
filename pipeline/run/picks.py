"""What people decided about clips: picks/<digest>.parquet, a file for each time that somebody did.

It comes as JSON (docs/morning.md) from a page, a file or a program, and may say anything: it is bounded, parsed
against a schema, and kept as data. A file is never changed; of two decisions about one clip the later one counts.
"""

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from dailies.model.errors import DailiesError
from dailies.model.settings import MAX_ID_BYTES
from dailies.pipeline.manifest.validation import shown
from dailies.pipeline.run.layout import PICKS, picks_key
from dailies.pipeline.run.ledger_part import read_part
from dailies.pipeline.store import NotFound, Store, StoreError, TooLarge

MAX_PICKS_BYTES = 2**26                 # of one file, as JSON or as it is stored
MAX_PICKS = 200_000                     # in one file
MAX_NOTE_CHARACTERS = 4000
MAX_NAME_CHARACTERS = 200
CLOCKS_DIFFER = timedelta(days=1)       # a decision of later than this would stand above all that follow
NO_SUCH_FIELD = "no field of decisions has this name"
DECISIONS = ("pick", "reject", "redo")
DECIDED = ("decision", "decided_at", "decided_by", "note")             # columns that the ledger gets of it
STORED = pa.schema({"id": pa.string(), "seed": pa.int64(), "clip_id": pa.string(), "decision": pa.string(),
                    "decided_at": pa.timestamp("us", tz="UTC"), "decided_by": pa.string(), "note": pa.string()})


class BadPicks(DailiesError, ValueError):
    """What should be decisions is none; the message says where and why."""


class Pick(BaseModel):
    """What somebody decided about the clip of one row."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: Annotated[str, Field(min_length=1, max_length=MAX_ID_BYTES)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    clip_id: Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]
    decision: Literal["pick", "reject", "redo"] | None = None       # None: no decision any more; a note may stand
    note: Annotated[str, Field(max_length=MAX_NOTE_CHARACTERS)] = ""
    decided_at: AwareDatetime

    @field_validator("decided_at")
    @classmethod
    def is_a_time_that_was(cls, said: datetime) -> datetime:
        if not datetime(1970, 1, 2, tzinfo=UTC) <= said <= datetime.now(UTC) + CLOCKS_DIFFER:
            raise ValueError("a time from 1970 to now")
        return said.astimezone(UTC)


class Picks(BaseModel):
    """picks.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1]
    picks: Annotated[list[Pick], Field(max_length=MAX_PICKS)]
    decided_by: Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)] = ""

    @classmethod
    def parsed(cls, data: bytes) -> Self:
        """Of picks.json.  Raises BadPicks."""
        if len(data) > MAX_PICKS_BYTES:
            raise BadPicks(f"decisions of {len(data):,} bytes; at most {MAX_PICKS_BYTES:,} are read at a time")
        try:
            return cls.model_validate_json(data.removeprefix(codecs.BOM_UTF8))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            place = shown(".".join(map(str, first["loc"][:4]))) if first["loc"] else "the file"
            said = NO_SUCH_FIELD if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
            given = "" if isinstance(first.get("input"), (dict, list, bytes)) else f"; got {shown(first.get('input'))}"
            raise BadPicks(f"these are no decisions: {place}: {said[:200]}{given}. docs/morning.md says what a file of "
                           "them has") from None

    def only(self, known: Iterable[tuple[str, int, str]]) -> Self:
        """Those about these rows.  known: id, seed and clip_id of each."""
        there = set(known)
        return self.model_copy(update={"picks": [pick for pick in self.picks
                                                 if (pick.id, pick.seed, pick.clip_id) in there]})

    def last(self) -> list[Pick]:
        """Of each clip the decision that counts: the latest."""
        found: dict[tuple[str, int, str], Pick] = {}
        for pick in sorted(self.picks, key=lambda pick: pick.decided_at):
            found[pick.id, pick.seed, pick.clip_id] = pick
        return list(found.values())


def write_picks(store: Store, picks: Picks) -> str | None:
    """Keep decisions in the run folder; returns the key of their file, None for none. The same ones are kept once.

    May be called while a driver works, and by several at a time.  Raises StoreError.
    """
    if not picks.picks:
        return None
    key = picks_key(hashlib.sha256(picks.model_dump_json().encode()).hexdigest()[:32])
    columns: Mapping[str, list[Any]] = {
        name: [picks.decided_by if name == "decided_by" else getattr(pick, name) for pick in picks.picks]
        for name in STORED.names}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=STORED), sink, compression="zstd", write_page_checksum=True)
    store.create(key, sink.getvalue().to_pybytes())
    return key


def read_picks(store: Store) -> pa.Table:
    """The last decision about each row's clip: STORED.  Raises StoreError for a file that is none."""
    table = pa.concat_tables([STORED.empty_table(), *stored_picks(store)])
    if not table.num_rows:
        return table
    table = table.append_column("at", pa.array(np.arange(table.num_rows)))
    table = table.sort_by([("decided_at", "ascending"), ("at", "ascending")]).drop_columns(["at"])
    numbered = pa.table({name: table[name] for name in ("id", "seed", "clip_id")} | {"at": np.arange(table.num_rows)})
    last = numbered.group_by(["id", "seed", "clip_id"]).aggregate([("at", "max")])["at_max"]
    return table.take(pa.array(np.sort(last.to_numpy())))


def stored_picks(store: Store) -> Iterator[pa.Table]:
    """Of each file, in the order of their names."""
    for info in store.list(f"{PICKS}/"):
        if not info.key.endswith(".parquet"):
            continue
        try:
            table = read_part(store.get(info.key, at_most=MAX_PICKS_BYTES), None, STORED, needs=STORED.names,
                              known_alone=True)
            yield checked_picks(table.select(STORED.names))
        except NotFound:
            continue
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
            why = f"it is larger than any file of decisions: {error}" if isinstance(error, TooLarge) else str(error)
            raise StoreError(f"{store.uri_of(info.key)} cannot be read: {why or type(error).__name__}. Move it away; "
                             "`dailies pick` writes decisions again that are still in a picks.json") from error


def checked_picks(table: pa.Table) -> pa.Table:
    """Raises ValueError for what no writer of ours puts down."""
    for name in ("seed", "clip_id", "decided_at"):
        if table[name].null_count:
            raise ValueError(f"a row of it has no {name}")
    if strange := [said for said in table["decision"].unique().to_pylist() if said not in (*DECISIONS, None)]:
        raise ValueError(f"decision must be one of {', '.join(DECISIONS)}; got {shown(strange[0])}")
    return table
