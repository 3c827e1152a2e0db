"""run.json: which run a folder holds. Written once, before anything else; another run is refused.

Its `identity` is what all its clips share: model, weights, precision, attention. Whatever else it tells, such as
versions and how the run was started, may differ when the run is continued; so may the manifest and the defaults for
rows that do not say (growth.py). A run.json without a format was written before there was one: its identity had the
defaults of its only night, and its rows without ids are known by position.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dailies.model.errors import DailiesError
from dailies.model.settings import SAMPLING
from dailies.pipeline.manifest.validation import shown
from dailies.pipeline.run.layout import MANIFESTS, RUN
from dailies.pipeline.run.masking import without_secrets
from dailies.pipeline.store import NotFound, Store, StoreError, TooLarge

RUN_FORMAT = 2
IDENTITY = ("model", "weights_fingerprint", "precision", "attention", "decode_precision", "variant")
GROWS = ("manifest_digest", "images_digest")            # in run.json the first manifest's; see growth.py
MAX_DEFAULTS = 100                      # sets of them that are remembered
MAX_RUN_JSON_BYTES = 2**22              # of it, and of what is said of a later manifest
COUNTED = ("planned_rows", "invalid_rows", "clips", "buckets", "more_buckets")      # by which progress is counted
SUMMED = ("rows", "duplicates", *COUNTED)               # what is said of a manifest
BUCKET_SHAPE = ("width", "height", "frames", *(setting.name for setting in SAMPLING))  # of one bucket
RunCount = Annotated[int, Field(strict=True, ge=0, le=10**9)]


class OtherRun(DailiesError, ValueError):
    """The folder is another run's; the message names what differs."""


class Bucket(BaseModel):
    """Clips of one shape and sampling, as run.json counts them."""

    model_config = ConfigDict(extra="allow")

    width: RunCount
    height: RunCount
    frames: RunCount
    clips: RunCount

    @model_validator(mode="after")
    def says_how_they_are_sampled(self) -> Self:
        said = self.model_extra or {}
        for setting in SAMPLING:
            value, kinds = said.get(setting.name), (int, float) if setting.type is float else (setting.type,)
            if value is None and not setting.field:
                continue                                # of some models alone
            if value is None or type(value) not in kinds or (
                    setting.type in (int, float) and not min(0, setting.low) <= value <= 10**9):
                raise ValueError(f"{setting.name} must be {setting.allowed}; got {shown(value)}")
        return self


Scalars = dict[str, None | bool | int | float | str]


class RunFile(BaseModel):
    """What of run.json is read again, where it is there; the rest is for people."""

    model_config = ConfigDict(extra="allow")

    identity: Scalars
    defaults: Scalars = {}
    earlier_defaults: Annotated[list[Scalars], Field(max_length=MAX_DEFAULTS)] = []
    changed: Literal["render", "keep"] | None = None
    rows: RunCount = 0
    planned_rows: RunCount = 0
    invalid_rows: RunCount = 0
    clips: RunCount = 0
    more_buckets: RunCount = 0
    buckets: Annotated[list[Bucket], Field(max_length=10_000)] = []
    chosen_because: Annotated[str, Field(max_length=10_000)] | None = None


def claim_run(store: Store, identity: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Make the folder this run's, or find that it is; returns run.json as it stands.

    identity, about: JSON values. What looks like a secret is removed from both.
    Raises OtherRun when the folder is another run's, also if that one was a moment faster; StoreError.
    """
    run = without_secrets({"identity": dict(identity), **about})
    store.create(RUN, json.dumps(run, indent=2, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
    found = read_run(store)
    if found is None:
        raise OtherRun(f"{store.uri_of(RUN)} was removed while this run began. Start it again")
    check_run(store, found, identity)
    return found


def read_run(store: Store) -> dict[str, Any] | None:
    """run.json, None where no run has begun.  Raises OtherRun for what is not ours; StoreError for a damaged one."""
    try:
        found = json.loads(store.get(RUN, at_most=MAX_RUN_JSON_BYTES))
    except NotFound:
        return None
    except TooLarge as error:
        raise StoreError(f"{store.uri_of(RUN)} is no run.json: it is too large ({error})") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("identity"), dict):
        raise OtherRun(f"{store.uri_of(RUN)} is not one that dailies wrote. Choose another output folder")
    try:
        RunFile.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][:4]))
        raise damaged(store, f"{shown(name)}: {first['msg']}") from None
    return found


def check_counts(store: Store, run: Mapping[str, Any]) -> None:
    """Raises StoreError where run.json lacks what a run's progress is counted by."""
    if absent := [name for name in COUNTED if name not in run]:
        raise damaged(store, f"it does not say {', '.join(absent)}")


def damaged(store: Store, why: str) -> StoreError:
    return StoreError(f"{store.uri_of(RUN)} is damaged: {why}. Put a copy of it back, or move it away and give the "
                      "command that began the run: what is published is found")


def has(store: Store, key: str) -> bool:
    """Whether there is such an object; reads nothing of it."""
    return any(info.key == key for info in store.list(key))


def known_manifest(store: Store, run: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder was rendered for last, and how much that is in all: run.json, or the latest of manifests/.

    Raises StoreError for one that is damaged.
    """
    said: dict[str, Any] = dict.fromkeys(SUMMED, 0) | {"buckets": [], "earlier_defaults": [], "changed": None}
    said |= {name: run[name] for name in (*SUMMED, "rows_digest") if name in run}
    said |= {name: run.get(name, run["identity"].get(name)) for name in GROWS}
    said["defaults"] = run.get("defaults") or run["identity"]
    if not (keys := sorted(info.key for info in store.list(f"{MANIFESTS}/"))):
        return said
    try:
        latest = json.loads(store.get(keys[-1], at_most=MAX_RUN_JSON_BYTES))
        if not {*SUMMED, *GROWS, "rows_digest"} <= latest.keys():
            raise ValueError
        RunFile.model_validate(latest | {"identity": {}})
    except (NotFound, TooLarge, ValueError, AttributeError, RecursionError):
        raise StoreError(f"{store.uri_of(keys[-1])} is damaged, or not one that dailies wrote. Move it away, and give "
                         "the command with the manifest again") from None
    return said | latest | {"is_recorded": True}


def run_format(run: Mapping[str, Any]) -> int:
    """Of a run.json as it stands.  Raises OtherRun for one of a newer version."""
    found = run["identity"].get("format", 1)
    if not isinstance(found, int) or found > RUN_FORMAT:
        raise OtherRun(f"this run folder has format {shown(found)}, which a newer dailies wrote; this one knows "
                       f"{RUN_FORMAT}. Continue it with that version")
    return found


def check_run(store: Store, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises OtherRun, naming all that differs, unless `found` is the run of this identity."""
    before, now = without_secrets(found["identity"]), json.loads(json.dumps(without_secrets(identity)))
    run_format(found)
    differing = [f"{name} was {before.get(name)}, is {now.get(name)}"
                 for name in IDENTITY if before.get(name) != now.get(name)]
    if differing:
        raise OtherRun(f"{store.uri} holds another run: {'; '.join(differing)}. Choose another output folder, "
                       "or repeat that run's command to continue it")
