"""A row of the ledger: its columns, written once, and what stands in them.

A stage's seconds stand under encode_s, sample_s, decode_s and publish_s, as the contract names them, and those of a
stage of any other name under seconds.NAME, in the parts of runs that have one. To add a column: an entry in TABLE, and
its value where the row is made.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dailies.model.settings import FURTHER, SAMPLING, Setting
from dailies.pipeline.run.layout import clip_key
from dailies.pipeline.run.masking import without_secrets

if TYPE_CHECKING:                       # they need torch, and `dailies status` does not
    from dailies.actors.messages import Clip, Failure
    from dailies.pipeline.stages import Outcome

MAX_ERROR_CHARACTERS = 4000
DETERMINED = ("encode", "sample", "decode")            # the stages on which a clip's last bits depend
OTHER_STAGES = "seconds."               # before the name of a stage that has no column of its own
ALL_MEASURES = "quality.*"
DAMAGED = "ClipDamaged"                 # error_type of a clip that was done, and is to be made again
ALL_OTHER_STAGES = OTHER_STAGES + "*"   # to be asked for in place of names


@dataclass(frozen=True)
class Column:
    """What a reader believes of a column."""

    type: pa.DataType
    most: float | None = None           # of numbers that have limits
    least: float = 0


STRING, STRINGS, BOOLEAN = Column(pa.string()), Column(pa.list_(pa.string())), Column(pa.bool_())
COUNT, INTEGERS, MEASURE = Column(pa.int32(), most=2**31), Column(pa.int64(), most=2**63 - 1), Column(pa.float64())
DURATION = Column(pa.float64(), most=1e10)


def column_of(setting: Setting) -> Column:
    """A row setting's."""
    if setting.type in (str, bool):
        return STRING if setting.type is str else BOOLEAN
    kind, most = (pa.float64(), 1e6) if setting.type is float else (pa.int32(), 2**31)
    return Column(kind if setting.high <= most else pa.int64(), most=max(most, setting.high), least=min(0, setting.low))


TABLE: dict[str, Column] = {
    "id": STRING, "clip_id": STRING, "status": STRING,                       # as of ledger_part.STATUSES
    "uri": STRING, "sha256": STRING, "bytes": INTEGERS,
    "width": COUNT, "height": COUNT, "frames": COUNT, "fps": Column(pa.float64(), most=1e6), "duration_s": DURATION,
    "has_audio": BOOLEAN, "seed": INTEGERS, "prompt": STRING, "negative_prompt": STRING,
    **{setting.name: column_of(setting) for setting in SAMPLING if setting.field},
    "model": STRING, "weights_fingerprint": STRING, "precision": STRING, "attention": STRING, "fallbacks": STRINGS,
    "attempts": COUNT, "error_type": STRING, "error": STRING, "worker": STRING, "device": STRING,
    "queue_s": DURATION, "encode_s": DURATION, "sample_s": DURATION, "decode_s": DURATION, "publish_s": DURATION,
    "peak_memory_bytes": Column(pa.int64()), "finished_at": Column(pa.timestamp("us", tz="UTC")),
    "gpu_s": DURATION,                                  # of all stages: on a GPU; null on CPUs
    # of the gate (gate.py), and of the clip that was decoded again; null for clips that were found published
    "quality.verdict": STRING, "quality.brightness": MEASURE, "quality.contrast": MEASURE, "quality.motion": MEASURE,
    "quality.flicker": MEASURE, "quality.psnr_db": MEASURE, "quality.audio_peak": MEASURE,
    "quality.audio_clipped": MEASURE, "quality.audio_rms": MEASURE, "quality.audio_dc": MEASURE,
    "quality.audio_correlation": MEASURE,              # of the clip that was decoded again with the sound that was made
    "quality.seed": Column(pa.int64()),                # what the clip was made with, if not with the row's own seed
    "decode_precision": STRING,                          # of the VAE, where it is not the model's own
    "chosen_because": STRING,                            # why this precision and attention, where they were left to us
    # what the last bits depend on beside clip_id (actors/determinism.py); null for clips that were found published
    "determinism": STRING,
    "path": STRING,                                      # of the clip, below the run folder
    "sample": COUNT,                                   # of its manifest row, from 0
    "notes": STRINGS,                                    # what was found in the run folder: used, or made again
    "earlier_errors": STRINGS,                           # of a row that failed and was tried again, the oldest first
    "audio_padding_ms": MEASURE,                         # silence behind the sound that was made; below 0, what was cut
    "replaces": STRING,                                  # the clip that this row's is in place of
    "take_of": INTEGERS,                                 # of another take: the seed of the manifest's row
    "samples": COUNT,                                    # of its manifest row, in all
    "keep": COUNT, "keep_by": STRING,                    # of them how many are selected, and by which column
    "image": STRING, "image_sha256": STRING,             # the first frame that was asked for
    **{setting.name: column_of(setting) for setting in FURTHER},
}
COLUMNS = pa.schema({name: column.type for name, column in TABLE.items()})


