"""`dailies plan`: what `render` would do, what it takes, and what it lacks. Nothing is rendered, written or fetched."""

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dailies.actors.messages import Request
from dailies.jobs.answer import answer
from dailies.jobs.machines import machines_of
from dailies.jobs.notes import limits_of, notes_of, what_is_made
from dailies.jobs.progress import duration_text, printable, say
from dailies.jobs.render import run_of, stages_for
from dailies.jobs.runs import bucket_text
from dailies.jobs.settings import RenderJob
from dailies.model.private import cache_folder
from dailies.model.weights import hub_bytes, hub_folder
from dailies.pipeline.run.ledger import read
from dailies.pipeline.run.run import Run
from dailies.pipeline.run.run_json import BUCKET_SHAPE
from dailies.pipeline.scheduler.forecast import Forecast, forecast, measured_costs, rows_by_work, work_of
from dailies.pipeline.scheduler.placement import InsufficientCapacity
from dailies.pipeline.store import StoreError, open_store
from dailies.pipeline.wording import counted

_SECONDS = ("encode_s", "sample_s", "decode_s", "publish_s", "gpu_s")


def show_plan(job: RenderJob, *, json: bool) -> int:
    """Print what `render` would do; writes nothing.  job: without `out`, a run that has not begun."""
    if job.out:
        return show(job, json=json)
    with tempfile.TemporaryDirectory(prefix="dailies-plan-") as nowhere:
        return show(job.model_copy(update={"out": nowhere}), json=json, has_out=False)


def show(job: RenderJob, *, json: bool, has_out: bool = True) -> int:
    run = run_of(job, weights_are_needed=False)
    lacks = None if run.weights else what_is_missing(job, run)
    if run.weights:
        run.check_weights()
    bookkeeper = run.bookkeeper(limit=job.limit)
    wanted, published = bookkeeper.wanted()
    # what was put back, or has another size than its row says, is most likely not what it should be: render reads it
    doubtful = published & (bookkeeper.gone | bookkeeper.ledger.put_back.keys())
    wanted |= doubtful
    published -= doubtful
    num_clips = min(len(wanted), job.limit or len(wanted))
    left = {**bookkeeper.counts(), "to_make": num_clips, "left_by_limit": len(wanted) - num_clips,
            "found_published": len(published)}
    found = run.compared()
    left |= {"new": found.new, "changed": len(found.changed), "gone": found.gone}
    foretold, no_room = None, ""
    try:
        foretold = foretell(job, run, wanted, bookkeeper.requests_of_takes(wanted))
    except InsufficientCapacity as error:
        no_room = str(error)
    summary, deadline = run.plan.summary(), job.deadline()
    said = summary | {
        "out": run.store.uri if has_out else None, "device": run.device, **left, "rows": summary["rows"],
        "limit": job.limit, "until": deadline and deadline.isoformat(timespec="seconds"),
        "max_gpu_hours": job.gpu_hours(), "price": job.price, "weights": lacks, "forecast": foretold,
        "notes": notes_of(run), "no_room": no_room or None, "exit_code": 0}

    def tell_plan() -> None:
        print_plan(run, summary, left, has_out=has_out)
        if lacks:
            say(printable(lacks["said"]))
        for note in limits_of(job, run, deadline):
            say(printable(note))
        print_forecast(job, left, foretold, no_room)

    return answer(said, tell_plan, json=json)


def print_plan(run: Run, summary: dict[str, Any], left: dict[str, int], *, has_out: bool) -> None:
    say(printable(f"{summary['manifest']}: {what_is_made(run, has_out=has_out)}"))
    say("for rows that do not say: " + ", ".join(f"{name} {value}" for name, value in summary["settings"].items()
                                                 if value is not None and value != ""))
    for bucket in summary["buckets"]:
        say(f"{bucket['clips']:>9,} x {bucket_text(bucket)}")
    if summary["more_buckets"]:
        say(f"          and {summary['more_buckets']:,} more buckets")
    for note in notes_of(run):
        say(printable(note))
    if run.has_begun:
        say(f"of these {counted(left['done'], 'row')} done, {left['failed']:,} failed, {left['pending']:,} pending; "
            f"{left['new']:,} new, {left['changed']:,} changed, {left['gone']:,} that are there gone"
              + (f"; {counted(left['found_published'], 'clip')} already published" if left["found_published"] else ""))


def print_forecast(job: RenderJob, left: dict[str, int], foretold: dict[str, Any] | None, no_room: str) -> None:
    beyond = f", and {left['left_by_limit']:,} after it (--limit {job.limit})" if left["left_by_limit"] else ""
    if no_room:
        say(printable(f"not to be made here: {no_room}"))
    elif not left["to_make"]:
        say("nothing is left to make")
    elif foretold is None:
        say(f"{counted(left['to_make'], 'clip')} to make{beyond}; how long it will take is known when some of its "
            "clips are made: dailies render ... --limit 10")
    else:
        held = f", {foretold['gpu_hours']:,.2f} GPU hours on {counted(foretold['gpus'], 'GPU')}"
        held = held if foretold["gpus"] else ""
        cost = f", {foretold['cost']:,.2f} USD" if "cost" in foretold else ""
        say(f"{counted(foretold['clips'], 'clip')} to make: {duration_text(foretold['seconds'])}{held}{cost}, "
              f"done at {datetime.fromisoformat(foretold['done_at']):%Y-%m-%d %H:%M} if begun now{beyond}; judged by "
              f"{counted(foretold['measured_clips'], 'clip')} of this run, without what processes take to start")
        if foretold["fits"] < foretold["clips"]:
            say(f"about {foretold['fits']:,} of them within the deadline and budget; the same command makes the rest "
                  "another time")


