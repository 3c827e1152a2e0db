"""What can be asked of a run folder from any machine, and of the catalogue: status, retry, models."""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from dailies.jobs.answer import answer
from dailies.jobs.progress import duration_text, printable, say
from dailies.jobs.usage import UsageError, card_named, checked_place
from dailies.model.card import ModelCard
from dailies.model.catalog import CATALOG
from dailies.model.files import CheckpointError
from dailies.model.private import at_home
from dailies.model.settings import DEFAULTED, SAMPLING, sampling_of
from dailies.model.weights import locate, missing_files, weights_files
from dailies.pipeline.run import ledger
from dailies.pipeline.run.layout import RUN, SUCCESS
from dailies.pipeline.run.lease import Lease
from dailies.pipeline.run.ledger_row import there
from dailies.pipeline.run.pace import WAIT_AND_WORK, pace
from dailies.pipeline.run.run_json import BUCKET_SHAPE, OtherRun, check_counts, has, known_manifest, read_run
from dailies.pipeline.run.where import BadFilter, Filter, all_of, column_is
from dailies.pipeline.store import Store, StoreError, open_store
from dailies.pipeline.wording import counted

STALE = timedelta(minutes=15)                           # without a row for so long, nobody promises an ETA


def open_run(uri: str) -> tuple[Store, dict[str, Any]]:
    """The run folder and its run.json.  Raises UsageError where there is none; StoreError."""
    store = open_store(checked_place("the run folder", uri))
    try:
        run = read_run(store)
    except OtherRun:
        raise StoreError(f"{store.uri_of(RUN)} is damaged, or not one that dailies wrote") from None
    if run is None:
        raise UsageError(f"{store.uri} is no run folder: it has no run.json. A run begins with: "
                         f"dailies render MANIFEST --out {uri}")
    check_counts(store, run)
    return store, run


def status(uri: str, *, json: bool) -> int:
    """Print how far a run is; from the folder alone."""
    store, run = open_run(uri)
    said = {"out": store.uri, "model": run["identity"].get("model")} | progress_of(store, known_manifest(store, run))
    return answer(said, lambda: print_status(said), json=json)


def print_status(said: dict[str, Any]) -> None:
    say(f"{said['out']}: {said['done']:,} of {counted(said['rows'], 'row')} done, {said['failed']:,} failed, "
        f"{said['pending']:,} pending" + ("; finished" if said["finished"] else ""))
    pace_said = [f"{said['clips_per_hour']:,.1f} clips per hour"] if said["clips_per_hour"] is not None else []
    pace_said += [f"ETA {duration_text(said['eta_s'])}"] if said["eta_s"] is not None else []
    pace_said += [f"last row {duration_text(said['last_row_s_ago'])} ago"] if said["last_row_s_ago"] is not None else []
    if pace_said:
        say(", ".join(pace_said))
    for bucket in said["buckets"]:
        counts = f"{bucket['done']:>7,} done {bucket['failed']:>5,} failed {bucket['pending']:>7,} pending  "
        say(counts + bucket["bucket"], indent=len(counts))
    if said["more_buckets"]:
        say(f"        and {said['more_buckets']:,} more buckets")
    if said["takes"]:
        say(f"  {counted(said['takes'], 'other take')} to be made; what it replaces stays until then"
            if said["takes"] == 1 else
            f"  {said['takes']:,} other takes to be made; what they replace stays until then")
    if said["dropped"]:
        say(f"  {counted(said['dropped'], 'row')} dropped")
    for error_type, count in said["failed_by_type"].items():
        say(f"  {count:,} failed with {printable(error_type)}")