def limited(name: str) -> Column | None:
    """What limits the numbers of a column, also of one that another version wrote; None where nothing does."""
    if name in TABLE:
        return TABLE[name] if TABLE[name].most is not None else None
    is_seconds = name.startswith(OTHER_STAGES) or name.endswith("_s") and not name.startswith("user.")
    return DURATION if is_seconds else None


def seconds_column(stage: str) -> str:
    """Where the seconds of a stage stand."""
    return f"{stage}_s" if stage in ("encode", "sample", "decode", "publish") else f"{OTHER_STAGES}{stage}"


def is_of_some(name: str) -> bool:
    """Whether a column by this name is in some ledgers and not in others: a user's, or a stage's, or a measure."""
    return name.startswith(("user.", OTHER_STAGES, ALL_MEASURES[:-1]))


def there(asked: Iterable[str], names: Sequence[str]) -> Iterator[str]:
    """Of the columns that are asked for, those that there are.  names: of a part or a table."""
    for name in asked:
        if name in (ALL_OTHER_STAGES, ALL_MEASURES):
            yield from (each for each in names if each.startswith(name[:-1]))
        elif name in names:
            yield name


def row_of(name: str, value: "Clip | Failure", outcome: "Outcome | None" = None, *,
           seed: int | None = None) -> dict[str, Any]:
    """The ledger row of manifest row `name` for what became of its request.

    outcome: None for a clip that was found published, whose times nobody knows.  seed: the row's, where that is not the
    request's because a clip with the row's own was rejected.
    """
    request = value.request
    seed = request.seed if seed is None else seed
    row: dict[str, Any] = {column: said for column, said in request.identity().items() if column in TABLE}
    row |= {"id": name, "clip_id": request.clip_id, "seed": seed, "fps": float(request.fps),
            "finished_at": datetime.now(UTC)}
    row |= request.settings
    if request.image is not None:
        row["image"] = request.image.uri
    if hasattr(value, "error_type"):
        failure: Any = value                            # known by this, since its class would bring torch
        row |= {"status": "failed", "error_type": failure.error_type, "fallbacks": [],
                "error": stored_error(failure.error) + (f" [stack {failure.stack}]" if failure.stack else "")}
    else:
        row |= {"status": "done", "uri": value.uri, "sha256": value.sha256, "bytes": value.num_bytes,
                "duration_s": value.duration_s, "has_audio": value.has_audio,
                "audio_padding_ms": value.audio_padding_ms, "fallbacks": list(value.fallbacks),
                "determinism": class_of(value.determinism), "path": clip_key(request.clip_id)}
    row |= {f"quality.{name}": measure for name, measure in value.quality.items()}
    if request.seed != seed:
        row["quality.seed"] = request.seed
        row["fallbacks"] = [*row["fallbacks"], f"rejected with seed {seed}, and made with seed {request.seed}"]
    notes = [*getattr(value, "notes", ()), *(outcome.notes if outcome is not None else ())]
    row |= {"notes": notes} if notes else {}
    if outcome is not None:
        row |= {"attempts": outcome.attempts, "queue_s": outcome.queue_s, "worker": outcome.worker,
                "device": outcome.device, "peak_memory_bytes": outcome.peak_memory_bytes, "gpu_s": outcome.gpu_s}
        row |= {seconds_column(stage): seconds for stage, seconds in outcome.seconds.items()}
    return row


def class_of(stages: Sequence[str]) -> str | None:
    """The determinism class of a clip whose stages had these; None where nobody knows."""
    if len(set(stages)) < 2:
        return next(iter(stages), None)
    return "; ".join(f"{stage}: {of_stage}" for stage, of_stage in zip(DETERMINED, stages, strict=False))


def invalid_row(name: str, prompt: str | None, error: str) -> dict[str, Any]:
    """The ledger row of a manifest row that was set aside: it has no seed, because it has no request."""
    return {"id": name, "status": "failed", "error_type": "invalid", "error": stored_error(error), "prompt": prompt,
            "fallbacks": [], "finished_at": datetime.now(UTC)}


def stored_error(text: str) -> str:
    """An error's text as it can be stored: valid UTF-8, without secrets, and not a whole log."""
    text = without_secrets(text.encode("utf-8", "replace").decode())
    return text if len(text) <= MAX_ERROR_CHARACTERS else text[:MAX_ERROR_CHARACTERS - 1] + "…"
