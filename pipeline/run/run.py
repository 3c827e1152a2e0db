"""A run: a plan, and the run folder that its clips go into.

`prepare` makes a plan as the folder's run.json, the model and the machine allow, `Run.of` takes one that is made; both
check everything that can be wrong and write nothing. `begin` makes the folder this run's, `open` is a driver's hold on
it, and `render` is both, and the work: examples/render_three.py.
"""

import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dailies.actors.messages import Clip, Failure, Request
from dailies.model.card import ModelCard
from dailies.model.errors import SettingError
from dailies.model.family import family_of, precision_in
from dailies.model.ways import AUTO, Gpu, Way, fastest
from dailies.model.weights import fingerprint, locate, weights_files
from dailies.model.weights_check import check_before_reading, check_parts
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.manifest.validation import shown
from dailies.pipeline.plan import Defaults, Plan
from dailies.pipeline.run import ledger
from dailies.pipeline.run.bookkeeper import Bookkeeper
from dailies.pipeline.run.growth import Change, change, compare, digests_of, grow, is_recorded
from dailies.pipeline.run.intermediates import Seal, clear
from dailies.pipeline.run.layout import (
    EMBEDDINGS,
    EMPTIED,
    LATENTS,
    RUN,
    SAVED_STEPS,
    SUCCESS,
    clip_key,
    intermediate_of,
)
from dailies.pipeline.run.lease import Lease
from dailies.pipeline.run.run_json import (
    RUN_FORMAT,
    check_counts,
    check_run,
    claim_run,
    has,
    known_manifest,
    read_run,
    run_format,
)
from dailies.pipeline.run.seal import drop_key, seal_of
from dailies.pipeline.stages import Outcome, Stage, run_local
from dailies.pipeline.store import Store, StoreError
from dailies.pipeline.store.base import PROBE, PROBE_KEY
from dailies.pipeline.wording import counted

VERSIONS_OF = ("torch", "transformers", "ray", "av", "pyarrow")        # told in run.json
Execute = Callable[[Sequence[Stage], Iterable[Request]], Iterable[Outcome]]
UNKNOWN_FINGERPRINT = "unknown until the weights are here"  # a fingerprint


