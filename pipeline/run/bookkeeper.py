"""What of a plan is done, and the ledger that says so: what is there is passed over, what is made is recorded."""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from dailies.actors.gate import REJECTED
from dailies.actors.messages import Clip, Failure, Request
from dailies.model.family import NonFiniteFrames, NonFiniteLatent, NonFiniteSound
from dailies.pipeline.plan import RESEEDS, ROWS_AT_A_TIME, Except, Plan, PlannedRow, with_another_seed
from dailies.pipeline.run.adoption import Spoilt, adopt
from dailies.pipeline.run.layout import CLIPS, SUCCESS, clip_id_in
from dailies.pipeline.run.lease import Lease
from dailies.pipeline.run.ledger import Ledger, is_one_of, keys_of, recorded_hashes, without_keys
from dailies.pipeline.run.ledger_row import invalid_row, row_of
from dailies.pipeline.run.reuse import Brought, bring_clips
from dailies.pipeline.run.takes import Take, takes_in
from dailies.pipeline.stages import Outcome
from dailies.pipeline.store import Store
from dailies.pipeline.wording import counted

SHOWN_FAILURES = 20
MANY_CLIPS = 100                                        # to read and decode take longer than a person waits in silence
REJECTIONS = {REJECTED, *(error.__name__ for error in (NonFiniteLatent, NonFiniteFrames, NonFiniteSound))}