def what_is_missing(job: RenderJob, run: Run) -> dict[str, Any]:
    """Of weights that are not here: where they are, how many bytes they take, and whether there is room for them."""
    card, weights = run.plan.card, job.weights
    if weights is None and not card.repo_id and not card.sources:
        return {"from": None, "num_bytes": None,
                "said": f"weights: none come with {card.name}; name their folder with --weights"}
    if weights is None and card.repo_id is None:
        return {"from": None, "num_bytes": None,
                "said": f"weights: not here, and not to be fetched as they are: {card.fetched_by_hand()}"}
    if weights is None:
        place, target, num_bytes, exact = card.repo_id, hub_folder(), hub_bytes(card), True
        if num_bytes is None and card.least_gb:
            num_bytes, exact = int(card.least_gb * 1e9), False
    else:
        place, target, exact = weights, cache_folder(), True
        try:
            num_bytes = sum(info.num_bytes for info in open_store(weights).list())
        except StoreError as error:
            return {"from": weights, "num_bytes": None, "said": f"weights: {weights} cannot be looked at: {error}"}
    size = "of unknown size" if num_bytes is None else f"{num_bytes / 1e9:,.1f} GB"
    size += "" if exact else " at the least, or twice that where they are published in fp32"
    free = free_bytes(target)
    short = num_bytes is not None and free is not None and free < num_bytes
    return {"from": place, "num_bytes": num_bytes, "exact": exact,
            "said": f"weights: not here; render fetches them from {place} first ({size}) into {target}"
            + ("" if free is None else f", where {free / 1e9:,.1f} GB are free")
            + (", which is too little" if short else "")
            + ". Until then clips have no names, and their files are not checked"}


def free_bytes(folder: Path) -> int | None:
    """On the disk where the folder is, or would be made."""
    for place in (folder, *folder.parents):
        if place.is_dir():
            return shutil.disk_usage(place).free
    return None


def foretell(job: RenderJob, run: Run, wanted: set[str], takes: Sequence[Request]) -> dict[str, Any] | None:
    """What these clips will take here, by those that are made; None where none is.  Raises InsufficientCapacity.

    Only the first --limit of them, other takes before the plan's; `fits`: those of them that are made within the
    deadline and budget.
    """
    if not run.has_begun:
        return None
    table = read(run.store, ["clip_id", "status", *BUCKET_SHAPE, *_SECONDS])
    done = {row["clip_id"]: row for row in table.to_pylist() if row["status"] == "done"}
    measured = rows_by_work(done.values())
    if not measured:
        return None
    stages, machines, found = stages_for(job, run), machines_of(job), []
    encoded = run.plan.num_prompts / max(1, run.plan.num_clips)
    left: Counter[float] = Counter()                    # clips by work: buckets of equal work cost the same
    of_work: dict[float, dict[str, Any]] = {}
    takes = takes[:job.limit]
    of_takes = [{name: take.identity().get(name) for name in BUCKET_SHAPE} | {"clips": 1} for take in takes]
    limit = job.limit and job.limit - len(takes)
    of_plan = [] if limit == 0 and job.limit else run.plan.buckets(only=wanted, limit=limit)
    for bucket in [*of_takes, *of_plan]:
        left[work_of(bucket)] += bucket["clips"]
        of_work.setdefault(work_of(bucket), bucket)
    for work, clips in left.items():
        costs = measured_costs(stages, measured, of_work[work])
        found.append((clips, forecast(stages, machines, costs, clips, encoded=math.ceil(encoded * clips))))
    return said_of(found, sum(map(len, measured.values())), job)


def said_of(found: list[tuple[int, Forecast]], measured: int, job: RenderJob) -> dict[str, Any]:
    seconds, gpu_hours = (sum(getattr(each, name) for _, each in found) for name in ("seconds", "gpu_hours"))
    clips, now = sum(clips for clips, _ in found), datetime.now(UTC).astimezone()
    share = 1.0                                         # of the work that the limits leave room for
    if (deadline := job.deadline()) is not None and seconds:
        share = min(share, max(0.0, (deadline - now).total_seconds()) / seconds)
    if (most := job.gpu_hours()) is not None and gpu_hours:
        share = min(share, most / gpu_hours)
    return {"clips": clips, "seconds": round(seconds, 1), "gpu_hours": round(gpu_hours, 4),
            "fits": math.floor(share * clips), "gpus": round(3600 * gpu_hours / seconds) if seconds else 0,
            "measured_clips": measured,
            "done_at": (now + timedelta(seconds=seconds)).isoformat(timespec="seconds"),
            **({} if job.price is None else {"cost": round(job.price * gpu_hours, 2)})}
