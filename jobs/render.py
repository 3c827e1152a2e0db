"""One run, there and back: settings in; clips, a ledger and an exit code out."""

import json as jsonlib
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

from dailies.actors.clip_file import clip_key
from dailies.actors.cores import usable_cores
from dailies.actors.gate import REJECTED
from dailies.actors.messages import Clip, Failure, Request
from dailies.jobs.progress import Display, counted, duration_text, printable, say
from dailies.jobs.runs import clip_of
from dailies.jobs.settings import RenderJob
from dailies.jobs.signals import on_signals
from dailies.jobs.usage import NO_GPU, UsageError, card_named
from dailies.model.catalog import ModelCard
from dailies.model.private import at_home
from dailies.model.ways import AUTO, CAPABILITIES, Gpu, Way, fastest
from dailies.model.weights import fingerprint, locate, weights_files, weights_here
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.manifest.validation import shown
from dailies.pipeline.plan import BLOCK, RESEEDS, Defaults, Except, Plan, PlannedRow, with_another_seed
from dailies.pipeline.run.adoption import Spoilt, adopt
from dailies.pipeline.run.growth import Change, change, grow
from dailies.pipeline.run.intermediates import EMBEDDINGS, LATENTS, Seal, clear, is_ours
from dailies.pipeline.run.lease import Lease
from dailies.pipeline.run.ledger import (
    SUCCESS,
    Ledger,
    forget_retried,
    hashes_of,
    invalid_row,
    keys_of,
    read,
    row_of,
    write_success,
)
from dailies.pipeline.run.run_json import RUN, check_counts, check_run, claim_run, has, read_run
from dailies.pipeline.run.saved_steps import STEPS
from dailies.pipeline.run.seal import BadSealKey, drop_key, own_key, seal_of
from dailies.pipeline.scheduler.budget import Budget
from dailies.pipeline.scheduler.placement import Node
from dailies.pipeline.stages import Outcome, Stage
from dailies.pipeline.store.fetch import bring
from dailies.pipeline.store.objects import PROBE, PROBE_KEY
from dailies.pipeline.store.store import FolderStore, Store, StoreError, open_store
from dailies.pipeline.text_to_video import text_to_video

PACKAGES = ("torch", "transformers", "ray", "av", "pyarrow")      # whose versions run.json tells
SHOWN_FAILURES = 20
MANY_IMAGES = 1000                                      # take longer than a person waits without a word
REJECTIONS = {REJECTED, "NonFiniteLatent", "NonFiniteFrames"}
MANY_CLIPS = 100                                        # to read and decode take longer than a person waits, likewise
UNKNOWN = "unknown until the weights are here"          # a fingerprint


def render(job: RenderJob, *, json: bool) -> int:
    """Plan, render and publish what is not done yet; 0 all done, 3 some rows failed, 4 out of budget, 130 stopped.

    Nothing is written before everything that can be wrong with the job has been checked.
    Raises UsageError, ManifestError, CheckpointError; StoreError, ClusterError, LeaseError.
    """
    night, deadline = prepare(job), job.deadline()
    budget = Budget(until=deadline and deadline.timestamp(), gpu_hours=job.gpu_hours())
    is_same = night.has_begun and night.change is None
    if is_same and has(night.store, SUCCESS) and not (book := Book(night)).open_clips:
        tell(notes_of(night))
        return finish(night, book, None, budget, json)  # all is done: nothing is written, and no driver disturbed
    check_weights(night)
    begin(night)
    tell([what_is_made(night), *notes_of(night), *limits_of(night, deadline)])
    with Lease.take(night.store, wait=job.take_over, tell=lambda text: tell([text])) as lease:
        admit(night)                                    # now, since the driver before may just have written
        with Book(night, lease) as book:
            todo, num_clips = book.todo()
            tell(book.notes)
            stop = work(night, book, todo, num_clips, budget) if num_clips else None
        return finish(night, book, stop, budget, json)