class Bookkeeper:
    """What of the plan is done, and the ledger that says so."""

    def __init__(self, store: Store, plan: Plan, *, limit: int | None = None, lease: Lease | None = None,
                 chosen_because: str | None = None, changed: Container[tuple[str, int | None]] = (),
                 reuse: Sequence[Store] = (), tell: Callable[[str], None] = lambda text: None):
        """limit: the most clips to make.  lease: needed to write.  chosen_because: of precision and attention, for the
        ledger.  changed: rows (id, seed) that are to be made again.  reuse: other run folders to look for
        clips in.  tell: what a person should know.  Raises StoreError.
        """
        self.store, self.plan, self.limit, self.lease, self.tell = store, plan, limit, lease, tell
        self.chosen_because, self.reuse = chosen_because, reuse
        self.ledger = Ledger.open(self.store, self.plan.manifest.user.schema)
        keys = self.plan.keys()
        self.read_takes(keys, changed)
        self.replaced = self.ledger.set_aside(changed) if changed else {}
        self.ledger.only(keys, [row.id for row in self.plan.invalid_rows()] if self.plan.num_invalid_rows else [])
        self.files = files_of_clips(self.store)         # listed after the ledger was read: a row follows its clip
        self.gone = self.ledger.without_a_file(self.files)
        self.ledger.forget(self.gone)
        self.spoilt: dict[str, Spoilt] = {}             # files under clips' names that are not those clips
        left = self.without_takes(self.ledger.pending(keys))
        self.num_rows = keys.num_rows + self.plan.num_invalid_rows
        known = {name for name, seed in keys_of(self.ledger.keys) if seed is None}
        self.new_invalid = [row for row in self.plan.invalid_rows() if row.id not in known]
        self.num_invalid = self.plan.num_invalid_rows - len(self.new_invalid)       # that the ledger has
        self.left_by_limit = 0                          # clips to make, beyond what this command was to make
        self.planned_clips = set(left["clip_id"].to_pylist())
        self.open_clips = self.planned_clips | self.takes.keys() if self.takes else self.planned_clips
        self.written: set[tuple[str, int | None]] = set()
        if left.num_rows < keys.num_rows:
            # rows that are written although another row of their clip is not: they must not be written again
            written = keys.join(left.select(["id", "seed"]), ["id", "seed"], join_type="left anti")
            self.written.update(key for key, clip_id in zip(keys_of(written), written["clip_id"].to_pylist(),
                                                            strict=True) if clip_id in self.planned_clips)
        self.remade: dict[str, tuple[list[PlannedRow], int]] = {}      # clips with other seeds: their rows, which try
        self.again: list[Request] = []                  # of them, those that nobody works on yet
        self.num_adopted = self.num_rendered = self.num_reused = 0
        self.failures: list[dict[str, Any]] = []

    def read_takes(self, keys: Any, changed: Container[tuple[str, int | None]]) -> None:
        """What the ledger itself asks for.  keys: of the plan, as `Plan.keys` gives them."""
        self.takes: dict[str, list[Take]] = {}          # by clip; those that have no row yet
        self.given_up: list[Take] = []                  # of rows that ask for something else by now
        self.not_made: list[str] = []
        # those that are to be made: rows of the plan (own), of its rows (inside), others; what came of them
        self.take_counts: Counter[str] = Counter()
        for take in takes_in(self.ledger, self.plan):
            if isinstance(take, str):
                self.not_made.append(take)
            elif take.slot in changed:
                self.given_up.append(take)
            else:
                self.takes.setdefault(take.request.clip_id, []).append(take)
        takes = [take for takes in self.takes.values() for take in takes]
        if takes:
            planned = set(keys_of(keys.filter(is_one_of(keys["id"], {take.row["id"] for take in takes}))))
            self.take_counts.update("own" if take.key in planned else "inside" if take.slot in planned else "outside"
                                    for take in takes)
        self.take_keys = {take.key for take in takes}

    def without_takes(self, left: Any) -> Any:
        """Of the plan's rows those that no other take stands for."""
        return without_keys(left, self.take_keys) if self.take_keys else left

    def __enter__(self) -> "Bookkeeper":
        return self

    def __exit__(self, *_: object) -> None:
        self.check_lease()                              # another driver writes the rows of what it finds published
        self.ledger.close()

    def tick(self) -> None:
        """To be called now and then.  Raises LeaseError."""
        self.check_lease()
        self.ledger.tick()

    def check_lease(self) -> None:
        """Raises LeaseError, and RuntimeError for who was to read alone."""
        if self.lease is None:
            raise RuntimeError("who writes a ledger needs the run's lease; open the run with Run.open")
        self.lease.check()

    def wanted(self) -> tuple[set[str], set[str]]:
        """The clips that have to be made, and those that are published but not in the ledger."""
        published = self.open_clips.intersection(self.files)
        return self.open_clips - published, published

    def todo(self) -> tuple[Iterator[Request], int]:
        """The requests to render, in order, and how many. Invalid rows and published clips get their rows first."""
        if self.open_clips or self.new_invalid:
            self.store.delete(SUCCESS)
        self.record_invalid()
        self.drop_given_up()
        brought = self.bring()
        wanted, published = self.wanted()
        self.adopt(self.requests(published), published, brought)
        wanted |= published & self.spoilt.keys()
        num_clips = min(len(wanted), self.limit or len(wanted))
        self.left_by_limit = len(wanted) - num_clips
        return islice(self.requests(wanted), num_clips), num_clips

    def requests(self, clips: set[str]) -> Iterator[Request]:
        """Those of these clips: other takes first, which a person waits for, then those of the plan in its order."""
        takes = self.requests_of_takes(clips)
        yield from takes
        yield from self.plan.requests(skip=Except((clips & self.planned_clips) - {take.clip_id for take in takes}))

    def requests_of_takes(self, clips: set[str]) -> list[Request]:
        """Those of these clips that are other takes of rows, for which the ledger itself asks."""
        return [takes[0].request for clip_id, takes in self.takes.items() if clip_id in clips]

    def drop_given_up(self) -> None:
        """Rows that have changed are made as they ask now, and not once more as they did."""
        for take in self.given_up:
            self.check_lease()
            self.ledger.append([dict(take.row) | {"status": "dropped", "finished_at": datetime.now(UTC)}],
                               take.own if take.own.num_columns else None, own=True, counts=False,
                               statuses=("dropped",))
        if self.given_up:
            self.ledger.flush()                         # before the rows that count
        self.given_up = []

    def rounds(self) -> Iterator[tuple[Iterable[Request], int]]:
        """The requests to render and how many, in order; then those for clips that were rejected and are made again
        with another seed, as their rows ask. What comes of a round is to be recorded before the next one is asked for.
        """
        requests: Iterable[Request]
        requests, num_clips = self.todo()
        while num_clips:
            yield requests, num_clips
            again, self.again = self.again, []
            requests, num_clips = again, len(again)

    @property
    def notes(self) -> list[str]:
        """What of this run's clips is not in the folder as the ledger says, for a person; known after `todo`."""
        notes = [f"clip {clip_id[:12]}: what lies under its name is not it: {found.why}. It is made again, and "
                 "replaced then" for clip_id, found in islice(self.spoilt.items(), SHOWN_FAILURES)]
        if more := len(self.spoilt) - len(notes):
            notes.append(f"and {counted(more, 'other file')} under clips/ that {'is' if more == 1 else 'are'} not the "
                         "clip of that name")
        if gone := len(self.gone - self.spoilt.keys() - self.files.keys()):
            notes.append(f"{counted(gone, 'clip')} that the ledger calls done {'is' if gone == 1 else 'are'} not in "
                         "the run folder any more: made again")
        notes += self.not_made[:SHOWN_FAILURES]
        return notes

    def record_invalid(self) -> None:
        for start in range(0, len(self.new_invalid), ROWS_AT_A_TIME):
            rows = self.new_invalid[start: start + ROWS_AT_A_TIME]
            self.ledger.append([invalid_row(row.id, row.prompt, row.error) for row in rows],
                               self.plan.user_columns([row.row for row in rows]))
        self.num_invalid += len(self.new_invalid)
        self.new_invalid = []

    def bring(self) -> dict[str, Brought]:
        """Put clips of other runs under their names here, where they are still to be judged; which they are."""
        brought: dict[str, Brought] = {}
        for other in self.reuse:
            wanted = self.wanted()[0]
            for found in bring_clips(self.store, other, self.requests, wanted) if wanted else ():
                self.check_lease()
                brought[found.clip_id] = found
                self.files[found.clip_id] = found.num_bytes
        return brought

    def adopt(self, requests: Iterable[Request], published: set[str], brought: Mapping[str, Brought]) -> None:
        """Write the rows of clips that were published by a run which was killed before it could, or by another run."""
        if len(published) >= MANY_CLIPS:
            self.tell(f"reading {counted(len(published), 'clip')} that are published and have no row")
        hashes = {clip_id: each.sha256 for clip_id, each in brought.items() if each.sha256}
        for found in adopt(self.store, requests, hashes | recorded_hashes(self.store, published)):
            if isinstance(found, Spoilt):
                self.spoilt[found.request.clip_id] = found
                continue
            if origin := brought.get(found.request.clip_id):
                found = replace(found, notes=(f"made by another run, {origin.said}; read and decoded",))
                self.num_reused += 1
            self.append(self.rows_to_write(found.request.clip_id), found, None)
            self.append_takes(found, None)
            self.num_adopted += 1

    def record(self, outcome: Outcome) -> None:
        value = outcome.value
        rows = self.rows_to_write(value.request.clip_id)
        clip_id = value.request.clip_id
        is_again = clip_id in self.gone or clip_id in self.ledger.put_back
        if is_again and isinstance(value, Clip) and not value.notes:
            value = replace(value, notes=(f"made again: its file was {self.ledger.put_back.get(clip_id) or 'gone'}",))
        if isinstance(value, Failure) and value.error_type in REJECTIONS:
            rows = self.make_again(value.request, rows)
        self.append(rows, value, outcome)
        taken = self.append_takes(value, outcome)
        if isinstance(value, Clip):
            self.num_rendered += 1
        elif len(self.failures) < SHOWN_FAILURES:
            self.failures += [{"id": row.id, "seed": row.seed, "stage": value.stage, "error_type": value.error_type,
                               "error": value.error} for row in [*rows, *taken]]

    def make_again(self, rejected: Request, rows: list[PlannedRow]) -> list[PlannedRow]:
        """Rows that ask for another seed wait for that clip, at most RESEEDS times. Returns those that have failed."""
        tries = self.remade[rejected.clip_id][1] if rejected.clip_id in self.remade else 0
        waiting = [row for row in rows if row.reseed and tries < RESEEDS]
        if waiting:
            request = with_another_seed(rejected)
            self.remade[request.clip_id] = waiting, tries + 1
            self.again.append(request)
        return [row for row in rows if row not in waiting]

    def rows_to_write(self, clip_id: str) -> list[PlannedRow]:
        """The rows of a clip that have still to be written."""
        if clip_id in self.remade:
            return self.remade[clip_id][0]
        if clip_id not in self.planned_clips:
            return []                                   # a take's alone
        return [row for row in self.plan.planned_rows(clip_id) if (row.id, row.seed) not in self.written]

    def append(self, rows: list[PlannedRow], value: Any, outcome: Outcome | None) -> None:
        self.check_lease()
        self.ledger.append([row_of(row.id, value, outcome, seed=row.seed) | self.said_of(row) for row in rows],
                           self.plan.user_columns([row.row for row in rows]))

    def said_of(self, row: PlannedRow) -> dict[str, Any]:
        said = {"chosen_because": self.chosen_because, "sample": row.sample, "samples": row.samples, "keep": row.keep,
                "keep_by": row.keep_by, "replaces": self.replaced.get((row.id, row.seed))}
        return {name: value for name, value in said.items() if value is not None}

    def append_takes(self, value: Any, outcome: Outcome | None) -> list[PlannedRow]:
        """Write the rows of other takes that this clip is; returns them."""
        taken = self.takes.pop(value.request.clip_id, [])
        for take in taken:
            self.check_lease()
            take.append(self.ledger, value, outcome)
            self.take_counts["done" if isinstance(value, Clip) else "failed"] += 1
        return [PlannedRow(row=-1, id=take.row["id"], seed=take.row["seed"], clip_id=value.request.clip_id)
                for take in taken]

    def counts(self) -> dict[str, int]:
        """Of this manifest's rows, and of those that the ledger itself asks for; a run folder may have others besides.
        """
        takes, dropped = self.take_counts, self.ledger.counts["dropped"]
        done = self.ledger.counts["done"] - takes["inside"] + takes["done"]
        failed = self.ledger.counts["failed"] + takes["failed"]
        rows = self.num_rows + takes["outside"] - dropped
        return {"rows": rows, "done": done, "failed": failed, "pending": rows - done - failed}


def files_of_clips(store: Store) -> dict[str, int]:
    """clip_id -> bytes, of every file that lies where a clip does."""
    return {clip_id: info.num_bytes for info in store.list(f"{CLIPS}/") if (clip_id := clip_id_in(info.key))}
