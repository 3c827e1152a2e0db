"""What is done: one row for each finished manifest row and sample, in Parquet parts that are only ever added.

Part   ledger/<epoch>-<seq>.parquet. Each writer has an epoch of its own, so no writer overwrites another's part.
Key    (id, seed). A reader takes all parts together; where a key comes twice, the row of the later part counts.
Status done or failed; pending is a row whose clip is to be made: one that was found missing or damaged (`put_back`),
       or another take (redo.py); its next row counts. dropped is a row that a person took out.
Take   of the takes of one manifest row the newest counts: current.py.

A row is written after its clip. What a killed writer had not written yet is found by listing the clips.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dailies.pipeline.manifest.stored_types import as_text, converted, stored_type
from dailies.pipeline.run.current import JUDGED_BY, is_current, latest, slots
from dailies.pipeline.run.judged import BESIDE, NEEDS, with_judgements
from dailies.pipeline.run.layout import LAST_EPOCH, LEDGER, RETRIED, SUCCESS, epoch_of, part_key, retried_key
from dailies.pipeline.run.ledger_part import MAX_PART_BYTES, MAX_ROWS_IN_ALL, STATUSES, read_part
from dailies.pipeline.run.ledger_row import COLUMNS, DAMAGED, DURATION, OTHER_STAGES, is_of_some, stored_error, there
from dailies.pipeline.run.where import BadFilter, Filter, all_of, column_is
from dailies.pipeline.store import NotFound, Store, StoreError, TooLarge

REMEMBERED = ("id", "seed", "status", "error_type", "error", "attempts", "finished_at", "earlier_errors")
ROWS_IN_PART = 1000                     # of the rows that are written in one go
PART_READERS = 8                        # parts read at a time
OBJECTS_AT_A_TIME = 10_000                 # that are turned into Python's objects
NO_COLUMNS = pa.schema([])


class Ledger:
    """The writer. Rows wait in memory for `flush_rows` of them or for `flush_s`; `close` writes the rest."""

    def __init__(self, store: Store, schema: pa.Schema, keys: pa.Table, *, flush_rows: int, flush_s: float):
        self.store, self.schema = store, schema
        self.flush_rows, self.flush_s = flush_rows, flush_s
        keys = keys.append_column("current", pa.array(is_current(keys)))
        pending = pc.equal(keys["status"], "pending")
        self.to_make = keys.filter(pending)             # clips of which rows wait, by what the ledger says
        # clip_id -> why, of clips that are to be made again
        self.put_back = {clip_id: why for clip_id, why, error_type in values_of(
            self.to_make, "clip_id", "error", "error_type") if error_type == DAMAGED}
        self.keys = keys.filter(pc.invert(pending)).drop_columns(["error"])
        self.counts = counts_of(self.keys["status"])
        self.earlier = remembered(store)
        self.waiting: list[pa.Table] = []
        self.num_waiting, self.waiting_since = 0, 0.0   # rows of all of them
        self.epoch, self.seq = next_epoch(store), 0

    @classmethod
    def open(cls, store: Store, extra: pa.Schema = NO_COLUMNS, *, flush_rows: int = 1000,
             flush_s: float = 30.0) -> "Ledger":
        """Reads what is done so far; writes nothing before there are rows.

        extra: further columns of this run, all named user.NAME or quality.NAME, in types that every reader knows.
        Raises ValueError for other names.
        """
        strange = [name for name in extra.names if not name.startswith(("user.", "quality."))]
        if strange:
            raise ValueError(f"further columns of the ledger must be named user.NAME or quality.NAME; got {strange}")
        quality_first = sorted(extra, key=lambda field: field.name.startswith("user."))
        fields = [pa.field(field.name, stored_type(field.type)) for field in quality_first]
        keys = rows_of_keys(store, ["id", "seed", "status", "clip_id", "bytes", "error"], whole=True)
        return cls(store, pa.schema([*COLUMNS, *fields]), keys, flush_rows=flush_rows, flush_s=flush_s)

    def pending(self, keys: pa.Table) -> pa.Table:
        """The rows of `keys` that had none here when this ledger was opened, in their order.  keys: id, seed, ..."""
        if not self.keys.num_rows:
            return keys
        wanted = comparable(keys).append_column("at", pa.array(np.arange(keys.num_rows)))
        left = wanted.join(comparable(self.keys), ["id", "seed"], join_type="left anti")
        mask = np.zeros(keys.num_rows, bool)
        mask[left["at"].to_numpy()] = True
        return keys.filter(pa.array(mask))

    def only(self, keys: pa.Table, unsown: Sequence[str] = ()) -> None:
        """Count these rows alone, whatever else lies in the folder.  keys: id, seed.  unsown: ids without a seed."""
        if self.keys.num_rows:
            invalid = pa.table({"id": pa.array(unsown, pa.string()), "seed": pa.nulls(len(unsown), pa.int64())})
            keys = pa.concat_tables([comparable(keys), comparable(invalid)])
            numbered = comparable(self.keys).append_column("at", pa.array(np.arange(self.keys.num_rows)))
            ours = numbered.join(keys, ["id", "seed"], join_type="left semi")
            self.keys = self.keys.take(pa.array(np.sort(ours["at"].to_numpy())))
            self.counts = counts_of(self.keys["status"])

    def set_aside(self, keys: Container[tuple[str, int | None]]) -> dict[tuple[str, int | None], str | None]:
        """Take these rows as not there: those that are appended count. Returns the clip that each had in its place."""
        if not self.keys.num_rows:
            return {}
        done = pa.table({"id": self.keys["id"], "slot": slots(self.keys), "clip_id": self.keys["clip_id"]})
        of_row = {(name, slot): clip_id for name, slot, clip_id in
                  values_of(done.filter(self.is_done), "id", "slot", "clip_id") if (name, slot) in keys}
        mask = pa.array([key in keys for key in keys_of(self.keys)], pa.bool_())
        found = {key: of_row.get(key) for key in keys_of(self.keys.filter(mask))}
        self.keys = self.keys.filter(pc.invert(mask))
        self.counts = counts_of(self.keys["status"])
        return found

    def forget(self, clip_ids: Collection[str | None]) -> None:
        """Take the rows in which these clips are done as not there; the rows that are appended for them count."""
        if not clip_ids:
            return
        gone = pc.and_(self.is_done, pc.is_in(self.keys["clip_id"], pa.array(clip_ids, pa.string())))
        self.keys = self.keys.filter(pc.invert(gone))
        self.counts = counts_of(self.keys["status"])

    @property
    def is_done(self) -> pa.ChunkedArray:
        """Of each of `keys`; a take that a newer one replaced needs no file."""
        return pc.and_(pc.equal(self.keys["status"], "done"), self.keys["current"])

    def without_a_file(self, files: Mapping[str, int]) -> set[str | None]:
        """The clips that are done by this ledger, and whose file is not there or has another size.

        files: clip_id -> bytes, of all files of clips.
        """
        done = self.keys.filter(self.is_done)
        sizes = zip(done["clip_id"].to_pylist(), done["bytes"].to_pylist(), strict=True)
        return {clip_id for clip_id, num_bytes in sizes
                if num_bytes is None or files.get(clip_id) != num_bytes}

    def append(self, rows: Sequence[Mapping[str, Any]], extra: pa.Table | None = None, *, own: bool = False,
               counts: bool = True, statuses: Collection[str] = ("done", "failed")) -> None:
        """Take rows, by column name; a column that a row does not name is null in it.

        extra: further columns, one row for each of `rows`.  own: they need not be this run's: of a row that is written
        again they are those it had.  counts: whether they are rows of this run's manifest.
        Raises ValueError for rows that do not fit the columns.
        """
        further = extra.column_names if extra is not None else []
        stages = sorted({name for row in rows for name in row if name.startswith(OTHER_STAGES)} - {*self.schema.names})
        if stages:
            self.schema = pa.schema([*self.schema, *(pa.field(name, DURATION.type) for name in stages)])
        schema = self.schema
        if own and extra is not None:
            schema = pa.schema([*(field for field in schema if field.name not in further),
                                *(pa.field(field.name, stored_type(field.type)) for field in extra.schema)])
        for row in rows:
            unknown = sorted({*row, *further} - set(schema.names))
            if unknown or not row.get("id") or row.get("status") not in statuses:
                raise ValueError(f"a ledger row needs an id, the status {' or '.join(statuses)} and columns of this "
                                 f"ledger; got {row.get('id')!r}, {row.get('status')!r}, unknown columns {unknown}")
        try:
            earlier = [self.earlier.get((row["id"], row.get("seed"))) or self.earlier.get((row["id"], None))
                       or row.get("earlier_errors") for row in rows]
            # as one array: one for each column takes four times as long
            table = pa.Table.from_struct_array(pa.array([dict(row) | {"earlier_errors": said} for row, said in
                                                         zip(rows, earlier, strict=True)], pa.struct(list(schema))))
            for name, column in zip(further, extra.columns if extra is not None else [], strict=True):
                field = schema.field(name)
                values = converted(column, field.type)
                table = table.set_column(schema.get_field_index(name), field, values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, UnicodeError) as error:
            raise ValueError(f"a row does not fit the ledger's columns: {error}") from error
        if not self.waiting:
            self.waiting_since = time.monotonic()
        self.waiting.append(table)
        self.num_waiting += len(rows)
        if counts:
            self.counts.update(row["status"] for row in rows)
        self.tick()

    def tick(self) -> None:
        """Write what has waited long enough; to be called now and then where rows come slowly."""
        is_late = self.num_waiting and time.monotonic() - self.waiting_since >= self.flush_s
        if self.num_waiting >= self.flush_rows or is_late:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one part.  Raises StoreError, and the rows wait on."""
        if not self.waiting:
            return
        data = parquet_bytes(together(self.waiting))
        while not self.store.create(part_key(self.epoch, self.seq), data):
            self.epoch, self.seq = next_epoch(self.store), 0       # another writer has this epoch
        self.seq += 1
        self.waiting, self.num_waiting = [], 0

    def close(self) -> None:
        self.flush()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_one_of(column: pa.ChunkedArray, values: Collection[str | None]) -> pa.ChunkedArray:
    return pc.is_in(column, pa.array(sorted(filter(None, values)), column.type))