@dataclass(frozen=True, kw_only=True)
class Night:
    """A job with everything resolved and checked, and nothing written."""

    job: RenderJob
    card: ModelCard
    store: Store
    plan: Plan
    fallbacks: tuple[str, ...]                          # of every clip, as far as they are known before
    has_begun: bool                                     # the folder holds this run already
    began: float                                        # monotonic
    chosen_because: str                                 # of precision and attention, where they were to be chosen
    change: Change | None = None                        # of the manifest, since the folder was rendered for one
    weights: Path | None                                # None: they are not here, which only `plan` accepts

    @property
    def device(self) -> str:
        return self.job.device or device_of(self.job.ray)

    def identity(self) -> dict[str, Any]:
        """What decides which clips this run has: a run folder holds one such run."""
        plan = self.plan
        images = {"images_digest": plan.images_digest} if plan.images_digest else {}
        said = {name: value for name in ("decode_precision", "variant") if (value := getattr(plan, name))}
        return {"manifest_digest": plan.manifest.digest, **images, "model": plan.card.name,
                "weights_fingerprint": plan.weights_fingerprint, "precision": plan.precision,
                "attention": plan.attention, **said, **plan.defaults.model_dump()}


def prepare(job: RenderJob, *, weights_are_needed: bool = True) -> Night:
    """Every complaint comes from here.  Raises UsageError, ManifestError, CheckpointError, OtherRun, StoreError."""
    began = time.monotonic()
    refuse_silent_gpu(job)
    card = card_named(job.model)
    cores_of(job)
    try:
        own_key()
    except BadSealKey as error:
        raise UsageError(str(error)) from None
    try:
        store = open_store(job.out)
    except StoreError as error:
        raise UsageError(f"--out {error}") from None
    manifest = Manifest.read(job.sources, mapping=job.map, prompts=job.prompt)
    weights = weights_here(job.weights, card)
    if weights is None and weights_are_needed:
        tell([f"fetching the weights of {card.name}, which are not here (dailies plan says how large they are)"])
        weights = locate(job.weights, card, fetch=bring)
    defaults = Defaults(resolution=job.resolution, duration_s=job.duration, steps=job.steps, guidance=job.guidance)
    try:
        defaults.resolved(card)
    except ValueError as error:
        raise UsageError(f"{error}. This is the default for rows that do not say") from None
    found = read_run(store)
    if found is not None:
        check_counts(store, found)
    before = found["identity"] if found else {}         # a run keeps its own, wherever it is continued
    device = job.device or device_of(job.ray)
    way = way_of(job, card, weights, device, found)
    precision, attention = way.precision, way.attention
    decode_precision = job.decode_precision or before.get("decode_precision")
    for name, value, allowed in (("precision", precision, card.precisions), ("attention", attention, card.attentions),
                                 ("decode-precision", decode_precision, (None, "fp32", "bf16"))):
        if value not in allowed and found is not None and value == before.get(name.replace("-", "_")):
            raise StoreError(f"{store.uri_of(RUN)} is damaged: its {name} is {shown(value)}. Put a copy of it back")
        if value not in allowed:
            raise UsageError(f"--{name} must be {' or '.join(allowed)} for {card.name}; got {value}")
    # of a cluster's machines it is known when they are at work
    fallbacks = () if job.ray != "local" else (
        *card.fallbacks(weights, device, precision), *card.decode_fallbacks(device, precision, decode_precision))
    if card.takes_image and manifest.table.num_rows >= MANY_IMAGES:
        print(f"reading the images of {counted(manifest.table.num_rows, 'row')}", file=sys.stderr, flush=True)
    print_of = fingerprint(weights_files(card, weights)) if weights else before.get("weights_fingerprint", UNKNOWN)
    plan = Plan.make(manifest, card, defaults, weights_fingerprint=print_of,
                     precision=precision, attention=attention, decode_precision=decode_precision,
                     variant=variant_of(job, device),
                     skip_invalid=job.skip_invalid, allow_images=job.allow_images)
    if job.strict and (fallbacks or plan.roundings):
        said = "; ".join([*fallbacks, *(f"{counted(rows, 'row')}: {note}" for note, rows in plan.roundings[:10])])
        raise UsageError(f"--strict, and not every row can be rendered as asked: {said}")
    night = Night(job=job, card=card, store=store, plan=plan, fallbacks=fallbacks, has_begun=found is not None,
                  began=began, chosen_because=way.because, weights=weights)
    if found is None:
        return night
    check_run(store, found, night.identity())
    return replace(night, change=change(store, found, plan))