def progress_of(store: Store, run: dict[str, Any]) -> dict[str, Any]:
    """Rows done, failed and pending, in all and clips by bucket; clips per hour and the seconds that are left."""
    names = ["status", "error_type", "clip_id", "finished_at", "worker", *WAIT_AND_WORK]
    takes, table, gone = ledger.read_apart(store, [*names, *BUCKET_SHAPE])
    dropped = gone.num_rows
    columns = {name: table[name].to_pylist() for name in there(names, table.column_names)}
    counts = Counter(columns["status"])
    rows = run["planned_rows"] + run["invalid_rows"] - dropped
    done = counts["done"] - takes
    per_hour, last = pace(columns)
    now = datetime.now(UTC)
    clips = dict(zip(columns["clip_id"], columns["status"], strict=True))
    clips.pop(None, None)                               # of invalid rows
    pending_clips = max(0, run["clips"] - dropped - len(clips)) + takes
    running = per_hour and last and now - last < STALE
    return {
        "rows": rows, "done": done, "failed": counts["failed"], "pending": max(0, rows - done - counts["failed"]),
        "clips": run["clips"], "pending_clips": pending_clips, "takes": takes, "dropped": dropped,
        "finished": rows <= done + counts["failed"] or has(store, SUCCESS),
        "clips_per_hour": per_hour, "eta_s": 3600 * pending_clips / per_hour if running and pending_clips else None,
        "last_row_s_ago": (now - last).total_seconds() if last else None,
        "buckets": buckets_of(run, zip(columns["clip_id"], columns["status"], shapes_of(table), strict=True),
                              Counter(shapes_of(gone))),
        "more_buckets": run["more_buckets"],
        "failed_by_type": dict(Counter(error_type for error_type, status in
                                       zip(columns["error_type"], columns["status"], strict=True)
                                       if status == "failed").most_common()),
    }


def shapes_of(rows: Any) -> Iterator[tuple]:
    """width, height, ... of each row of a table of the ledger."""
    return zip(*(rows[name].to_pylist() for name in BUCKET_SHAPE), strict=True)


def buckets_of(run: dict[str, Any], rows: Iterator[tuple[str | None, str, tuple]],
               dropped: Counter[tuple]) -> list[dict[str, Any]]:
    """Clips by bucket, in the order of rendering; rows: clip_id, status and shape of each row; dropped: by shape."""
    seen: dict[str, tuple[str, tuple]] = {clip_id: (status, shape) for clip_id, status, shape in rows if clip_id}
    counts = Counter(seen.values())
    said = []
    for bucket in run["buckets"]:
        shape = tuple(bucket.get(name) for name in BUCKET_SHAPE)
        done, failed = counts["done", shape], counts["failed", shape]
        said.append({"bucket": bucket_text(bucket), **bucket, "done": done, "failed": failed,
                     "pending": max(0, bucket["clips"] - done - failed - dropped[shape])})
    return said


def bucket_text(bucket: dict[str, Any]) -> str:
    return ", ".join((f"{bucket['width']}x{bucket['height']}", f"{bucket['frames']} frames", *sampling_of(bucket)))


def rows_meant(said: str) -> Filter:
    """An expression, or COLUMN=VALUE whose value is any text.  Raises UsageError."""
    try:
        return Filter.parsed(said)
    except BadFilter as error:
        column, equals, value = said.partition("=")
        if column and equals and not re.search(r"[\s<>!()'\"]", column):
            return column_is(column, value)
        raise UsageError(f"--where must be COLUMN=VALUE; got {said!r}. Or an expression: {error}") from None


def retry(uri: str, where: list[str], *, json: bool) -> int:
    """Put failed rows back to pending."""
    conditions = all_of(map(rows_meant, where)) if where else None
    store, _ = open_run(uri)
    try:
        with Lease.take(store, tell=lambda text: print(printable(text), file=sys.stderr)):     # no run may be writing
            count = ledger.retry_rows(store, conditions)
    except ValueError as error:
        raise UsageError(f"--where: {error}") from None
    sentence = (f"{counted(count, 'failed row')} pending again; the same render command tries them" if count else
                "No failed row" + (" of these" if conditions else "") + " that can be tried again; nothing was changed."
                " An invalid row is mended in the manifest")
    return answer({"exit_code": 0, "out": store.uri, "pending_again": count}, lambda: say(sentence), json=json)


def models(name: str | None, weights: str | None, *, json: bool) -> int:
    """Print the catalogue, or one card in full with what is missing of its weights; downloads nothing."""
    # read by the hub's client when it is imported: to look must not fetch 20 GB
    os.environ["HF_HUB_OFFLINE"] = "1"
    cards = [card_named(name)] if name else list(CATALOG.values())
    if weights is not None:
        checked_place("--weights", weights)
    found = [card_as_json(card, weights if name else None) for card in cards]
    if name:
        return answer(found[0], lambda: print_model(found[0]), json=json)
    return answer({"models": found}, lambda: print_models(found), json=json)