def without_keys(table: pa.Table, keys: Collection[tuple[str, int | None]]) -> pa.Table:
    """The other rows."""
    near = is_one_of(table["id"], {name for name, _ in keys}).to_pylist()
    return table.filter(pa.array([not (maybe and key in keys) for key, maybe in
                                  zip(keys_of(table), near, strict=True)], pa.bool_()))


def comparable(table: pa.Table) -> pa.Table:
    """id and seed, for a join: there null would not equal null, and a seed is never negative."""
    return pa.table({"id": table["id"].cast(pa.string()), "seed": table["seed"].cast(pa.int64()).fill_null(-1)})


def read(store: Store, columns: Sequence[str] | None = None, *, put_back: bool = False, whole: bool = False,
         every_take: bool = False, written: pa.Table | None = None) -> pa.Table:
    """The ledger as it stands: the current row of each manifest row and sample, in the order of the parts.

    columns: None for all that there are; ALL_OTHER_STAGES stands for the seconds of stages without a column. What
    people decided (`decision, decided_at, decided_by, note`) and `selected` are among them, and stand in no part.
    put_back: also the rows of clips that are to be made (pending).
    every_take: also rows that a newer take replaced, and those that were dropped: the last row of every key.
    whole: every column is read and checked, so that who asks for others later is not refused.
    Of columns that only some ledgers have (`is_of_some`) those are left out that this one does not have.
    written: rows_ever_written(), for who has all columns of it already: then no part is read again.
    """
    beside = tuple(name for name in BESIDE if columns is None or name in columns)
    asked = None if columns is None else [each for name in columns for each in NEEDS.get(name, ())]
    if written is not None:
        table = latest(written)
    else:
        table = rows_of_keys(store, None if columns is None else [*columns, *(asked or ())], whole=whole)
    counts = is_current(table)
    stays = np.ones(table.num_rows, bool) if every_take else counts
    if not put_back:
        stays = stays & pc.not_equal(table["status"], "pending").to_numpy(zero_copy_only=False)
    table, counts = table.filter(pa.array(stays)), counts[stays]
    if beside:
        table = with_judgements(store, table, pa.array(counts), beside)
    for name in columns or ():
        if name not in table.column_names and name not in COLUMNS.names and not is_of_some(name):
            raise BadFilter(f"the ledger has no column {name}; it has {', '.join(COLUMNS.names)}, {', '.join(BESIDE)}, "
                            "user.NAME, seconds.NAME and quality.NAME")
    return table if columns is None else table.select(list(there(dict.fromkeys(columns), table.column_names)))