def variant_of(job: RenderJob, device: str) -> str | None:
    """What is asked for that moves the last bits, which guidance makes more of: a part of what a clip is.

    A CPU's threads share a sum; a GPU's do not know of them.
    """
    threads = job.threads_per_sampler or 1
    said = ["compiled"] * job.compile + [f"{threads} threads"] * (threads > 1 and device == "cpu")
    return ", ".join(said) or None


def refuse_silent_gpu(job: RenderJob) -> None:
    """Raises UsageError for a GPU whose driver does not answer torch, before anything is read or written."""
    import torch
    if job.device == "cuda" and job.ray == "local" and not torch.cuda.is_available():
        raise UsageError(NO_GPU)


def way_of(job: RenderJob, card: ModelCard, weights: Path | None, device: str, found: dict[str, Any] | None) -> Way:
    """Precision and attention: as they are said, as the run that is continued has them, chosen, or the model's own.

    Raises UsageError where they are to be chosen for GPUs of several kinds.
    """
    said = {"precision": job.precision, "attention": job.attention}
    if found:                                           # a run keeps its own, wherever it is continued
        before = found["identity"]
        said = {name: value if value not in (None, AUTO) else before.get(name) for name, value in said.items()}
        return Way(**said, because=found.get("chosen_because") or "")
    own = card.precision_in(weights, device) if weights else card.precision_on(device)
    if AUTO not in said.values():
        return Way(precision=said["precision"] or own, attention=said["attention"] or card.attentions[0], because="")
    # weights that are INT8 already run in nothing else
    precision = None if said["precision"] == AUTO and own != "int8" else own if said["precision"] in (None, AUTO) else (
        said["precision"])
    attention = None if said["attention"] == AUTO else said["attention"] or card.attentions[0]
    gpus = gpus_of(job.ray) if device == "cuda" else ()
    if len(gpus) > 1:
        raise UsageError(f"the machines have GPUs of several kinds ({', '.join(gpu.name for gpu in gpus)}), and one "
                         "run has one precision and attention: say which, --precision NAME --attention NAME")
    gpu = gpus[0] if gpus else Gpu(name="a GPU that is not there yet", capability=None) if device == "cuda" else None
    return fastest(card, gpu, precision=precision, attention=attention)


@cache
def gpus_of(ray: str) -> tuple[Gpu, ...]:
    """The kinds of GPU that will do the work."""
    if ray == "local":
        import torch
        return tuple({Gpu(name=torch.cuda.get_device_name(place), capability=torch.cuda.get_device_capability(place))
                      for place in range(torch.cuda.device_count())})
    from dailies.pipeline.scheduler import cluster
    with cluster.connect(ray):
        kinds = sorted({node.gpu for node in cluster.nodes() if node.gpus})
    return tuple(Gpu(name=kind or "a GPU without a name", capability=CAPABILITIES.get(kind)) for kind in kinds)


@cache
def device_of(ray: str) -> str:
    """What the machines that will do the work compute on."""
    if ray == "local":
        import torch
        return "cuda" if torch.cuda.is_available() else "cpu"
    from dailies.pipeline.scheduler import cluster
    with cluster.connect(ray):
        return "cuda" if any(node.gpus for node in cluster.nodes()) else "cpu"


def machines_of(job: RenderJob) -> list[Node]:
    """What the work will be done on."""
    if job.ray == "local":
        import torch
        return [Node(id="here", host="this machine", cpus=cores_of(job), gpus=torch.cuda.device_count())]
    from dailies.pipeline.scheduler import cluster
    with cluster.connect(job.ray):
        return cluster.nodes()