@dataclass(frozen=True, kw_only=True)
class Run:
    """A plan and its folder, checked against each other; nothing is written before `begin`."""

    store: Store
    plan: Plan
    device: str = "cpu"                                 # what the work is done on
    weights: Path | None = None                         # None: they are not here
    fallbacks: tuple[str, ...] = ()                     # of every clip, as far as they are known before
    room: tuple[str, ...] = ()                          # what the memory here makes of it, which changes no clip
    chosen_because: str = ""                            # of precision and attention, where they were to be chosen
    has_begun: bool = False                             # the folder holds this run already
    changed: str | None = None                          # "render" or "keep" rows that have changed; None: no run then
    is_recorded: bool = False                           # the folder knows that this manifest was given
    change: Change | None = None                        # of the manifest, since the folder was rendered for one
    made_at: float = field(default_factory=time.time)   # since 1970

    @classmethod
    def of(cls, store: Store, plan: Plan, **about: Any) -> "Run":
        """about: further fields of ours.  Raises OtherRun for a folder with another run, StoreError."""
        run, found = cls(store=store, plan=plan, **about), read_run(store)
        if found is None:
            return run
        check_counts(store, found)
        check_run(store, found, run.identity())
        return replace(run, has_begun=True, change=change(store, found, plan, changed=run.changed),
                       is_recorded=is_recorded(found, known_manifest(store, found), plan))

    def identity(self) -> dict[str, Any]:
        """What all clips of a run share: a run folder holds one such run."""
        plan = self.plan
        return {"format": RUN_FORMAT, "model": plan.card.name, "weights_fingerprint": plan.weights_fingerprint,
                "precision": plan.precision, "attention": plan.attention, **plan.said_beside}

    def check_weights(self) -> None:
        """Names, shapes and dtypes of every weight, from the files' headers.  Raises CheckpointError."""
        if self.weights is None:
            return                                      # who fetches them finds out
        check_parts(self.plan.card, self.weights, self.plan.card.runtime("meta", self.plan.precision))

    def begin(self, job: Mapping[str, Any] | None = None) -> None:
        """The store does what a run needs, and the folder is this run's.  Raises OtherRun, StoreError.

        job: how it was started, for who reads run.json; JSON values.
        """
        self.store.probe()
        self.claim(job)

    def claim(self, job: Mapping[str, Any] | None = None) -> None:
        """As `begin`, of a store that was probed."""
        summary = self.plan.summary()
        claim_run(self.store, self.identity(), {
            "device": self.device, "rows": summary["rows"], "invalid_rows": summary["invalid_rows"],
            "planned_rows": summary["planned_rows"], "clips": summary["clips"], "duplicates": summary["duplicates"],
            "settings": summary["settings"], "buckets": summary["buckets"], "more_buckets": summary["more_buckets"],
            "roundings": summary["roundings"], "rows_digest": self.plan.rows_digest, **digests_of(self.plan),
            "defaults": dict(self.plan.defaults), "job": dict(job or {}),
            "chosen_because": self.chosen_because, "fallbacks": list(self.fallbacks),
            "versions": {"dailies": installed_version("dailies-render"),
                         **{name: installed_version(name) for name in VERSIONS_OF},
                         "python": platform.python_version()},
            "began_at": datetime.now(UTC).isoformat(timespec="seconds"),
        })

    def render(self, stages: Sequence[Stage], execute: Execute = run_local, *, limit: int | None = None,
               keep_latents: bool = False, tell: Callable[[str], None] = lambda text: None) -> Iterator[Outcome]:
        """Make and record what is not done yet; yields each clip's outcome once it is in the ledger.

        execute: `run_local`, or `dailies.run_cluster` where Ray is connected.  The others are as of `open`.
        Raises SettingError for stages that do not make this run's clips, CheckpointError, OtherRun, LeaseError,
        StoreError; with run_cluster ClusterError.
        """
        if not stages:
            raise SettingError("a run is rendered by stages, and there are none: text_to_video gives three")
        self.check_weights()
        self.begin()
        with self.open(limit=limit, keep_latents=keep_latents, tell=tell) as bookkeeper:
            for requests, _ in bookkeeper.rounds():
                for outcome in execute(stages, requests):
                    self.check_made(outcome.value, stages[-1].name)
                    bookkeeper.record(outcome)
                    yield outcome

    def check_made(self, value: Any, stage: str) -> None:
        """Raises SettingError unless it is a clip in this run's folder, or a failure.  stage: the last one's name."""
        if isinstance(value, Failure):
            return
        if not isinstance(value, Clip):
            raise SettingError(f"the last stage, {stage}, must publish: it must return Clip or Failure; it returned "
                               f"{type(value).__name__}. text_to_video gives such a stage, which is called publish")
        if value.uri != (wanted := self.store.uri_of(clip_key(value.request.clip_id))):
            raise SettingError(f"the stages published {value.uri}, and this run's folder has its clips as {wanted}: "
                               "make the stages with the store that the run has")

    @contextmanager
    def open(self, *, limit: int | None = None, keep_latents: bool = False, take_over: bool = False,
             wait: bool = False, reuse: Sequence[Store] = (),
             tell: Callable[[str], None] = lambda text: None) -> Iterator[Bookkeeper]:
        """This driver's hold on a folder that is this run's, until the block ends; then, if all went well, the folder
        is cleared up, and marked where no row is pending.

        limit: the most clips to make.  take_over: where another driver was heard of lately, see if it stays silent.
        wait: until one that works has ended.  reuse: other runs' folders, whose clips need not be made again.
        tell: what a person should know.  Raises LeaseError where another driver works on it, OtherRun, StoreError.
        """
        with Lease.take(self.store, wait=take_over, queue=wait, tell=tell) as lease:
            run = read_run(self.store)                  # now, since the driver before may just have written
            found = None if run is None else change(self.store, run, self.plan, changed=self.changed)
            changed = {} if found is None else found.changed
            if run is not None:
                grow(self.store, run, self.plan, changed, self.changed)
            with self.bookkeeper(limit=limit, lease=lease, tell=tell, reuse=reuse,
                                 changed=changed if self.changed == "render" else {}) as bookkeeper:
                yield bookkeeper
            self.complete(pending=bookkeeper.counts()["pending"], keep_latents=keep_latents)
            self.store.tidy(*EMPTIED)

    def bookkeeper(self, **options: Any) -> Bookkeeper:
        """What is done, to be looked at; to write it takes `open`."""
        if self.changed == "render" and self.change is not None:
            options.setdefault("changed", self.change.changed)
        return Bookkeeper(self.store, self.plan, chosen_because=self.chosen_because or None, **options)

    def compared(self) -> Change:
        """How its rows stand to those of the folder's ledger.  Raises StoreError."""
        run = read_run(self.store)
        if run is None:
            rows = self.plan.manifest.table.num_rows
            return Change(rows_before=0, rows=rows, new=self.plan.num_planned_rows)
        return self.change or compare(self.store, self.plan, known_manifest(self.store, run))

    @property
    def is_marked(self) -> bool:
        """Whether a driver has found that every row has its row in the ledger."""
        return has(self.store, SUCCESS)

    def seal(self) -> Seal:
        """What guards the intermediates of this run; for the driver that holds the folder.  Raises StoreError."""
        return seal_of(self.store, fresh=not self.has_begun)

    def complete(self, *, pending: int, keep_latents: bool) -> None:
        """Where no row is pending: remove what only a run under way needs, and mark the folder."""
        if pending:
            return
        self.clear(keep_latents)
        if not self.is_marked:
            ledger.forget_retried(self.store)
            ledger.write_success(self.store)

    def clear(self, keep_latents: bool) -> None:
        """A failed clip's latent stays: a retry need not sample again."""
        store = self.store
        for folder in (EMBEDDINGS, SAVED_STEPS):
            clear(store, [info.key for info in store.list(f"{folder}/") if intermediate_of(info.key)])
        # of drivers that were killed in the middle of a probe; later ones may be another driver's that starts now
        clear(store, [info.key for info in store.list(PROBE)
                      if PROBE_KEY.fullmatch(info.key) and info.modified_s < self.made_at])
        if keep_latents:
            return
        latents = {info.key: clip_id for info in store.list(f"{LATENTS}/") if (clip_id := intermediate_of(info.key))}
        if latents:
            rows = ledger.read(store, ["clip_id", "status"])
            statuses = zip(rows["clip_id"].to_pylist(), rows["status"].to_pylist(), strict=True)
            failed = {clip_id for clip_id, status in statuses if status == "failed"}
            clear(store, [key for key, clip_id in latents.items() if clip_id not in failed])
        drop_key(store)


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:                        # a submitted job brings dailies as a folder, not installed
        return "not installed"