def rows_of_keys(store: Store, columns: Sequence[str] | None = None, *, whole: bool = False) -> pa.Table:
    """The last row of every key, with the columns that say which of them are current.  columns: as of `read`."""
    wanted = None if columns is None else list(dict.fromkeys([*columns, *JUDGED_BY]))
    return latest(rows_ever_written(store, wanted, whole=whole))


def rows_ever_written(store: Store, columns: Sequence[str] | None = None, *, whole: bool = False) -> pa.Table:
    """Every row of every part, in the order of the parts, whether it counts or not.  columns, whole: as of `read`.
    Raises StoreError.
    """
    tables = [table for _, table in parts(store, columns, whole=whole) if table is not None]
    empty = COLUMNS if columns is None else pa.schema([field for field in COLUMNS if field.name in columns])
    try:
        return together([empty.empty_table(), *tables])
    except pa.ArrowException as error:
        raise StoreError(f"{store.uri_of(LEDGER)}/: its parts do not fit together: {error}. Move away the one that is "
                         "not this run's") from error


def together(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of all parts; a user's column whose types no type unites is text: manifests that a folder was rendered
    for one after the other may disagree, and versions have stored times in types of their own.  Raises ArrowException.
    """
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException:
        fields: dict[str, list[pa.Field]] = {}
        for field in (field for table in tables for field in table.schema if field.name.startswith("user.")):
            fields.setdefault(field.name, []).append(field)
        odd = {name for name, found in fields.items() if not unite(found)}
        tables = [pa.table({name: as_text(column) if name in odd else column
                            for name, column in zip(table.column_names, table.columns, strict=True)})
                  for table in tables]
        return pa.concat_tables(tables, promote_options="permissive")


def unite(fields: Sequence[pa.Field]) -> bool:
    try:
        pa.unify_schemas([pa.schema([field]) for field in fields], promote_options="permissive")
    except pa.ArrowException:
        return False
    return True


def read_apart(store: Store, columns: Sequence[str]) -> tuple[int, pa.Table, pa.Table]:
    """How many other takes are to be made, the current rows that are done or failed, and those that were dropped.

    columns: as of `read`, of its parts alone.
    """
    rows = rows_of_keys(store, columns)
    rows = rows.filter(pa.array(is_current(rows, dropped=True)))
    pending, dropped = (pc.equal(rows["status"], status) for status in ("pending", "dropped"))
    again = pc.fill_null(pc.equal(rows["error_type"], DAMAGED), False)
    takes = counts_of(pc.and_(pending, pc.invert(again)))[True]
    return takes, rows.filter(pc.invert(pc.or_(pending, dropped))), rows.filter(dropped)


def done_clips(store: Store, *, but: Collection[str | None] = ()) -> pa.Table:
    """Of each clip that is done the last row that says so, with what it says of the file; "" for no clip_id. All of
    the ledger is read and checked.

    but: clip_ids that are left out.
    """
    said = ["clip_id", "status", "id", "sha256", "bytes", "width", "height", "frames", "fps", "has_audio"]
    rows = read(store, said, whole=True)
    rows = rows.filter(pc.equal(rows["status"], "done"))
    rows = rows.set_column(rows.column_names.index("clip_id"), "clip_id", rows["clip_id"].fill_null(""))
    rows = rows.filter(pc.invert(is_one_of(rows["clip_id"], but)))
    numbered = pa.table({"clip_id": rows["clip_id"], "at": pa.array(np.arange(rows.num_rows))})
    return rows.take(numbered.group_by("clip_id", use_threads=False).aggregate([("at", "max")])["at_max"])


def put_back(store: Store, problems: Mapping[str, str]) -> int:
    """Make the rows of these clips pending; returns how many.  problems: clip_id -> what was found.

    Nothing is removed: each row gets a newer one, which says why. Call it while no run is writing.
    """
    rows = read(store)
    damaged = pc.is_in(rows["clip_id"].fill_null(""), pa.array(problems, pa.string()))
    done = rows.filter(pc.and_(damaged, pc.equal(rows["status"], "done")))
    if not done.num_rows:
        return 0
    store.delete(SUCCESS)                               # there is something to do again
    now = datetime.now(UTC)
    write_again(store, done, lambda row: {"status": "pending", "error_type": DAMAGED, "finished_at": now,
                                          "error": stored_error(problems[row["clip_id"] or ""])})
    return done.num_rows


def write_again(store: Store, rows: pa.Table, change: Callable[[dict[str, Any]], Mapping[str, Any]], *,
                own: tuple[str, ...] = ("user.", "quality.")) -> None:
    """A further row for each of these, with all that it says but for `change`: it counts from then on.

    rows: of `read`, with all columns.  change: what is different in a row.  own: how further columns begin that go
    along.  For who holds the run's lease: killed half-way, it has written some, a thousand at a time.
    """
    ours = [name for name in rows.column_names if name in COLUMNS.names or name.startswith(OTHER_STAGES)]
    further = [name for name in rows.column_names if name not in ours and name.startswith(own)]
    with Ledger(store, COLUMNS, rows_of_no_key(), flush_rows=ROWS_IN_PART, flush_s=30.0) as writer:
        for start in range(0, rows.num_rows, ROWS_IN_PART):
            block = rows.slice(start, ROWS_IN_PART)
            writer.append([row | change(row) for row in block.select(ours).to_pylist()],
                          block.select(further) if further else None, own=True, statuses=STATUSES)


def clips_ever_named(store: Store) -> set[str]:
    """By any row of any part, whether it counts or not."""
    return set(filter(None, rows_ever_written(store, ["clip_id"])["clip_id"].unique().to_pylist()))


def pending_rows(store: Store, keys: pa.Table) -> Iterator[tuple[dict[str, Any], pa.Table]]:
    """The rows of these keys that wait for their clips: what each says, and its user columns.

    keys: id, seed; and `current`, without which a row no longer waits.
    """
    waiting = (table.filter(pc.equal(table["status"], "pending")) for _, table in parts(store, None)
               if table is not None)
    rows = latest(together([COLUMNS.empty_table(), *(table for table in waiting if table.num_rows)]))
    wanted = set(keys_of(keys.filter(keys["current"])))
    rows = rows.filter(pa.array([key in wanted for key in keys_of(rows)], pa.bool_()))
    own = [name for name in rows.column_names if name.startswith("user.")]
    for at, row in enumerate(rows.select([name for name in rows.column_names if name not in own]).to_pylist()):
        yield row, rows.select(own).slice(at, 1)


def rows_of_no_key() -> pa.Table:
    """What a writer is given who asks nothing of what is there."""
    return COLUMNS.empty_table().select(["id", "seed", "status", "clip_id", "bytes", "error", *JUDGED_BY[3:]])


def recorded_hashes(store: Store, clip_ids: Collection[str]) -> dict[str, str]:
    """clip_id -> SHA-256 of its file as the last row says in which it was done, put back or not."""
    found: dict[str, str] = {}
    wanted = pa.array(clip_ids, pa.string())
    for _, table in parts(store, ["id", "seed", "status", "clip_id", "sha256"]) if clip_ids else ():
        if table is not None and {"clip_id", "sha256"} <= {*table.column_names}:
            table = table.filter(pc.and_(pc.equal(table["status"], "done"), pc.is_in(table["clip_id"], wanted)))
            found |= {clip_id: sha256 for clip_id, sha256 in values_of(table, "clip_id", "sha256") if sha256}
    return found


def retry_rows(store: Store, where: Mapping[str, str] | Filter | None = None) -> int:
    """Put failed rows back to pending; returns how many. Invalid rows stay: another try changes nothing of them.

    where: column -> value as text, all of which must hold, or a filter.  Raises BadFilter, which is a ValueError, for a
    column that the ledger does not have.
    Call it while no run is writing. Killed half-way, it has put some of the rows back; the same call does the rest.
    """
    if not isinstance(where, Filter):
        where = all_of(column_is(name, value) for name, value in (where or {}).items())
    known = [name for name in where.columns if name in COLUMNS.names or name in BESIDE or is_of_some(name)]
    ledger = read(store, ["id", "seed", "status", "error_type", *known])
    if not all(name in ledger.column_names and not pa.types.is_nested(ledger.schema.field(name).type)
               for name in where.columns):
        ledger = read(store)                            # the message names what there is
    mask = pc.and_(pc.equal(ledger["status"], "failed"),
                   pc.fill_null(pc.not_equal(ledger["error_type"], "invalid"), True))
    mask = pc.and_(mask, where.mask(ledger))
    chosen = set(keys_of(ledger.filter(mask)))
    take_out(store, chosen)
    return len(chosen)


def take_out(store: Store, chosen: Container[tuple[str, int | None]]) -> None:
    """Take failed rows out of the ledger, so that these keys are pending. What was said of them is kept under retried/,
    for the rows that come in their place (`earlier_errors`)."""
    if not chosen:
        return
    store.delete(SUCCESS)                               # there is something to do again
    failed = read(store, REMEMBERED)
    failed = failed.filter(pc.equal(failed["status"], "failed"))
    failed = failed.filter(pa.array([key in chosen for key in keys_of(failed)], pa.bool_()))
    if failed.num_rows:
        data = parquet_bytes(failed.select(list(REMEMBERED)))
        store.create(retried_key(hashlib.sha256(data).hexdigest()[:32]), data)
    for key, table in parts(store, None):               # the oldest first: a row that is left counts as before
        if table is None or "failed" not in table["status"].to_pylist():
            continue
        stays = [status != "failed" or of_row not in chosen
                 for of_row, status in zip(keys_of(table), table["status"].to_pylist(), strict=True)]
        if not any(stays):
            store.delete(key)
        elif not all(stays):
            store.put(key, parquet_bytes(table.filter(pa.array(stays))))


def remembered(store: Store) -> dict[tuple[str, int | None], list[str]]:
    """What was said of rows that were put back to pending, the oldest first."""
    found: dict[tuple[str, int | None], dict[str, None]] = {}
    nothing = dict.fromkeys(REMEMBERED)                 # a file from outside may lack columns
    rows = [nothing | row for _, table in parts(store, REMEMBERED, RETRIED) if table is not None
            for row in table.to_pylist()]
    for row in sorted(rows, key=lambda row: str(row["finished_at"])):
        when = f"{row['finished_at']:%Y-%m-%d %H:%M:%S} UTC" if row["finished_at"] else "at a time that is not known"
        attempts = f" after {row['attempts']} attempts" if (row["attempts"] or 1) > 1 else ""
        found.setdefault((row["id"], row["seed"]), {}).update(dict.fromkeys(
            [*(row["earlier_errors"] or ()), f"{when}{attempts}: {row['error_type']}: {row['error']}"]))
    return {key: list(said) for key, said in found.items()}


def forget_retried(store: Store) -> None:
    """Remove what is in the ledger by now; to be called when no row is pending."""
    keys = set(keys_of(read(store, ["id", "seed"])))
    keys |= {(name, None) for name, _ in keys}          # a row that was invalid had no seed
    for key, table in list(parts(store, ["id", "seed", "status"], RETRIED)):
        if table is not None and all(of_row in keys for of_row in keys_of(table)):
            store.delete(key)


def write_success(store: Store) -> dict[str, Any]:
    """_SUCCESS.json: counts and digest of a ledger that has a row for everything; returns what it says.

    It says how many have failed; where nothing at all was made there is no success to tell of, and it is not written.
    Nor is it where clips, maybe of another manifest, are to be made again.
    """
    ledger = read(store, ["id", "seed", "clip_id", "status", "sha256"], put_back=True)
    is_pending = pc.equal(ledger["status"], "pending")
    ledger = ledger.filter(pc.invert(is_pending))
    counts = counts_of(ledger["status"])
    said = {"rows": ledger.num_rows, "done": counts["done"], "failed": counts["failed"],
            "ledger_digest": digest(ledger), "finished_at": datetime.now(UTC).isoformat(timespec="seconds")}
    if said["done"] and not pc.any(is_pending).as_py():
        store.put(SUCCESS, json.dumps(said, indent=2).encode() + b"\n")
    return said


def digest(ledger: pa.Table) -> str:
    """SHA-256 over id, seed, clip_id, status and sha256 of each row, by id and seed: not over when and where it ran."""
    columns = ["id", "seed", "clip_id", "status", "sha256"]
    ordered = ledger.select(columns).sort_by([("id", "ascending"), ("seed", "ascending")])
    hasher = hashlib.sha256()
    for row in values_of(ordered, *columns):
        hasher.update(json.dumps(row).encode() + b"\n")
    return hasher.hexdigest()


def parts(store: Store, columns: Sequence[str] | None, folder: str = LEDGER, *,
          whole: bool = False) -> Iterator[tuple[str, pa.Table | None]]:
    """Every part and its rows, the oldest first; None for one that vanished since it was listed. whole: as of read."""
    keys = [info.key for info in store.list(f"{folder}/") if info.key.endswith(".parquet")]

    def part(key: str) -> pa.Table | None:
        try:
            table = read_part(store.get(key, at_most=MAX_PART_BYTES), None if whole else columns, COLUMNS)
            return table if columns is None else table.select(list(there(columns, table.column_names)))
        except NotFound:
            return None
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
            why = f"it is larger than any part: {error}" if isinstance(error, TooLarge) else str(error)
            raise StoreError(f"{store.uri_of(key)} cannot be read: {why or type(error).__name__}. Move it away and "
                             "render again: its clips are found and get new rows") from error

    rows = 0
    with ThreadPoolExecutor(PART_READERS) as pool:
        for start in range(0, len(keys), 4 * PART_READERS):     # not all of a large ledger at once
            block = keys[start: start + 4 * PART_READERS]
            for found in zip(block, pool.map(part, block), strict=True):
                rows += found[1].num_rows if found[1] is not None else 0
                if rows > MAX_ROWS_IN_ALL:
                    raise StoreError(f"{store.uri_of(folder)} has more than {MAX_ROWS_IN_ALL:,} rows, which no run "
                                     f"has. Move away the parts that are not this run's")
                yield found


def next_epoch(store: Store) -> int:
    """Raises StoreError where a part claims an epoch behind which no other has its place in order of name."""
    last = max((epoch_of(info.key) or 0 for info in store.list(f"{LEDGER}/")), default=0)
    if last >= LAST_EPOCH:
        raise StoreError(f"{store.uri}/{LEDGER}/{last}-... is named as no part of a ledger is: a run begins less "
                         "often. Move it away and render again")
    return last + 1


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table.combine_chunks(), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def keys_of(table: pa.Table) -> Iterator[tuple[str, int | None]]:
    return values_of(table, "id", "seed")


def values_of(table: pa.Table, *columns: str) -> Iterator[tuple[Any, ...]]:
    """These columns of each row, in Python's types; made for some rows at a time, since there may be millions."""
    for batch in table.select(list(columns)).to_batches(max_chunksize=OBJECTS_AT_A_TIME):
        yield from zip(*(batch[column].to_pylist() for column in columns), strict=True)


def counts_of(column: pa.ChunkedArray) -> Counter[Any]:
    """How often each value comes."""
    found = pc.value_counts(column)
    return Counter(dict(zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True)))