def cores_of(job: RenderJob) -> int | None:
    """Of this machine, for a local run; None for a cluster.  Raises UsageError."""
    if job.ray != "local":
        if job.cpus is not None:
            raise UsageError("--cpus is of a local run: a cluster's machines say themselves what they have")
        return None
    usable = usable_cores()
    if job.cpus is not None and job.cpus > usable:
        raise UsageError(f"--cpus must be at most {usable}, the cores that this process may use here; got {job.cpus}")
    return job.cpus or usable


def check_weights(night: Night) -> None:
    """Names, shapes and dtypes of every weight, from the files' headers.  Raises CheckpointError."""
    for build in night.card.builders():
        build(night.weights, "meta", night.plan.precision)


def begin(night: Night) -> None:
    """The store does what a run needs, and the folder is this run's.  Raises UsageError, OtherRun, StoreError."""
    try:
        night.store.probe()
    except StoreError as error:
        if isinstance(night.store, FolderStore):        # a path was typed wrong; a bucket may come back
            raise UsageError(f"--out {error}") from error
        raise
    summary = night.plan.summary()
    claim_run(night.store, night.identity(), {
        "device": night.device, "rows": summary["rows"], "invalid_rows": summary["invalid_rows"],
        "planned_rows": summary["planned_rows"], "clips": summary["clips"], "duplicates": summary["duplicates"],
        "settings": summary["settings"], "buckets": summary["buckets"], "more_buckets": summary["more_buckets"],
        "roundings": summary["roundings"], "rows_digest": night.plan.rows_digest, "job": night.job.model_dump(),
        "chosen_because": night.chosen_because, "fallbacks": list(night.fallbacks),
        "versions": {"dailies": version_of("dailies-render"), **{name: version_of(name) for name in PACKAGES},
                     "python": platform.python_version()},
        "began_at": datetime.now(UTC).isoformat(timespec="seconds"),
    })


def admit(night: Night) -> None:
    """Let the folder grow, where this is not the manifest that it was rendered for.  Raises OtherRun, StoreError."""
    run = read_run(night.store)
    if run is not None and change(night.store, run, night.plan) is not None:
        grow(night.store, night.plan)


def what_is_made(night: Night, *, has_out: bool = True) -> str:
    """Said before the work begins, which takes a while to show anything."""
    plan = night.plan
    images = f", {counted(plan.num_images, 'image')}" if plan.num_images else ""
    return (f"{counted(plan.manifest.table.num_rows, 'row')}{images}, {counted(plan.num_clips, 'clip')} with "
            f"{night.card.name} in {plan.precision} on {night.device}"
            + (f", into {night.store.uri}" if has_out else ""))


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:                        # a submitted job brings dailies as a folder, not installed
        return "not installed"


