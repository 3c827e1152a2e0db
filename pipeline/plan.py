"""What a night is: manifest rows become requests, every default resolved, in the order to render them.

The row decides, then the command line, then the model card. A clip is named by the hash of all that decides its pixels,
and rows that ask for the same clip share it. ResolvedRows stay in columns; a Request is made when it is wanted.
"""

import hashlib
import json
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

import numpy as np
import pyarrow as pa

from dailies.actors.messages import HASHED_AS, Request
from dailies.model.card import ModelCard
from dailies.model.settings import FURTHER, Scalar
from dailies.model.shapes import VideoShape
from dailies.pipeline.manifest.cells import in_hex
from dailies.pipeline.manifest.manifest import ROWS_AT_A_TIME, InvalidRow, Manifest
from dailies.pipeline.manifest.validation import ManifestError, ValidationErrors, shown
from dailies.pipeline.resolved import Defaults, ResolvedRows, first_uses, folded, num_distinct

MAX_CLIPS = 10_000_000              # of one run; a plan of this size still fits a driver's memory
RESEEDS = 2                         # other seeds that are tried for a rejected clip
LISTED_IN_SUMMARY = 50                         # of a summary's buckets and roundings
READ_FOR_WORDS = 10_000             # prompts that are read for words which the model never saw


class Except(Container[str]):
    """Everything but what is in `wanted`."""

    def __init__(self, wanted: set[str]):
        self.wanted = wanted

    def __contains__(self, item: object) -> bool:
        return item not in self.wanted