def card_as_json(card: ModelCard, weights: str | None) -> dict[str, Any]:
    """A card for JSON: what a row gets when it does not say, what it may ask for, where the weights are."""
    return {
        "name": card.name, "description": card.description, "fps": float(card.fps), "takes_image": card.takes_image,
        "needs_image": card.takes_image and card.needs_image,
        "defaults": {setting.name: own for setting in DEFAULTED if (own := setting.own_value(card)) is not None},
        "resolutions": {name: f"{width}x{height}" for name, (height, width) in card.resolutions.items()},
        "limits": {"min_side": card.min_side, "side_step": card.side_step, "max_pixels": card.max_pixels,
                   "max_duration_s": card.max_duration_s,
                   **{most: getattr(card, most) for setting in SAMPLING if (most := setting.most_of_card)}},
        "precisions": list(card.precisions), "attentions": list(card.attentions),
        "keep_ratio": card.keep_ratio, "tuned_for_sparse": card.tuned_for_sparse,
        "differs": list(card.differs), "guidance_note": card.guidance_note,
        "sources": {repository: list(files) for repository, files in card.sources.items()},
        "terms": card.terms, "memory_gb": dict(card.memory_gb), "weights": look_for_weights(card, weights),
    }


def look_for_weights(card: ModelCard, weights: str | None) -> dict[str, Any]:
    """Where they are, their size, and what is missing there."""
    try:
        folder = locate(weights, card)
    except CheckpointError as error:
        near = at_home(weights) if weights else card.folder
        if near is None:                                # nothing complete in the hub's cache
            layout = card.layouts[0]
            needs = [part if part.endswith(".safetensors") else f"{part}/"
                     for part in dict.fromkeys((*layout.parts, layout.tokenizer)) if part]
            return {"complete": False, "folder": None, "missing": needs,
                    "problem": f"not in the Hugging Face cache; the first render fetches {card.repo_id}" if card.repo_id
                    else str(error).removeprefix(f"{card.name}: ")}
        missing = missing_files(card, near) if near.is_dir() else []
        return {"complete": False, "folder": str(near), "missing": missing, "problem": str(error)}
    num_bytes = sum(path.stat().st_size for path in weights_files(card, folder).values())
    return {"complete": True, "folder": str(folder), "missing": [], "num_bytes": num_bytes}


def print_models(found: list[dict[str, Any]]) -> None:
    width = max(len(model["name"]) for model in found)
    for model in found:
        state = "weights found" if model["weights"]["complete"] else "weights missing"
        say(f"{model['name']:<{width}}  {state:<15}  {model['description']}", indent=width + 19)


def print_model(model: dict[str, Any]) -> None:
    defaults, limits, weights = model["defaults"], model["limits"], model["weights"]
    tuned = "was tuned" if model["tuned_for_sparse"] else "was not tuned"
    lines = {
        "defaults": ", ".join(f"{name} {value}" for name, value in defaults.items() if value != ""),
        "sizes": ", ".join(f"{name} {size}" for name, size in model["resolutions"].items())
        + f"; WIDTHxHEIGHT in steps of {limits['side_step']} from {limits['min_side']}, at most "
        f"{limits['max_pixels']:,} pixels",
        "image": "every row needs one; a named size is an area in the image's aspect, to WIDTHxHEIGHT it is cropped"
        if model["needs_image"] else "a row may have one; it is cropped to the clip's size" if model["takes_image"]
        else "",
        "length": f"1 to {limits['max_duration_s']:g} s at {model['fps']:g} frames per second",
        "precision": ", ".join(model["precisions"]),
        "attention": f"{', '.join(model['attentions'])}; sparse keeps {model['keep_ratio']:.0%} of the blocks of keys, "
        f"which this model {tuned} for",
        "note": "; ".join((*model["differs"], *([model["guidance_note"]] if model["guidance_note"] else []))),
        "GPU memory": ", ".join(f"{stage} {gb} GB" for stage, gb in model["memory_gb"].items()),
        "weights": weights["problem"] if not weights["complete"] else
        f"{weights['folder']} ({weights['num_bytes'] / 1e6:,.1f} MB)",
        "terms": model["terms"],
    }
    say(f"{model['name']}: {model['description']}")
    for name, text in lines.items():
        if text:
            say(f"  {name:<12}{text}", indent=14)
    for name in weights["missing"]:
        say(f"              missing: {name}")