class Book:
    """What of the plan is done, and the ledger that says so."""

    def __init__(self, night: Night, lease: Lease | None = None):
        """lease: needed to write."""
        self.store, self.plan, self.limit, self.lease = night.store, night.plan, night.job.limit, lease
        self.chosen_because = night.chosen_because or None
        self.ledger = Ledger.open(self.store, self.plan.manifest.user.schema)
        keys = self.plan.keys()
        self.ledger.only(keys, [row.id for row in self.plan.invalid_rows()] if self.plan.num_invalid_rows else [])
        self.files = files_of_clips(self.store)         # listed after the ledger was read: a row follows its clip
        self.gone = self.ledger.without_a_file(self.files)
        self.ledger.forget(self.gone)
        self.spoilt: dict[str, Spoilt] = {}             # files under clips' names that are not those clips
        left = self.ledger.pending(keys)
        self.num_rows = keys.num_rows + self.plan.num_invalid_rows
        known = {name for name, seed in keys_of(self.ledger.keys) if seed is None}
        self.new_invalid = [row for row in self.plan.invalid_rows() if row.id not in known]
        self.num_invalid = self.plan.num_invalid_rows - len(self.new_invalid)       # that the ledger has
        self.left_by_limit = 0                          # clips to make, beyond what this command was to make
        self.open_clips = set(left["clip_id"].to_pylist())
        # rows that are written although another row of their clip is not: they must not be written again
        written = keys.join(left.select(["id", "seed"]), ["id", "seed"], join_type="left anti")
        self.written = {key for key, clip_id in zip(keys_of(written), written["clip_id"].to_pylist(), strict=True)
                        if clip_id in self.open_clips}
        self.remade: dict[str, tuple[list[PlannedRow], int]] = {}      # clips with other seeds: their rows, which try
        self.again: list[Request] = []                  # of them, those that nobody works on yet
        self.num_adopted = self.num_rendered = 0
        self.failures: list[dict[str, Any]] = []

    def __enter__(self) -> "Book":
        return self

    def __exit__(self, *_: object) -> None:
        self.lease.check()                              # another driver writes the rows of what it finds published
        self.ledger.close()

    def tick(self) -> None:
        """To be called now and then.  Raises LeaseError."""
        self.lease.check()
        self.ledger.tick()

    def wanted(self) -> tuple[set[str], set[str]]:
        """The clips that have to be made, and those that are published but not in the ledger."""
        published = self.open_clips.intersection(self.files)
        return self.open_clips - published, published

    def todo(self) -> tuple[Iterator[Request], int]:
        """The requests to render, in order, and how many. Invalid rows and published clips get their rows first."""
        if self.open_clips or self.new_invalid:
            self.store.delete(SUCCESS)
        self.record_invalid()
        wanted, published = self.wanted()
        self.adopt(self.plan.requests(skip=Except(published)), published)
        wanted |= published & self.spoilt.keys()
        num_clips = min(len(wanted), self.limit or len(wanted))
        self.left_by_limit = len(wanted) - num_clips
        return islice(self.plan.requests(skip=Except(wanted)), num_clips), num_clips

    @property
    def notes(self) -> list[str]:
        """What of this run's clips is not in the folder as the ledger says, for a person; known after `todo`."""
        notes = [f"clip {clip_id[:12]}: what lies under its name is not it: {found.why}. It is made again, and replaced "
                 "then" for clip_id, found in islice(self.spoilt.items(), SHOWN_FAILURES)]
        if more := len(self.spoilt) - len(notes):
            notes.append(f"and {counted(more, 'other file')} under clips/ that {'is' if more == 1 else 'are'} not the "
                         "clip of that name")
        if gone := len(self.gone - self.spoilt.keys() - self.files.keys()):
            notes.append(f"{counted(gone, 'clip')} that the ledger calls done {'is' if gone == 1 else 'are'} not in the "
                         "run folder any more: made again")
        return notes

    def record_invalid(self) -> None:
        for start in range(0, len(self.new_invalid), BLOCK):
            rows = self.new_invalid[start: start + BLOCK]
            self.ledger.append([invalid_row(row.id, row.prompt, row.error) for row in rows],
                               self.plan.user_columns([row.row for row in rows]))
        self.num_invalid += len(self.new_invalid)
        self.new_invalid = []

    def adopt(self, requests: Iterable[Request], published: set[str]) -> None:
        """Write the rows of clips that were published by a run which was killed before it could."""
        if len(published) >= MANY_CLIPS:
            tell([f"reading {counted(len(published), 'clip')} that are published and have no row"])
        for found in adopt(self.store, requests, hashes_of(self.store, published)):
            if isinstance(found, Spoilt):
                self.spoilt[found.request.clip_id] = found
                continue
            self.append(self.rows_of(found.request.clip_id), found, None)
            self.num_adopted += 1

    def record(self, outcome: Outcome) -> None:
        value = outcome.value
        rows = self.rows_of(value.request.clip_id)
        clip_id = value.request.clip_id
        is_again = clip_id in self.gone or clip_id in self.ledger.put_back
        if is_again and isinstance(value, Clip) and not value.notes:
            value = replace(value, notes=(f"made again: its file was {self.ledger.put_back.get(clip_id) or 'gone'}",))
        if isinstance(value, Failure) and value.error_type in REJECTIONS:
            rows = self.make_again(value.request, rows)
        self.append(rows, value, outcome)
        if isinstance(value, Clip):
            self.num_rendered += 1
        elif len(self.failures) < SHOWN_FAILURES:
            self.failures += [{"id": row.id, "seed": row.seed, "stage": value.stage, "error_type": value.error_type,
                               "error": value.error} for row in rows]

    def make_again(self, rejected: Request, rows: list[PlannedRow]) -> list[PlannedRow]:
        """Rows that ask for another seed wait for that clip, at most RESEEDS times. Returns those that have failed."""
        tries = self.remade[rejected.clip_id][1] if rejected.clip_id in self.remade else 0
        waiting = [row for row in rows if row.reseed and tries < RESEEDS]
        if waiting:
            request = with_another_seed(rejected)
            self.remade[request.clip_id] = waiting, tries + 1
            self.again.append(request)
        return [row for row in rows if row not in waiting]

    def rows_of(self, clip_id: str) -> list[PlannedRow]:
        """The rows of a clip that have still to be written."""
        if clip_id in self.remade:
            return self.remade[clip_id][0]
        return [row for row in self.plan.rows_of(clip_id) if (row.id, row.seed) not in self.written]

    def append(self, rows: list[PlannedRow], value: Any, outcome: Outcome | None) -> None:
        self.lease.check()
        told = {"chosen_because": self.chosen_because}
        self.ledger.append([row_of(row.id, value, outcome, seed=row.seed) | told | {"sample": row.sample}
                            for row in rows],
                           self.plan.user_columns([row.row for row in rows]))

    def counts(self) -> dict[str, int]:
        """Of this manifest's rows; a run folder may have others besides."""
        done, failed = self.ledger.counts["done"], self.ledger.counts["failed"]
        return {"rows": self.num_rows, "done": done, "failed": failed, "pending": self.num_rows - done - failed}


