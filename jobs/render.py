"""One run, there and back: settings in; clips, a ledger and an exit code out."""

import signal
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

from dailies.actors.messages import Clip
from dailies.jobs.answer import answer
from dailies.jobs.machines import cores_of, device_of, gpus_of, refuse_silent_gpu, variant_of
from dailies.jobs.notes import limits_of, next_steps, notes_of, tell, what_is_made, what_was_made
from dailies.jobs.progress import Display, printable, say
from dailies.jobs.report import Reports
from dailies.jobs.settings import RenderJob
from dailies.jobs.signals import on_signals
from dailies.jobs.usage import UsageError, card_named, seconds_meant
from dailies.model.private import at_home
from dailies.model.weights import locate, weights_here
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.manifest.validation import ManifestError
from dailies.pipeline.plan import Defaults
from dailies.pipeline.resolved import refuse_rows
from dailies.pipeline.run.bookkeeper import Bookkeeper
from dailies.pipeline.run.intermediates import Seal
from dailies.pipeline.run.run import Run
from dailies.pipeline.run.run import prepare as prepare_run
from dailies.pipeline.run.seal import own_key
from dailies.pipeline.scheduler.budget import Budget
from dailies.pipeline.scheduler.intake import Stop
from dailies.pipeline.scheduler.progress import Progress
from dailies.pipeline.stages import Engine, Outcome, Stage
from dailies.pipeline.store import StoreError, open_store
from dailies.pipeline.store.fetch import bring
from dailies.pipeline.text_to_video import text_to_video
from dailies.pipeline.wording import counted

MANY_IMAGES = 1000                                      # take longer than a person waits without a word


def render(job: RenderJob, *, json: bool, engine: Engine | None = None) -> int:
    """Plan, render and publish what is not done yet; 0 all done, 3 some rows failed, 4 out of budget, 130 stopped.

    engine: does the work; None: Ray.  Nothing is written before all that can be wrong with the job has been checked.
    Raises UsageError, SettingError, ManifestError, CheckpointError; StoreError, ClusterError, LeaseError.
    """
    began = time.monotonic()
    run, deadline = run_of(job), job.deadline()
    budget = Budget(until=deadline.timestamp() if deadline else None, gpu_hours=job.gpu_hours())
    every_s = seconds_meant("--report", job.report) if job.report else None
    reports = Reports(run.store, every_s, lambda text: tell([text]), price=job.price)
    is_same = run.has_begun and run.change is None and run.is_recorded
    if is_same and run.is_marked and not (bookkeeper := run.bookkeeper()).open_clips:
        tell(notes_of(run))                             # all is done: no row is written, and no driver disturbed
        reports.last()
        run.complete(pending=bookkeeper.counts()["pending"], keep_latents=job.keep_latents)
        return report(job, run, bookkeeper, None, budget, began, json)
    run.check_weights()
    begin(job, run)
    tell([what_is_made(run), *notes_of(run), *limits_of(job, run, deadline)])
    with reports, run.open(
            limit=job.limit, keep_latents=job.keep_latents, take_over=job.take_over, wait=job.wait,
            reuse=[open_store(uri) for uri in job.reuse], tell=lambda text: tell([text])) as bookkeeper:
        stop = work(job, run, bookkeeper, budget, engine)
    return report(job, run, bookkeeper, stop, budget, began, json)


def run_of(job: RenderJob, *, weights_are_needed: bool = True) -> Run:
    """Every error of what was given comes from here.

    Raises UsageError, SettingError, BadSealKey, ManifestError, CheckpointError, OtherRun, StoreError.
    """
    refuse_silent_gpu(job)
    card = card_named(job.model)
    cores_of(job)
    own_key()
    try:
        store = open_store(job.out)
    except StoreError as error:
        raise UsageError(f"--out {error}") from None
    try:
        defaults = Defaults(**job.row_defaults()).resolved(card)
    except ValueError as error:
        raise UsageError(f"{error}. This is the default for rows that do not say") from None
    refuse = partial(refuse_rows, card=card, defaults=defaults)
    manifest = Manifest.read(job.sources, mapping=job.map, prompts=job.prompt, also=refuse)
    weights = weights_here(job.weights, card)
    if weights is None and weights_are_needed:
        refuse(manifest, errors := manifest.errors.copy())
        if len(errors) and not job.skip_invalid:        # before anything is fetched
            raise ManifestError(manifest.name, errors)
        tell([f"fetching the weights of {card.name}, which are not here (dailies plan says how large they are)"])
        weights = locate(job.weights, card, fetch=bring)
    if card.takes_image and manifest.table.num_rows >= MANY_IMAGES:
        say(f"reading the images of {counted(manifest.table.num_rows, 'row')}", stream=sys.stderr)
    device = job.device or device_of(job.ray)
    return prepare_run(manifest, store, card, weights=weights, device=device, defaults=defaults,
                       precision=job.precision, attention=job.attention, decode_precision=job.decode_precision,
                       variant=variant_of(job, device), skip_invalid=job.skip_invalid, strict=job.strict,
                       allow_images=job.allow_images, is_here=job.ray == "local", changed=job.changed,
                       gpus=lambda: gpus_of(job.ray))