@dataclass(frozen=True, kw_only=True)
class PlannedRow:
    """A ledger row to come: a manifest row, or one of its samples."""

    row: int                        # position in the manifest
    id: str
    seed: int
    clip_id: str
    sample: int = 0                 # which of its manifest row's samples
    samples: int = 1                # how many there are
    keep: int | None = None         # of them, how many are selected, by which column
    keep_by: str | None = None
    reseed: bool = False            # where its clip is rejected, make another one


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """All that a run will render.

    Letters  R manifest rows, bad ones too  P planned rows: good rows times samples  C distinct clips
    """

    manifest: Manifest
    card: ModelCard
    defaults: Defaults              # resolved
    shared: dict[str, Any]          # what all requests have in common, by the fields of Request
    errors: ValidationErrors = field(repr=False)      # about the rows that are set aside

    rows: ResolvedRows = field(repr=False)
    roundings: list[tuple[str, int]] = field(repr=False)       # what was rounded to what, in how many good rows
    source: np.ndarray = field(repr=False)          # [P] manifest row
    seeds: np.ndarray = field(repr=False)           # [P] int64
    clip_of: np.ndarray = field(repr=False)         # [P] clip, counted in order of first appearance
    digests: np.ndarray = field(repr=False)         # [C, 32] uint8, the clip ids
    first: np.ndarray = field(repr=False)           # [C] the first planned row of each clip
    order: np.ndarray = field(repr=False)           # [C] clips as they are to be rendered
    allow_images: tuple[str, ...] = ()

    @classmethod
    def make(cls, manifest: Manifest, card: ModelCard, defaults: Defaults = Defaults(), *, weights_fingerprint: str,
             precision: str, attention: str = "dense", decode_precision: str | None = None, variant: str | None = None,
             skip_invalid: bool = False, allow_images: Sequence[str] = ()) -> "Plan":
        """Resolve, check against the model, name and order every clip. Reads the rows' images if the model takes them.

        allow_images: s3:// prefixes of images, beside the manifest's own bucket.
        skip_invalid: set bad rows aside (`invalid_rows`) and plan the others.
        Raises ManifestError with the manifest's errors and the model's; SettingError for impossible defaults;
        StoreError for images in a bucket that does not answer.
        """
        defaults = defaults.resolved(card)
        errors = manifest.errors.copy()
        rows = ResolvedRows.resolve(manifest, card, defaults, errors, allow_images)
        if len(errors) and not skip_invalid:
            raise ManifestError(manifest.name, errors)
        is_good = np.ones(manifest.table.num_rows, bool)
        is_good[list(errors.rows())] = False
        good = np.flatnonzero(is_good)
        samples = manifest.table["samples"].fill_null(1).to_numpy()[good]
        if samples.sum() > MAX_CLIPS:
            errors.about(manifest.name, "samples", f"{samples.sum():,} clips in all",
                             f"at most {MAX_CLIPS:,} in one run; split the manifest")
            raise ManifestError(manifest.name, errors)

        source = np.repeat(good, samples)
        nth_sample = np.arange(len(source)) - np.repeat(np.cumsum(samples) - samples, samples)
        seeds = _seeds(manifest.table, good)[source] + nth_sample
        if decode_precision == card.vae_precision(precision):
            decode_precision = None                     # so that the clip is the same whether it is said or not
        shared = dict(model=card.name, fps=card.fps, weights_fingerprint=weights_fingerprint, precision=precision,
                      attention=attention, decode_precision=decode_precision or None, variant=variant or None)
        encoded = _digests(rows, source, seeds, shared).dictionary_encode()
        clip_of = encoded.indices.to_numpy()
        first = first_uses(clip_of)
        digests = np.frombuffer(encoded.dictionary.buffers()[1], np.uint8, 32 * len(first)).reshape(-1, 32)
        return cls(
            manifest=manifest, card=card, defaults=defaults, shared=shared, errors=errors, rows=rows,
            allow_images=tuple(allow_images),
            roundings=_roundings(rows, good, card), source=source, seeds=seeds, clip_of=clip_of,
            first=first, order=_order(rows, source, clip_of, first), digests=digests,
        )

    def with_defaults(self, defaults: Defaults) -> "Plan":
        """The plan that the same rows have with these; bad rows are set aside.  Raises SettingError, StoreError."""
        said = {name: self.shared[name] for name in ("weights_fingerprint", "precision", "attention",
                                                     "decode_precision", "variant")}
        return Plan.make(self.manifest, self.card, defaults, skip_invalid=True, allow_images=self.allow_images, **said)

    @property
    def weights_fingerprint(self) -> str:
        return self.shared["weights_fingerprint"]

    @property
    def precision(self) -> str:
        return self.shared["precision"]

    @property
    def attention(self) -> str:
        return self.shared["attention"]

    @property
    def decode_precision(self) -> str | None:
        """Of the VAE, where it is not the model's own."""
        return self.shared["decode_precision"]

    @property
    def variant(self) -> str | None:
        return self.shared["variant"]

    @property
    def num_clips(self) -> int:
        return len(self.first)

    @property
    def num_prompts(self) -> int:
        """Distinct pairs of prompt and negative prompt."""
        return num_distinct(self.rows.prompt_pair[self.source])

    @property
    def num_images(self) -> int:
        images = self.rows.image[self.source]
        return num_distinct(images[images >= 0])

    @property
    def num_planned_rows(self) -> int:
        """Rows that the ledger will have, but for those set aside."""
        return len(self.source)

    @property
    def num_invalid_rows(self) -> int:
        return len(self.errors.rows())

    @property
    def images_digest(self) -> str | None:
        """Changes with the content of any row's image; None where no row has one."""
        rows = self.rows
        said = "".join(image.sha256 for image in rows.images).encode() + rows.image.astype("<i8").tobytes()
        return hashlib.sha256(said).hexdigest() if rows.images else None

    @cached_property
    def rows_digest(self) -> str:
        """Of what the rows ask for, whatever file they stand in, and in what order: id, seed and clip_id of each."""
        keys = self.keys().sort_by([("id", "ascending"), ("seed", "ascending")])
        hasher = hashlib.sha256()
        for batch in keys.select(["id", "seed", "clip_id"]).to_batches(max_chunksize=ROWS_AT_A_TIME):
            hasher.update("".join(f"{name}\0{seed} {clip_id}\n" for name, seed, clip_id in
                                  zip(*(column.to_pylist() for column in batch.columns), strict=True)).encode())
        for row in self.invalid_rows():
            hasher.update(f"{row.id}\0{row.error}\n".encode())
        return hasher.hexdigest()

    def requests(self, skip: Container[str] = ()) -> Iterator[Request]:
        """One Request per clip whose clip_id is not in `skip`, in the order to render them."""
        for start in range(0, self.num_clips, ROWS_AT_A_TIME):
            clips = self.order[start: start + ROWS_AT_A_TIME]
            wanted = [at for at, clip_id in enumerate(map(self._clip_id, clips)) if clip_id not in skip]
            clips = clips[wanted]
            rows = self.source[self.first[clips]]
            prompts, negatives = self.rows.prompts_of(rows), self.rows.negatives_of(rows)
            for clip, row, prompt, negative in zip(clips.tolist(), rows.tolist(), prompts, negatives, strict=True):
                yield self.rows.request(row, clip_id=self._clip_id(clip), seed=int(self.seeds[self.first[clip]]),
                                        prompt=prompt, negative_prompt=negative, **self.shared)

    def planned_rows(self, clip_id: str) -> list[PlannedRow]:
        """The ledger rows that this clip fills, in manifest order.  Raises KeyError for a clip that is not planned."""
        clip = self._clip(clip_id)
        starts, planned = self._planned_of_clip
        at = planned[starts[clip]: starts[clip + 1]]
        nth_sample = at - np.searchsorted(self.source, self.source[at])        # a row's samples are side by side
        said = self.manifest.table.select(["id", "samples", "keep", "keep_by", "on_reject"])
        found = []
        for row, seed, sample in zip(self.source[at].tolist(), self.seeds[at].tolist(), nth_sample.tolist(),
                                     strict=True):
            name, samples, keep, keep_by, on_reject = (column[row].as_py() for column in said.columns)
            found.append(PlannedRow(row=row, id=name, seed=seed, clip_id=clip_id, sample=sample, samples=samples or 1,
                                    keep=keep, keep_by=keep_by, reseed=on_reject == "reseed"))
        return found

    def keys(self) -> pa.Table:
        """Every planned row, in manifest order: id, seed and clip_id, typed as in the ledger; row, its manifest row."""
        ids, clip_ids = self.manifest.table["id"], in_hex(self.digests.tobytes(), self.digests.shape[1])
        if self.num_planned_rows != len(ids) or self.num_invalid_rows:
            ids = ids.take(self.source)
        if self.num_planned_rows != self.num_clips:    # else the n-th row has the n-th clip
            clip_ids = clip_ids.take(pa.array(self.clip_of))
        return pa.table({"id": ids.cast(pa.string()), "seed": self.seeds, "clip_id": clip_ids.cast(pa.string()),
                         "row": self.source})

    def user_columns(self, rows: Sequence[int]) -> pa.Table:
        """The user's own columns (user.NAME) of these manifest rows, in their types."""
        return self.manifest.user.take(pa.array(rows, pa.int64()))

    def invalid_rows(self) -> Iterator[InvalidRow]:
        """The rows that were set aside, for failed ledger rows with error_type=invalid."""
        return self.manifest.invalid_rows(self.errors)

    def summary(self) -> dict[str, Any]:
        """What `dailies plan` shows, ready for JSON. Seconds and cost are not in it."""
        return dict(self._summary)

    @cached_property
    def _summary(self) -> dict[str, Any]:
        buckets = self.buckets()
        return {
            "manifest": self.manifest.name,
            "manifest_digest": self.manifest.digest,
            "model": self.card.name,
            "weights_fingerprint": self.weights_fingerprint,
            "rows": self.manifest.table.num_rows,
            "invalid_rows": self.num_invalid_rows,
            "planned_rows": self.num_planned_rows,
            "clips": self.num_clips,
            "duplicates": self.num_planned_rows - self.num_clips,
            "prompts": self.num_prompts,
            "images": self.num_images,
            "settings": {**self.settings_of_rows, "fps": float(self.card.fps), "precision": self.precision,
                         "attention": self.attention, **self.said_beside},
            "buckets": buckets[:LISTED_IN_SUMMARY],
            "more_buckets": len(buckets[LISTED_IN_SUMMARY:]),
            "roundings": [{"note": note, "rows": count} for note, count in self.roundings[:LISTED_IN_SUMMARY]],
            "more_roundings": len(self.roundings[LISTED_IN_SUMMARY:]),
            "notes": [{"note": note, "rows": count} for note, count in self.notes],
            "user_columns": self.manifest.user.column_names,
            "manifest_notes": [*self.manifest.notes, *self.strange_words()],
            "complaints": self.errors.as_json(),
        }

    @property
    def made_by(self) -> ModelCard:
        """The model that its rows need: of one that makes sound, without it where every row has said so."""
        values, which = self.rows.sampling.get("audio", ([True], np.zeros(len(self.rows.height), np.int64)))
        is_heard = any(values[code] for code in np.unique(which[self.source]).tolist())
        return self.card if is_heard else self.card.without_sound()

    @property
    def largest(self) -> VideoShape | None:
        """Of its clips, the one of most pixels; None where there is none."""
        return self.rows.largest(self.source) if self.num_clips else None

    @property
    def settings_of_rows(self) -> dict[str, Scalar | None]:
        """What a row gets that does not say, of all that this model has."""
        others = {setting.name for setting in FURTHER}
        return {name: value for name, value in self.defaults.items() if value is not None or name not in others}

    @property
    def said_beside(self) -> dict[str, str]:
        """What else was asked for that decides clips, where it is not as ever."""
        return {name: self.shared[name] for name in ("decode_precision", "variant") if self.shared[name]}

    @property
    def notes(self) -> list[tuple[str, int]]:
        """What is to be known of how rows are understood, and of how many; nothing of them was changed."""
        if not self.card.guidance_note:
            return []
        values, which = self.rows.sampling["guidance"]
        own = int((np.array(values) != self.card.guidance)[which[self.source]].sum())
        return [(self.card.guidance_note, own)] if own else []

    def strange_words(self) -> list[str]:
        """A sentence about words of the prompts that the model never saw, where it knows a few words alone."""
        if not self.card.words:
            return []
        prompts = [prompt for prompt in self.rows.prompts[:READ_FOR_WORDS].to_pylist() if prompt is not None]
        strange: dict[str, None] = {}
        count = 0
        for prompt in prompts:
            found = [word for word in re.findall(r"[^\W\d_]+", prompt.lower()) if word not in self.card.words]
            strange.update(dict.fromkeys(found))
            count += bool(found)
        if not count:
            return []
        said = ", ".join(map(shown, list(strange)[:8])) + (", ..." if len(strange) > 8 else "")
        have = "have" if count > 1 else "has"
        return [f"{count:,} of {len(prompts):,} prompts {have} words that {self.card.name} never saw ({said}): it "
                f"was taught {self.card.taught}, and shows nothing else"]

    def buckets(self, only: Container[str] | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """Each bucket in the order in which its first clip is rendered.  only: these clips; limit: the first of them.
        """
        clips = self.order
        if only is not None:
            clips = clips[[self._clip_id(clip) in only for clip in clips]]
        rows = self.source[self.first[clips[:limit]]]
        _, at, counts = np.unique(self.rows.bucket[rows], return_index=True, return_counts=True)
        buckets = []
        for first, count in sorted(zip(at.tolist(), counts.tolist(), strict=True)):
            row = int(rows[first])
            shape = self.rows.shape_of(row)
            buckets.append({"width": shape.width, "height": shape.height, "frames": shape.frames, "clips": count,
                            **self.rows.sampling_of(row)})
        return buckets

    def _clip_id(self, clip: int) -> str:
        return self.digests[clip].tobytes().hex()

    def _clip(self, clip_id: str) -> int:
        heads, clips = self._clips_by_head
        digest = bytes.fromhex(clip_id)
        head = np.frombuffer(digest, ">u8", count=1).astype(np.uint64)[0]
        for clip in clips[np.searchsorted(heads, head): np.searchsorted(heads, head, side="right")]:
            if self.digests[clip].tobytes() == digest:
                return int(clip)
        raise KeyError(clip_id)

    @cached_property
    def _clips_by_head(self) -> tuple[np.ndarray, np.ndarray]:
        """The first 8 bytes of every clip id, ascending, and their clips."""
        heads = np.ascontiguousarray(self.digests[:, :8]).view(">u8").ravel().astype(np.uint64)
        clips = np.argsort(heads)
        return heads[clips], clips

    @cached_property
    def _planned_of_clip(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each clip's planned rows start in the second array, [C + 1], and the planned rows by clip, [P]."""
        starts = np.concatenate(([0], np.cumsum(np.bincount(self.clip_of, minlength=self.num_clips))))
        return starts, np.argsort(self.clip_of, kind="stable")


def _order(rows: ResolvedRows, source: np.ndarray, clip_of: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Clips by priority, then one shape after the other, one bucket after the other, one image's clips together, and of
    those one prompt's: to encode an image at a shape costs more than to encode a prompt.

    Shapes, buckets, images and prompts come in the order in which the manifest first names them.
    """
    priority = np.full(len(first), np.iinfo(np.int64).min)
    np.maximum.at(priority, clip_of, rows.priority[source])            # as urgent as the most urgent of its rows
    by_first_use = []
    for code in (rows.prompt_pair, rows.image + 1, rows.bucket, rows.shape):
        code = code[source[first]]
        by_first_use.append(first_uses(code)[code])
    return np.lexsort((np.arange(len(first)), *by_first_use, -priority))


def _seeds(table: pa.Table, good: np.ndarray) -> np.ndarray:
    """[R] each row's first seed; one that was not given comes from the row's id, so that it stays when rows move."""
    seeds = table["seed"].fill_null(0).to_numpy().copy()
    missing = good[table["seed"].is_null().to_numpy()[good]]
    for start in range(0, len(missing), ROWS_AT_A_TIME):
        rows = missing[start: start + ROWS_AT_A_TIME]
        names = table["id"].take(rows).cast(pa.large_binary()).to_pylist()
        heads = b"".join([hashlib.sha256(name).digest()[:4] for name in names])
        seeds[rows] = np.frombuffer(heads, ">u4") % 2**31
    return seeds


def _roundings(rows: ResolvedRows, good: np.ndarray, card: ModelCard) -> list[tuple[str, int]]:
    """What is not quite as asked, in how many good rows; the most frequent first."""
    counts = np.bincount(rows.note[good], minlength=len(rows.notes))
    found = [(note, int(count)) for note, count in zip(rows.notes, counts, strict=True) if note and count]
    if card.negative_unused:
        given = [bool(negative) for negative in rows.negatives.to_pylist()]
        count = int(np.array(given)[rows.negative[good]].sum())
        found += [(card.negative_unused, count)] if count else []
    return sorted(found, key=lambda noted: -noted[1])


def clip_id_for(**said: Scalar) -> str:
    """SHA-256 of the canonical JSON (keys sorted, no blanks, ASCII) of all that decides a clip's pixels.

    said: of Request.identity, by the names of HASHED_AS: attention, frames, guidance, height, model, negative_prompt,
    num_steps, precision, prompt, seed, weights_fingerprint, width; and, where they are not at their neutral values,
    what came later: `image`, the SHA-256 of the file that the clip begins with, decode_precision, variant, settings.
    """
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hashed(request: Request) -> dict[str, Scalar]:
    """What decides a request's clip, as clip_id_for takes it."""
    return {HASHED_AS.get(name, name): value for name, value in request.identity().items()}


def with_another_seed(request: Request) -> Request:
    """The clip to make when this one was rejected: the same but for its seed, which follows from this clip alone."""
    other = replace(request, seed=int(request.clip_id[:8], 16) % 2**31)
    return replace(other, clip_id=clip_id_for(**hashed(other)))


def _json_around(said: dict[str, Scalar]) -> tuple[str, str, str]:
    """The canonical JSON before the prompt, from there to the seed, and after it: the same for all clips but those two.
    """
    text = json.dumps(said | {"prompt": 0, "seed": 0}, sort_keys=True, separators=(",", ":"))
    head, _, rest = text.partition('"prompt":0')       # a quote inside a value would be escaped
    middle, _, tail = rest.partition('"seed":0')
    return f'{head}"prompt":', f'{middle}"seed":', tail


def _digests(rows: ResolvedRows, source: np.ndarray, seeds: np.ndarray, shared: dict[str, Any]) -> pa.Array:
    """The clip id of every planned row, 32 bytes each."""
    combination = folded(rows.bucket, rows.negative, rows.image)
    any_row = first_uses(combination)

    @lru_cache(maxsize=4096)
    def around(number: int) -> tuple[str, str, str]:
        row = int(any_row[number])
        negative = rows.negatives[int(rows.negative[row])].as_py()
        request = rows.request(row, clip_id="", prompt="", negative_prompt=negative, seed=0, **shared)
        return _json_around(hashed(request))

    blocks = []
    for start in range(0, len(source), ROWS_AT_A_TIME):
        at, block_seeds = source[start: start + ROWS_AT_A_TIME], seeds[start: start + ROWS_AT_A_TIME].tolist()
        texts = (f"{head}{quoted(prompt)}{middle}{seed}{tail}" for (head, middle, tail), prompt, seed in
                 zip(map(around, combination[at].tolist()), rows.prompts_of(at), block_seeds, strict=True))
        blocks.append(b"".join([hashlib.sha256(text.encode()).digest() for text in texts]))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(source), [None, pa.py_buffer(b"".join(blocks))])