def files_of_clips(store: Store) -> dict[str, int]:
    """clip_id -> bytes, of every file that lies where a clip does."""
    # a clip may lie in another folder there, too: somebody's copy
    return {clip_id: info.num_bytes for info in store.list("clips/")
            if info.key == clip_key(clip_id := clip_of(info.key))}


def work(night: Night, book: Book, todo: Iterable[Request], num_clips: int, budget: Budget) -> Any:
    """Render until all is done, the budget is used up or somebody stops it; returns the Stop."""
    from dailies.pipeline.scheduler import cluster  # Ray is wanted only where there is something to do
    job, stop = night.job, cluster.Stop()
    book.lease.on_lost = stop.now
    spoilt = {clip_id: found.sha256 for clip_id, found in book.spoilt.items()}
    stages = stages_of(night, seal_of(night.store, fresh=not night.has_begun), spoilt)
    with Display(total=num_clips, view=Display.view_for()) as display:
        def on_progress(progress: cluster.Progress) -> None:
            display.update(progress)
            book.tick()

        if job.ray == "local":
            display.note(f"starting Ray on this machine, for {counted(cores_of(job), 'core')}; it takes some seconds")
        # in this order: Ray takes SIGTERM for itself when it connects
        with cluster.connect(job.ray, cpus=cores_of(job), note=display.note), interruptible(stop, display):
            while todo and not (stop.draining or budget.is_over):
                for outcome in cluster.run(stages, todo, max_attempts=job.max_attempts, on_progress=on_progress,
                                           stop=stop, budget=budget):
                    book.record(outcome)
                    for said in [said for said in said_of_clip(outcome) if said not in night.fallbacks]:
                        display.note(f"clip {outcome.value.request.clip_id[:12]}: {said}")
                todo, book.again = book.again, []
                if todo:
                    display.note(f"{counted(len(todo), 'clip')} rejected: made again with another seed, as asked")
                    display.total = len(todo)
    return stop