def prepare(manifest: Manifest, store: Store, card: ModelCard, *, weights: str | Path | None, device: str = "cpu",
            defaults: Defaults = Defaults(), precision: str | None = None, attention: str | None = None,
            decode_precision: str | None = None, variant: str | None = None, skip_invalid: bool = False,
            strict: bool = False, allow_images: Sequence[str] = (), is_here: bool = True, changed: str | None = None,
            gpus: Callable[[], Sequence[Gpu]] = lambda: ()) -> Run:
    """The run of a manifest, with all that was left open settled: as the folder's run has it, or the model.

    weights: their folder, on this machine; None: not here, so clips have no names yet.  precision, attention: None for
    the model's own, "auto" for the fastest on `gpus`, the kinds that will do the work.  is_here: it is done on this
    machine, of which fallbacks are known before.  strict: no fallback and no rounding is taken.  changed: what is to
    become of rows that ask for something else than they did, "render" or "keep"; None: they are refused.
    The other settings are as of `Plan.make`.
    Raises SettingError, ManifestError, OtherRun, StoreError.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise SettingError(f"--device must be cpu or cuda; got {device}")
    weights = None if weights is None else locate(weights, card)
    found = read_run(store)
    if found is not None:
        check_counts(store, found)
        if run_format(found) == 1:                       # as it has named its rows
            manifest = manifest.numbered()
    before = found["identity"] if found else {}         # a run keeps its own, wherever it is continued
    way = way_of(card, weights, device, found, precision=precision, attention=attention, gpus=gpus)
    decode_precision = decode_precision or before.get("decode_precision")
    for name, value, allowed in (("precision", way.precision, card.precisions),
                                 ("attention", way.attention, card.attentions),
                                 ("decode-precision", decode_precision, (None, "fp32", "bf16"))):
        if value not in allowed and found is not None and value == before.get(name.replace("-", "_")):
            raise StoreError(f"{store.uri_of(RUN)} is damaged: its {name} is {shown(value)}. Put a copy of it back")
        if value not in allowed:
            raise SettingError(f"--{name} must be {' or '.join(filter(None, allowed))} for {card.name}; got {value}")
    on = card.runtime(device, way.precision, way.attention, decode_precision=decode_precision,
                      compiled="compiled" in (variant or "").split(", "))
    if is_here:                                         # what is refused whatever the rows are, before files are read
        family_of(card).fallbacks(card, weights, replace(on, largest=card.smallest))
    print_of = (fingerprint(weights_files(card, weights), check=lambda: check_before_reading(
                    card, weights, card.runtime("meta", way.precision))) if weights else
                before.get("weights_fingerprint", UNKNOWN_FINGERPRINT))
    plan = Plan.make(manifest, card, defaults, weights_fingerprint=print_of, precision=way.precision,
                     attention=way.attention, decode_precision=decode_precision, variant=variant,
                     skip_invalid=skip_invalid, allow_images=allow_images)
    told = family_of(card).fallbacks(plan.made_by, weights, replace(on, largest=plan.largest)) if is_here else {}
    fallbacks = tuple(note for kind, notes in told.items() if kind != "room" for note in notes)
    if strict and (fallbacks or plan.roundings):
        said = "; ".join([*fallbacks, *(f"{counted(rows, 'row')}: {note}" for note, rows in plan.roundings[:10])])
        raise SettingError(f"--strict, and not every row can be rendered as asked: {said}")
    return Run.of(store, plan, device=device, weights=weights, fallbacks=fallbacks,
                  room=tuple(told.get("room", ())), chosen_because=way.because,
                  changed=changed)


def way_of(card: ModelCard, weights: Path | None, device: str, found: Mapping[str, Any] | None, *,
           precision: str | None, attention: str | None, gpus: Callable[[], Sequence[Gpu]]) -> Way:
    """Precision and attention: as they are said, as the run that is continued has them, chosen, or the model's own.

    found: its run.json.  Raises SettingError where they are to be chosen for GPUs of several kinds.
    """
    said: dict[str, Any] = {"precision": precision, "attention": attention}
    if found:                                           # a run keeps its own, wherever it is continued
        before = found["identity"]
        said = {name: value if value not in (None, AUTO) else before.get(name) for name, value in said.items()}
        return Way(**said, because=found.get("chosen_because") or "")
    own = precision_in(card, weights, device) if weights else card.precision_on(device)
    if AUTO not in said.values():
        return Way(precision=precision or own, attention=attention or card.attentions[0], because="")
    # weights that are INT8 already run in nothing else
    fixed = None if precision == AUTO and own != "int8" else own if precision in (None, AUTO) else precision
    kinds = gpus() if device == "cuda" else ()
    if len(kinds) > 1:
        raise SettingError(f"the machines have GPUs of several kinds ({', '.join(gpu.name for gpu in kinds)}), and one "
                           "run has one precision and attention: say which, --precision NAME --attention NAME")
    gpu = kinds[0] if kinds else Gpu(name="a GPU that is not there yet", capability=None) if device == "cuda" else None
    return fastest(card, gpu, precision=fixed, attention=None if attention == AUTO else attention or card.attentions[0])
