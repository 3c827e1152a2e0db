"""What a person is told of a run before it begins and when it ends."""

import shlex
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from dailies.jobs.progress import duration_text, printable, say
from dailies.jobs.settings import RenderJob
from dailies.pipeline.run.bookkeeper import Bookkeeper
from dailies.pipeline.run.layout import CLIPS, REPORT
from dailies.pipeline.run.run import Run
from dailies.pipeline.wording import counted


def tell(notes: list[str]) -> None:
    for note in notes:
        say(printable(note), stream=sys.stderr)


def what_is_made(run: Run, *, has_out: bool = True) -> str:
    """Said before the work begins, which takes a while to show anything."""
    plan = run.plan
    images = f", {counted(plan.num_images, 'image')}" if plan.num_images else ""
    return (f"{counted(plan.manifest.table.num_rows, 'row')}{images}, {counted(plan.num_clips, 'clip')} with "
            f"{plan.card.name} in {plan.precision} on {run.device}"
            + (f", into {run.store.uri}" if has_out else ""))


def notes_of(run: Run) -> list[str]:
    """What will not be quite as asked, for a person."""
    plan, summary = run.plan, run.plan.summary()
    notes = [str(run.change)] if run.change else []
    notes += [*run.fallbacks, *run.room]
    if run.chosen_because:
        notes.append(f"{plan.precision} with {plan.attention} attention: {run.chosen_because}")
    if plan.attention == "sparse" and not plan.card.tuned_for_sparse:
        notes.append(f"{plan.card.name} was not tuned for sparse attention: each block of tokens sees the "
                     f"{plan.card.keep_ratio:.0%} of the others that agree with it best, "
                     "and nothing makes up for the rest")
    notes += [f"{counted(said['rows'], 'row')}: {said['note']}" for said in summary["roundings"]]
    if summary["more_roundings"]:
        notes.append(f"and {summary['more_roundings']:,} more kinds of rounding")
    notes += [f"{counted(said['rows'], 'row')}: {said['note']}" for said in summary["notes"]]
    if summary["duplicates"]:
        ask = "asks" if summary["duplicates"] == 1 else "ask"
        notes.append(f"{counted(summary['duplicates'], 'row')} {ask} for a clip that another row asks for too: "
                     "rendered once")
    if summary["invalid_rows"]:
        notes.append(f"{counted(summary['invalid_rows'], 'invalid row')} set aside as failed:")
        notes += [f"  {error}" for error in plan.errors.first()]
        notes += [f"  {count:,} more: {rule}" for count, rule in plan.errors.rest()]
    notes += summary["manifest_notes"]
    if carried := [name.removeprefix("user.") for name in summary["user_columns"]]:
        notes.append(f"carried along to the ledger, and nothing else done with {'them' if len(carried) > 1 else 'it'}: "
                     + ", ".join(carried[:20]) + (f" and {len(carried) - 20:,} more" if len(carried) > 20 else ""))
    return notes


def limits_of(job: RenderJob, run: Run, deadline: datetime | None) -> list[str]:
    """What ends this command early, for a person."""
    hours, notes = job.gpu_hours(), []
    if deadline is not None:
        notes.append(f"No clip is begun that would not be done by {deadline:%Y-%m-%d %H:%M}")
    if hours is not None:
        notes.append(f"No clip is begun that would take more than {hours:,.2f} GPU hours in all" +
                     ("" if job.max_cost is None or job.price is None else f", {job.price * hours:,.2f} USD") +
                     ("; but a run on CPUs holds no GPU, so this does not limit it" if run.device == "cpu" else ""))
    return notes


def what_was_made(said: Mapping[str, Any], gpu_hours: float) -> str:
    """Of render's answer."""
    return (f"{said['out']}: {counted(said['done'], 'row')} done, {said['failed']:,} failed, {said['pending']:,} "
            f"pending; {counted(said['rendered'], 'clip')} rendered in {duration_text(said['seconds'])}"
            + (f", {said['adopted']:,} found published" if said["adopted"] else "")
            + (f", {gpu_hours:,.2f} GPU hours held" if gpu_hours else "")
            + (f", {said['cost']:,.2f} USD" if "cost" in said else ""))


def next_steps(job: RenderJob, run: Run, bookkeeper: Bookkeeper, *, interrupted: bool,
               out_of_budget: bool) -> Iterator[str]:
    """Where to look, and what to type next."""
    store, uri = run.store, shlex.quote(job.out)
    if example := next((info for info in store.list(f"{CLIPS}/") if info.key.endswith(".mp4")), None):
        yield f"The clips are in {store.uri_of(CLIPS)}/, as {store.uri_of(example.key)}"
    if bookkeeper.ledger.counts["failed"] > bookkeeper.num_invalid:
        yield f"Try the failed rows again with: dailies retry {uri}, then the same command"
    if bookkeeper.num_invalid:
        yield (f"{counted(bookkeeper.num_invalid, 'row')} of the manifest could not be used; mend what `dailies plan` "
               "says of them, and the same command makes those alone")
    if interrupted:
        yield "Interrupted; the same command continues."
    elif out_of_budget:
        later = ", with a later --until" if job.until_is_one_moment else ""
        yield ("Stopped: no further clip would be done within the deadline or budget. The same command "
               f"continues{later}.")
    elif bookkeeper.left_by_limit and job.limit:
        following = min(bookkeeper.left_by_limit, job.limit)
        yield (f"Stopped at --limit {job.limit}; the same command makes the next {following:,}"
               + (f" of {bookkeeper.left_by_limit:,}." if bookkeeper.left_by_limit > following else "."))
    page = f"{REPORT}/index.html"
    is_written = job.report and any(info.key == page for info in store.list(page))
    yield ((f"See them all in {store.uri_of(page)}" if is_written else f"See them all with: dailies report {uri}")
           + f"; check every clip with: dailies verify {uri}")