def said_of_clip(outcome: Outcome) -> tuple[str, ...]:
    clip = outcome.value
    return (*clip.fallbacks, *clip.notes, *outcome.notes) if isinstance(clip, Clip) else outcome.notes


def stages_of(night: Night, seal: Seal = Seal(), spoilt: Mapping[str, str] = {}) -> list[Stage]:
    job, weights = night.job, night.job.weights
    if weights and "://" not in weights:                # the processes that read it may run in another folder
        weights = str(at_home(weights).absolute())
    return text_to_video(night.card, weights, night.store, device=night.device, precision=night.plan.precision,
                         attention=night.plan.attention, decode_precision=night.plan.decode_precision,
                         strict=job.strict, compiled=job.compile, batch=job.batch, samplers=job.samplers,
                         threads=job.threads_per_sampler or 1, keep_latents=job.keep_latents, seal=seal, spoilt=spoilt)


def interruptible(stop: Any, display: Display) -> AbstractContextManager[None]:
    """The first Ctrl-C finishes what is begun; SIGTERM saves it, since whoever sends one does not wait long. The second
    ends the run at once."""
    def interrupted(number: int, frame: Any) -> None:
        if stop.saving or stop.draining and number == signal.SIGINT:
            stop.now()
        elif number == signal.SIGTERM:
            stop.save()
            display.note("Stopping: what is being sampled is saved, and finished by the same command.")
        else:
            stop.drain()
            display.note("Stopping: clips that are being made are finished first. Once more stops at once.")

    return on_signals(interrupted, signal.SIGINT, signal.SIGTERM)


def finish(night: Night, book: Book, stop: Any, budget: Budget, json: bool) -> int:
    """Clear up, mark a run that has a row for everything, say what was done, and return the exit code."""
    counts, store = book.counts(), night.store
    if not counts["pending"]:
        clear_shelf(night)
        if not has(store, SUCCESS):
            forget_retried(store)
            write_success(store)
    if book.lease is not None:
        store.tidy("clips", EMBEDDINGS, LATENTS, STEPS)
    interrupted = stop is not None and stop.draining and counts["pending"] > 0
    out_of_budget = budget.has_stopped and counts["pending"] > 0
    stopped = interrupted or out_of_budget or book.left_by_limit > 0
    code = 130 if interrupted else 4 if stopped else 3 if counts["failed"] else 0
    price = night.job.price
    cost = {} if price is None else {"cost": round(price * budget.gpu_hours, 2)}
    seconds = time.monotonic() - night.began
    if json:
        print(jsonlib.dumps({"exit_code": code, "out": store.uri, **counts, "clips": night.plan.num_clips,
                             "rendered": book.num_rendered, "adopted": book.num_adopted,
                             "left_by_limit": book.left_by_limit, "seconds": round(seconds, 3),
                             "gpu_hours": round(budget.gpu_hours, 4), **cost,
                             "notes": notes_of(night) + book.notes, "failures": book.failures}))
        return code
    say(f"{store.uri}: {counted(counts['done'], 'row')} done, {counts['failed']:,} failed, {counts['pending']:,} "
          f"pending; {counted(book.num_rendered, 'clip')} rendered in {duration_text(seconds)}"
          + (f", {book.num_adopted:,} found published" if book.num_adopted else "")
          + (f", {budget.gpu_hours:,.2f} GPU hours held" if budget.gpu_hours else "")
          + (f", {cost['cost']:,.2f} USD" if cost else ""))
    for failure in book.failures:
        say(printable(f"  {failure['id']}: {failure['error_type']} in {failure['stage']}: {failure['error']}"[:300]))
    for sentence in next_steps(night, book, interrupted=interrupted, out_of_budget=out_of_budget):
        say(printable(sentence))
    return code


