"""`dailies report`: the morning report, written into the run folder, now or every few minutes of a run."""

import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Self

from dailies.jobs.answer import answer
from dailies.jobs.progress import duration_text, say
from dailies.jobs.report_server import serve_report
from dailies.jobs.runs import open_run
from dailies.jobs.usage import UsageError, checked_place, seconds_meant
from dailies.pipeline.report.writer import NotThere, Source, Written, write_report
from dailies.pipeline.run import ledger
from dailies.pipeline.run.layout import POSTERS, REPORT, poster_id_in
from dailies.pipeline.run.run_json import read_run
from dailies.pipeline.store import Store, StoreError, open_store
from dailies.pipeline.wording import counted

LONGEST_LINK_S = 7 * 24 * 3600          # of a signed link, by the protocol
HIGHEST_PRICE = 1e6


def report(uri: str, *, beside: Sequence[str] = (), to: str | None = None, presign: str | None = None,
           price: float | None = None, posters: bool = True, serve: bool = False, port: int | None = None,
           json: bool) -> int:
    """Write the report of a run folder, whatever state it is in, or serve it until somebody ends it.

    beside: other runs, whose clips stand beside those of the same prompt.  to: a folder for the report in place of the
    run's own report/.  presign: how long links to the clips work, as 12h.  posters: make those that are missing.
    port: of the page that is served; None: one that is free.  Raises UsageError, StoreError.
    """
    if serve and (to is not None or presign is not None):
        raise UsageError("--serve shows the report itself, and brings the clips; --to and --presign are of a report "
                         "that lies somewhere")
    if port is not None and not serve:
        raise UsageError("--port is of --serve")
    if price is not None and not 0 < price <= HIGHEST_PRICE:
        raise UsageError(f"--price must be USD per GPU hour, more than 0 and at most {HIGHEST_PRICE:,.0f}; got {price}")
    presign_s = None if presign is None else seconds_meant("--presign", presign)
    if presign_s is not None and presign_s > LONGEST_LINK_S:
        raise UsageError(f"--presign {presign}: a signed link lasts 7 days at most")
    sources = [Source(store=store, run=run) for store, run in map(open_run, (uri, *beside))]
    target = open_store(checked_place("--to", to)) if to is not None else None
    began = time.monotonic()
    made = sum(complete_posters(source.store, quiet=json) for source in sources if posters)
    if serve:
        return serve_report(sources, price=price, port=port, json=json)
    try:
        written = write_report(sources, to=target, price=price, presign_s=presign_s)
    except NotThere as error:
        raise UsageError(str(error)) from None
    place = target.uri_of("index.html") if target else sources[0].store.uri_of(f"{REPORT}/index.html")
    said: dict[str, Any] = {
        "exit_code": 0, "out": sources[0].store.uri, "report": place, "rows": written.made.rows,
        **{name: written.made.figures[name] for name in ("done", "failed", "pending", "clips", "cost", "unrecorded")},
        "posters_made": made, "without_poster": written.made.without_poster,
        "files": written.files, "new_files": written.new_files,
        "bytes": written.num_bytes, "first_bytes": written.first_bytes, "seconds": round(time.monotonic() - began, 3)}
    return answer(said, lambda: tell_report(said), json=json)


def complete_posters(store: Store, *, quiet: bool) -> int:
    """Make the posters that are missing; returns how many. Where nothing may be written the report does without."""
    there = {poster_id_in(info.key) for info in store.list(f"{POSTERS}/")}
    missing = ledger.done_clips(store, but=there)
    if not missing.num_rows:
        return 0
    from dailies.jobs.posters import make_posters
    try:
        return make_posters(store, missing, quiet=quiet)
    except StoreError as error:
        say(f"Posters are missing and cannot be made: {error}", stream=sys.stderr)
        return 0


def tell_report(said: dict[str, Any]) -> None:
    say(f"{said['report']}: {said['done']:,} done, {said['failed']:,} failed, {said['pending']:,} pending; "
        f"{said['bytes'] / 1e6:.1f} MB beside posters, written in {duration_text(said['seconds'])}")
    if said["posters_made"]:
        say(f"{counted(said['posters_made'], 'poster')} made of clips that had none")
    if said["without_poster"]:
        say(f"{counted(said['without_poster'], 'clip')} without a poster; dailies verify {said['out']} says what is "
            "wrong with a clip")
    if said["unrecorded"]:
        say(f"{counted(said['unrecorded'], 'clip')} published and not in the ledger yet; the next render records what "
            "it plans")
    if "://" not in said["report"]:
        say("Open it in a browser as it lies there")


class Reports:
    """The report of a run that goes on, written again and again until the block ends, and once more then.

    A thread writes it. What goes wrong is told and costs the run nothing: the next one may succeed.
    """

    def __init__(self, store: Store, every_s: float | None, tell: Any, *, price: float | None = None):
        """every_s: None for none at all.  tell: a sentence, for a person.  price: USD per GPU hour."""
        self.store, self.every_s, self.tell, self.price = store, every_s, tell, price
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.go_on, daemon=True)

    def __enter__(self) -> Self:
        if self.every_s is not None:
            self.thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.every_s is not None:
            self.over.set()
            self.thread.join()
            if kind is None:                            # else the run has met trouble, which is to be told now
                self.last()

    def last(self) -> None:
        """The report as the run is left, if one was asked for."""
        if self.every_s is not None:
            self.write()

    def go_on(self) -> None:
        while not self.over.wait(self.every_s):
            self.write()

    def write(self) -> Written | None:
        try:
            run = read_run(self.store)
            return None if run is None else write_report([Source(store=self.store, run=run)], price=self.price)
        except Exception as error:
            self.tell(f"the report was not written this time: {error}")
            return None