def begin(job: RenderJob, run: Run) -> None:
    """The store does what a run needs, and the folder is this run's.  Raises UsageError, OtherRun, StoreError."""
    try:
        run.store.probe()
    except StoreError as error:
        if run.store.path is not None:                  # a path was typed wrong; a bucket may come back
            raise UsageError(f"--out {error}") from error
        raise
    run.claim(job.model_dump())


def work(job: RenderJob, run: Run, bookkeeper: Bookkeeper, budget: Budget, engine: Engine | None) -> Stop | None:
    """Render until all is done, the budget is used up or somebody stops it: the Stop, or None for nothing to do."""
    rounds = bookkeeper.rounds()
    first = next(rounds, None)
    tell(bookkeeper.notes)
    if first is None:
        return None
    if engine is None:                                  # Ray is wanted only where there is something to do
        from dailies.pipeline.scheduler import cluster
        engine = cast(Engine, cluster)
    requests, num_clips = first
    stop, cores = Stop(), cores_of(job)
    if bookkeeper.lease is not None:
        bookkeeper.lease.on_lost = stop.now
    stages = stages_for(job, run, run.seal(), {clip_id: found.sha256 for clip_id, found in bookkeeper.spoilt.items()})
    with Display(total=num_clips, view=Display.view_for()) as display:
        def on_progress(progress: Progress) -> None:
            display.update(progress)
            bookkeeper.tick()

        if cores is not None:
            display.note(f"starting Ray on this machine, for {counted(cores, 'core')}; it takes some seconds")
        # in this order: Ray takes SIGTERM for itself when it connects
        with engine.connect(job.ray, cpus=cores, note=display.note), interruptible(stop, display):
            while num_clips and not (stop.draining or budget.is_over):
                for outcome in engine.run(stages, requests, max_attempts=job.max_attempts, on_progress=on_progress,
                                          stop=stop, budget=budget):
                    bookkeeper.record(outcome)
                    for said in [said for said in said_of_clip(outcome) if said not in run.fallbacks]:
                        display.note(f"clip {outcome.value.request.clip_id[:12]}: {said}")
                requests, num_clips = next(rounds, ((), 0))
                if num_clips:
                    display.note(f"{counted(num_clips, 'clip')} rejected: made again with another seed, as asked")
                    display.total = num_clips
    return stop


def said_of_clip(outcome: Outcome) -> tuple[str, ...]:
    clip = outcome.value
    return (*clip.fallbacks, *clip.notes, *outcome.notes) if isinstance(clip, Clip) else outcome.notes


def stages_for(job: RenderJob, run: Run, seal: Seal = Seal(), spoilt: Mapping[str, str] = {}) -> list[Stage]:
    weights, plan = job.weights, run.plan
    if weights and "://" not in weights:                # the processes that read it may run in another folder
        weights = str(at_home(weights).absolute())
    on = plan.card.runtime(run.device, plan.precision, plan.attention, decode_precision=plan.decode_precision,
                           compiled=job.compile, threads=job.threads_per_sampler or 1, largest=plan.largest)
    return text_to_video(plan.made_by, weights, run.store, on, strict=job.strict, batch=job.batch,
                         samplers=job.samplers, keep_latents=job.keep_latents, seal=seal, spoilt=spoilt)


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


def report(job: RenderJob, run: Run, bookkeeper: Bookkeeper, stop: Any, budget: Budget, began: float,
           json: bool) -> int:
    """Say what was done, and return the exit code.  began: monotonic."""
    counts = bookkeeper.counts()
    interrupted = stop is not None and stop.draining and counts["pending"] > 0
    out_of_budget = budget.has_stopped and counts["pending"] > 0
    stopped = interrupted or out_of_budget or bookkeeper.left_by_limit > 0
    code = 130 if interrupted else 4 if stopped else 3 if counts["failed"] else 0
    cost = {} if job.price is None else {"cost": round(job.price * budget.gpu_hours, 2)}
    said = {"exit_code": code, "out": run.store.uri, **counts, "clips": run.plan.num_clips,
            "rendered": bookkeeper.num_rendered, "adopted": bookkeeper.num_adopted, "reused": bookkeeper.num_reused,
            "left_by_limit": bookkeeper.left_by_limit, "seconds": round(time.monotonic() - began, 3),
            "gpu_hours": round(budget.gpu_hours, 4), **cost,
            "notes": notes_of(run) + bookkeeper.notes, "failures": bookkeeper.failures}

    def tell_end() -> None:
        say(what_was_made(said, budget.gpu_hours))
        for failure in bookkeeper.failures:
            line = f"  {failure['id']}: {failure['error_type']} in {failure['stage']}: {failure['error']}"
            say(printable(line[:300]))
        for sentence in next_steps(job, run, bookkeeper, interrupted=interrupted, out_of_budget=out_of_budget):
            say(printable(sentence))

    return answer(said, tell_end, json=json)