def next_steps(night: Night, book: Book, *, interrupted: bool, out_of_budget: bool) -> Iterator[str]:
    """Where to look, and what to type next."""
    store, job = night.store, night.job
    uri = shlex.quote(job.out)
    if example := next((info for info in store.list("clips/") if info.key.endswith(".mp4")), None):
        yield f"The clips are in {store.uri_of('clips/')}, as {store.uri_of(example.key)}"
    if book.ledger.counts["failed"] > book.num_invalid:
        yield f"Try the failed rows again with: dailies retry {uri}, then the same command"
    if book.num_invalid:
        yield (f"{counted(book.num_invalid, 'row')} of the manifest could not be used; mend what `dailies plan` says "
               "of them, and the same command makes those alone")
    if interrupted:
        yield "Interrupted; the same command continues."
    elif out_of_budget:
        later = ", with a later --until" if job.until_is_one_moment else ""
        yield ("Stopped: no further clip would be done within the deadline or budget. The same command "
               f"continues{later}.")
    elif book.left_by_limit:
        following = min(book.left_by_limit, job.limit)
        yield (f"Stopped at --limit {job.limit}; the same command makes the next {following:,}"
               + (f" of {book.left_by_limit:,}." if book.left_by_limit > following else "."))
    yield f"Look at it with: dailies status {uri}; check every clip with: dailies verify {uri}"


def clear_shelf(night: Night) -> None:
    """Remove what only a run under way needs. A failed clip's latent stays: a retry need not sample again."""
    store, begun_at = night.store, time.time() - (time.monotonic() - night.began)
    for folder in (EMBEDDINGS, STEPS):
        clear(store, [info.key for info in store.list(f"{folder}/") if is_ours(info.key)])
    # of drivers that were killed in the middle of a probe; later ones may be another driver's that starts now
    clear(store, [info.key for info in store.list(PROBE)
                  if PROBE_KEY.fullmatch(info.key) and info.modified_s < begun_at])
    if night.job.keep_latents:
        return
    latents = {info.key: info.key.rpartition("/")[2].removesuffix(".safetensors")
               for info in store.list(f"{LATENTS}/") if is_ours(info.key)}
    if latents:
        rows = read(store, ["clip_id", "status"])
        statuses = zip(rows["clip_id"].to_pylist(), rows["status"].to_pylist(), strict=True)
        failed = {clip_id for clip_id, status in statuses if status == "failed"}
        clear(store, [key for key, clip_id in latents.items() if clip_id not in failed])
    drop_key(store)


def tell(notes: list[str]) -> None:
    for note in notes:
        say(printable(note), stream=sys.stderr)


def notes_of(night: Night) -> list[str]:
    """What will not be quite as asked, for a person."""
    plan, summary = night.plan, night.plan.summary()
    notes = [str(night.change)] if night.change else []
    notes += night.fallbacks
    if night.chosen_because:
        notes.append(f"{plan.precision} with {plan.attention} attention: {night.chosen_because}")
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
        notes += [f"  {complaint}" for complaint in plan.complaints.first()]
        notes += [f"  {count:,} more: {rule}" for count, rule in plan.complaints.rest()]
    notes += summary["manifest_notes"]
    if carried := [name.removeprefix("user.") for name in summary["user_columns"]]:
        notes.append(f"carried along to the ledger, and nothing else done with {'them' if len(carried) > 1 else 'it'}: "
                     + ", ".join(carried[:20]) + (f" and {len(carried) - 20:,} more" if len(carried) > 20 else ""))
    return notes


def limits_of(night: Night, deadline: datetime | None) -> list[str]:
    """What ends this command early, for a person."""
    job, hours, notes = night.job, night.job.gpu_hours(), []
    if deadline is not None:
        notes.append(f"No clip is begun that would not be done by {deadline:%Y-%m-%d %H:%M}")
    if hours is not None:
        notes.append(f"No clip is begun that would take more than {hours:,.2f} GPU hours in all" +
                     ("" if job.max_cost is None else f", {job.price * hours:,.2f} USD") +
                     ("; but a run on CPUs holds no GPU, so this does not limit it" if night.device == "cpu" else ""))
    return notes
