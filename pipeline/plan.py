"""What a night is: manifest rows become requests, every default resolved, in the order to render them.

The row decides, then the command line, then the model card. A clip is named by the hash of all that decides its pixels,
and rows that ask for the same clip share it. Rows stay in columns; a Request is made when it is wanted.
"""

import hashlib
import json
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dailies.actors.messages import FirstFrame, Request
from dailies.model.catalog import ModelCard
from dailies.model.shapes import VideoShape
from dailies.pipeline.manifest.images import ALLOWED_IMAGE, FoundImage, find_images, folder_of
from dailies.pipeline.manifest.manifest import MAX_PROMPT_BYTES, InvalidRow, Manifest, rows_without
from dailies.pipeline.manifest.validation import Complaints, ManifestError, shown

MAX_CLIPS = 10_000_000              # of one run; a plan of this size still fits a driver's memory
BLOCK = 4096                        # rows that live as Python objects at a time
RESEEDS = 2                         # other seeds that are tried for a rejected clip
LISTED = 50                         # of a summary's buckets and roundings
READ_FOR_WORDS = 10_000             # prompts that are read for words which the model never saw


class Except(Container[str]):
    """Everything but what is in `wanted`."""

    def __init__(self, wanted: set[str]):
        self.wanted = wanted

    def __contains__(self, item: object) -> bool:
        return item not in self.wanted


class Defaults(BaseModel):
    """What the command line says for rows that do not; None leaves it to the model card."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resolution: str | None = None
    duration_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    frames: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    guidance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    negative_prompt: str | None = Field(default=None, max_length=MAX_PROMPT_BYTES)

    @model_validator(mode="after")
    def say_one_length(self) -> "Defaults":
        if self.duration_s is not None and self.frames is not None:
            raise ValueError(f"give duration_s or frames, not both; got {self.duration_s} and {self.frames}")
        return self

    def resolved(self, card: ModelCard) -> "Defaults":
        """With the card's values for what is None.  Raises ValueError for what this model cannot do."""
        has_length = self.duration_s is not None or self.frames is not None
        said = Defaults(
            resolution=card.resolution if self.resolution is None else self.resolution,
            duration_s=self.duration_s if has_length else card.duration_s,
            frames=self.frames,
            steps=card.num_steps if self.steps is None else self.steps,
            guidance=card.guidance if self.guidance is None else self.guidance,
            negative_prompt=card.negative_prompt if self.negative_prompt is None else self.negative_prompt,
        )
        card.shape_for(said.resolution, said.duration_s, said.frames)
        for name, most in (("steps", card.max_steps), ("guidance", card.max_guidance)):
            if getattr(said, name) > most:
                raise ValueError(f"{name} must be at most {most:g} for {card.name}; got {getattr(said, name):g}")
        return said


@dataclass(frozen=True, kw_only=True)
class PlannedRow:
    """A ledger row to come: a manifest row, or one of its samples."""

    row: int                        # position in the manifest
    id: str
    seed: int
    clip_id: str
    sample: int = 0                 # which of its manifest row's samples
    reseed: bool = False            # where its clip is rejected, make another one


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """All that a run will render.

    Letters  R manifest rows, bad ones too  P planned rows: good rows times samples  C distinct clips
    """

    manifest: Manifest
    card: ModelCard
    defaults: Defaults              # resolved
    weights_fingerprint: str
    precision: str
    attention: str
    decode_precision: str | None    # of the VAE, where it is not the model's own
    variant: str | None             # as a request has it
    complaints: Complaints = field(repr=False)      # about the rows that are set aside

    rows: "_Rows" = field(repr=False)
    roundings: list[tuple[str, int]] = field(repr=False)       # what was rounded to what, in how many good rows
    source: np.ndarray = field(repr=False)          # [P] manifest row
    seeds: np.ndarray = field(repr=False)           # [P] int64
    clip_of: np.ndarray = field(repr=False)         # [P] clip, counted in order of first appearance
    digests: np.ndarray = field(repr=False)         # [C, 32] uint8, the clip ids
    first: np.ndarray = field(repr=False)           # [C] the first planned row of each clip
    order: np.ndarray = field(repr=False)           # [C] clips as they are to be rendered

    @classmethod
    def make(cls, manifest: Manifest, card: ModelCard, defaults: Defaults = Defaults(), *, weights_fingerprint: str,
             precision: str, attention: str = "dense", decode_precision: str | None = None, variant: str | None = None,
             skip_invalid: bool = False, allow_images: Sequence[str] = ()) -> "Plan":
        """Resolve, check against the model, name and order every clip. Reads the rows' images if the model takes them.

        allow_images: s3:// prefixes of images, beside the manifest's own bucket.
        skip_invalid: set bad rows aside (`invalid_rows`) and plan the others.
        Raises ManifestError with the manifest's complaints and the model's; ValueError for impossible defaults;
        StoreError for images in a bucket that does not answer.
        """
        defaults = defaults.resolved(card)
        complaints = manifest.complaints.copy()
        rows = _Rows.resolve(manifest, card, defaults, complaints, allow_images)
        if len(complaints) and not skip_invalid:
            raise ManifestError(manifest.name, complaints)
        is_good = np.ones(manifest.table.num_rows, bool)
        is_good[list(complaints.rows())] = False
        good = np.flatnonzero(is_good)
        samples = manifest.table["samples"].fill_null(1).to_numpy()[good]
        if samples.sum() > MAX_CLIPS:
            complaints.about(manifest.name, "samples", f"{samples.sum():,} clips in all",
                             f"at most {MAX_CLIPS:,} in one run; split the manifest")
            raise ManifestError(manifest.name, complaints)

        source = np.repeat(good, samples)
        nth_sample = np.arange(len(source)) - np.repeat(np.cumsum(samples) - samples, samples)
        seeds = _seeds(manifest.table, good)[source] + nth_sample
        if decode_precision == card.vae_precision(precision):
            decode_precision = None                     # so that the clip is the same whether it is said or not
        model = dict(model=card.name, weights_fingerprint=weights_fingerprint, precision=precision, attention=attention)
        model |= {"decode_precision": decode_precision} if decode_precision else {}
        model |= {"variant": variant} if variant else {}
        encoded = _digests(rows, source, seeds, model).dictionary_encode()
        clip_of = encoded.indices.to_numpy()
        first = np.unique(clip_of, return_index=True)[1]
        counts = np.bincount(rows.note[good], minlength=len(rows.notes))
        roundings = [(note, int(count)) for note, count in zip(rows.notes, counts) if note and count]
        if card.negative_unused:
            given = [bool(negative) for negative in rows.negatives.to_pylist()]
            count = int(np.array(given)[rows.negative[good]].sum())
            roundings += [(card.negative_unused, count)] if count else []
        roundings.sort(key=lambda noted: -noted[1])
        return cls(
            manifest=manifest, card=card, defaults=defaults, weights_fingerprint=weights_fingerprint,
            precision=precision, attention=attention, decode_precision=decode_precision, variant=variant,
            complaints=complaints, rows=rows, roundings=roundings, source=source, seeds=seeds, clip_of=clip_of,
            first=first, order=_order(rows, source, clip_of, first),
            digests=np.frombuffer(b"".join(encoded.dictionary.to_pylist()), np.uint8).reshape(-1, 32),
        )

    @property
    def num_clips(self) -> int:
        return len(self.first)

    @property
    def num_prompts(self) -> int:
        """Distinct pairs of prompt and negative prompt."""
        return len(np.unique(self.rows.prompt_pair[self.source]))

    @property
    def num_images(self) -> int:
        return len(np.unique(self.rows.image[self.source])) if self.card.takes_image else 0

    @property
    def num_planned_rows(self) -> int:
        """Rows that the ledger will have, but for those set aside."""
        return len(self.source)

    @property
    def num_invalid_rows(self) -> int:
        return len(self.complaints.rows())

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
        for batch in keys.select(["id", "seed", "clip_id"]).to_batches(max_chunksize=BLOCK):
            hasher.update("".join(f"{name}\0{seed} {clip_id}\n" for name, seed, clip_id in
                                  zip(*(column.to_pylist() for column in batch.columns), strict=True)).encode())
        for row in self.invalid_rows():
            hasher.update(f"{row.id}\0{row.error}\n".encode())
        return hasher.hexdigest()

    def requests(self, skip: Container[str] = ()) -> Iterator[Request]:
        """One Request per clip whose clip_id is not in `skip`, in the order to render them."""
        for start in range(0, self.num_clips, BLOCK):
            clips = self.order[start: start + BLOCK]
            wanted = [at for at, clip_id in enumerate(map(self._clip_id, clips)) if clip_id not in skip]
            clips = clips[wanted]
            rows = self.source[self.first[clips]]
            prompts, negatives = self.rows.prompts_of(rows), self.rows.negatives_of(rows)
            for clip, row, prompt, negative in zip(clips.tolist(), rows.tolist(), prompts, negatives):
                yield Request(
                    clip_id=self._clip_id(clip), model=self.card.name, weights_fingerprint=self.weights_fingerprint,
                    prompt=prompt, negative_prompt=negative, seed=int(self.seeds[self.first[clip]]),
                    shape=self.rows.shape_of(row), fps=self.card.fps, num_steps=int(self.rows.steps[row]),
                    guidance=float(self.rows.guidance[row]), precision=self.precision, attention=self.attention,
                    image=self.rows.first_frame_of(row), decode_precision=self.decode_precision, variant=self.variant)

    def rows_of(self, clip_id: str) -> list[PlannedRow]:
        """The ledger rows that this clip fills, in manifest order.  Raises KeyError for a clip that is not planned."""
        clip = self._clip(clip_id)
        starts, planned = self._planned_of_clip
        ids, on_reject = self.manifest.table["id"], self.manifest.table["on_reject"]
        at = planned[starts[clip]: starts[clip + 1]]
        samples = at - np.searchsorted(self.source, self.source[at])           # a row's samples are side by side
        return [PlannedRow(row=row, id=ids[row].as_py(), seed=seed, clip_id=clip_id, sample=sample,
                           reseed=on_reject[row].as_py() == "reseed")
                for row, seed, sample in zip(self.source[at].tolist(), self.seeds[at].tolist(), samples.tolist())]

    def keys(self) -> pa.Table:
        """Every planned row, in manifest order: id, seed and clip_id, typed as in the ledger; row, its manifest row."""
        names = self.digests.tobytes().hex().encode()
        offsets = np.arange(0, len(names) + 1, 64, dtype=np.int32)
        clip_ids = pa.StringArray.from_buffers(self.num_clips, pa.py_buffer(offsets), pa.py_buffer(names))
        return pa.table({"id": self.manifest.table["id"].take(self.source).cast(pa.string()), "seed": self.seeds,
                         "clip_id": clip_ids.take(pa.array(self.clip_of)), "row": self.source})

    def user_columns(self, rows: Sequence[int]) -> pa.Table:
        """The user's own columns (user.NAME) of these manifest rows, in their types."""
        return self.manifest.user.take(pa.array(rows, pa.int64()))

    def invalid_rows(self) -> Iterator[InvalidRow]:
        """The rows that were set aside, for failed ledger rows with error_type=invalid."""
        return self.manifest.invalid_rows(self.complaints)

    def summary(self) -> dict[str, Any]:
        """What `dailies plan` shows, ready for JSON. Seconds and cost are not in it."""
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
            "settings": self.defaults.model_dump() | {"fps": self.card.fps, "precision": self.precision,
                                                      "attention": self.attention}
            | ({"decode_precision": self.decode_precision} if self.decode_precision else {})
            | ({"variant": self.variant} if self.variant else {}),
            "buckets": buckets[:LISTED],
            "more_buckets": len(buckets[LISTED:]),
            "roundings": [{"note": note, "rows": count} for note, count in self.roundings[:LISTED]],
            "more_roundings": len(self.roundings[LISTED:]),
            "notes": [{"note": note, "rows": count} for note, count in self.notes],
            "user_columns": self.manifest.user.column_names,
            "manifest_notes": [*self.manifest.notes, *self.strange_words()],
            "complaints": self.complaints.as_json(),
        }

    @property
    def notes(self) -> list[tuple[str, int]]:
        """What is to be known of how rows are understood, and of how many; nothing of them was changed."""
        own = int((self.rows.guidance[self.source] != self.card.guidance).sum()) if self.card.guidance_note else 0
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
        for first, count in sorted(zip(at.tolist(), counts.tolist())):
            row = int(rows[first])
            shape = self.rows.shape_of(row)
            buckets.append({"width": shape.width, "height": shape.height, "frames": shape.frames, "clips": count,
                            "steps": int(self.rows.steps[row]), "guidance": float(self.rows.guidance[row])})
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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """What each manifest row asks for, in columns [R]; meaningless for a bad row."""

    height: np.ndarray
    width: np.ndarray
    frames: np.ndarray
    steps: np.ndarray
    guidance: np.ndarray
    priority: np.ndarray
    note: np.ndarray                # index into `notes`
    notes: list[str]                # how a duration or frame count was rounded; "" where it was not
    prompt: np.ndarray              # index into `prompts`
    negative: np.ndarray            # index into `negatives`
    image: np.ndarray               # index into `images`; -1: none
    prompts: pa.Array
    negatives: pa.Array
    images: list[FoundImage]        # distinct by content

    @classmethod
    def resolve(cls, manifest: Manifest, card: ModelCard, defaults: Defaults, complaints: Complaints,
                allow_images: Sequence[str]) -> "_Rows":
        """Put in the defaults, and add to `complaints` what this model cannot do."""
        table = manifest.table
        resolutions = table["resolution"].fill_null(defaults.resolution)
        sizes, size = _asked_of_card(resolutions, "resolution", card.size_for, complaints)
        images, image = _images(manifest, card, complaints, allow_images)
        if images:
            sizes, size = _sizes_for_images(resolutions, images, image, card, complaints)
        height, width = np.array([found or (0, 0) for found in sizes])[size].T

        lengths: list[tuple[int, str | None]] = [(0, None)]
        length = np.zeros(table.num_rows, np.int64)                    # 0: neither given
        for name in ("duration_s", "frames"):
            found, at = _asked_of_card(table[name], name, lambda value: card.frames_for(**{name: value}), complaints)
            length = np.where(at >= 0, at + len(lengths), length)
            lengths += [answer or (0, None) for answer in found]
        lengths[0] = card.frames_for(defaults.duration_s, defaults.frames)
        notes = list(dict.fromkeys(["", *(note for _, note in lengths if note)]))
        note_of = {note: at for at, note in enumerate(notes)}

        steps = table["steps"].fill_null(defaults.steps).to_numpy()
        guidance = table["guidance"].fill_null(defaults.guidance).to_numpy() + 0.0     # makes 0.0 of -0.0
        for name, values, most in (("steps", steps, card.max_steps), ("guidance", guidance, card.max_guidance)):
            rows = np.flatnonzero(values > most)
            given = [shown(value) for value in values[rows].tolist()]
            complaints.add(rows, name, given, f"at most {most:g} for {card.name}")

        prompts, prompt = _encoded(table["prompt"])
        negatives, negative = _encoded(table["negative_prompt"].fill_null(defaults.negative_prompt))
        return cls(
            height=height, width=width, frames=np.array([frames for frames, _ in lengths])[length],
            note=np.array([note_of[note or ""] for _, note in lengths])[length], notes=notes,
            steps=steps, guidance=guidance, priority=table["priority"].fill_null(0).to_numpy(),
            prompt=prompt, negative=negative, image=image, prompts=prompts, negatives=negatives, images=images)

    def shape_of(self, row: int) -> VideoShape:
        return VideoShape(frames=int(self.frames[row]), height=int(self.height[row]), width=int(self.width[row]))

    def first_frame_of(self, row: int) -> FirstFrame | None:
        found = self.images[self.image[row]] if self.image[row] >= 0 else None
        return FirstFrame(sha256=found.sha256, uri=found.uri) if found else None

    def prompts_of(self, rows: np.ndarray) -> list[str]:
        return self.prompts.take(pa.array(self.prompt[rows])).to_pylist()

    def negatives_of(self, rows: np.ndarray) -> list[str]:
        return self.negatives.take(pa.array(self.negative[rows])).to_pylist()

    @cached_property
    def prompt_pair(self) -> np.ndarray:
        """One number per pair of prompt and negative prompt."""
        return _folded(self.prompt, self.negative)

    @cached_property
    def shape(self) -> np.ndarray:
        """One number per shape."""
        return _folded(self.height, self.width, self.frames)

    @cached_property
    def bucket(self) -> np.ndarray:
        """One number per bucket: shape, steps and guidance."""
        return _folded(self.shape, self.steps, np.unique(self.guidance, return_inverse=True)[1])


def _encoded(values: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """The distinct values, and which of them each row has, -1 for null."""
    encoded = values.combine_chunks().dictionary_encode()
    return encoded.dictionary, encoded.indices.fill_null(-1).to_numpy()


def _asked_of_card(values: pa.ChunkedArray, column: str, ask: Callable[[Any], Any],
                   complaints: Complaints) -> tuple[list, np.ndarray]:
    """ask(value) of each distinct value, None where it was refused with ValueError, and which of them each row has."""
    distinct, code = _encoded(values)
    answers, refused = [], {}
    for value in distinct.to_pylist():
        try:
            answers.append(ask(value))
        except ValueError as error:
            refused[len(answers)] = shown(value), _rule(error, column)
            answers.append(None)
    _complain(refused, code, column, complaints)
    return answers, code


def _rule(error: ValueError, column: str) -> str:
    """What is allowed, of a refusal; what came is said by the complaint."""
    return str(error).partition("; got ")[0].removeprefix(f"{column} must be ")


def _complain(refused: Mapping[int, tuple[str, str]], code: np.ndarray, column: str, complaints: Complaints) -> None:
    """Of every row whose code is in `refused`: what was given, what is allowed."""
    by_rule: dict[str, list[int]] = {}
    for row in np.flatnonzero(np.isin(code, list(refused))).tolist() if refused else ():
        by_rule.setdefault(refused[int(code[row])][1], []).append(row)
    for rule, rows in by_rule.items():
        complaints.add(rows, column, [refused[int(code[row])][0] for row in rows], rule)


def _images(manifest: Manifest, card: ModelCard, complaints: Complaints,
            allowed: Sequence[str]) -> tuple[list[FoundImage], np.ndarray]:
    """The images, distinct by content, and which of them each row has, -1 for none or one that was refused."""
    names, name = _encoded(manifest.table["image"])
    if not card.takes_image:
        rule = f"nothing: {card.name} makes video from text alone"
        _complain({code: (shown(given), rule) for code, given in enumerate(names.to_pylist())},
                  name, "image", complaints)
        return [], np.full(len(name), -1)
    rows = rows_without(manifest.table["image"], "image", complaints)
    complaints.add(rows, "image", ["nothing"] * len(rows), f"{ALLOWED_IMAGE}: {card.name} makes video from an image")

    folders = [folder_of(file) for file, _ in manifest.files]
    number_of = {folder: number for number, folder in enumerate(folders)}
    file = np.searchsorted([first for _, first in manifest.files], np.arange(len(name)), side="right") - 1
    place = _folded(np.array([number_of[folder] for folder in folders])[file], name)
    place[name < 0] = -1
    places, at = np.unique(place[place >= 0], return_index=True)
    rows = np.flatnonzero(place >= 0)[at]
    given = names.take(pa.array(name[rows])).to_pylist()
    found = find_images([(folders[file[row]], said) for row, said in zip(rows, given, strict=True)], allowed)

    images: dict[str, FoundImage] = {}
    refused: dict[int, tuple[str, str]] = {}
    for code, said, image in zip(places.tolist(), given, found, strict=True):
        if isinstance(image, FoundImage):
            images.setdefault(image.sha256, image)
        else:
            refused[code] = f"{shown(said)}: {image}", ALLOWED_IMAGE
    _complain(refused, place, "image", complaints)
    number_of = {sha256: number for number, sha256 in enumerate(images)}
    number = np.full(len(name) + 1, -1)                # of each place; the last is for none
    number[places] = [number_of[image.sha256] if isinstance(image, FoundImage) else -1 for image in found]
    return list(images.values()), number[place]


def _sizes_for_images(resolutions: pa.ChunkedArray, images: list[FoundImage], image: np.ndarray, card: ModelCard,
                      complaints: Complaints) -> tuple[list[tuple[int, int] | None], np.ndarray]:
    """Sizes (height, width), None for a bad row, and which each row has. What a clip cannot be is complained of."""
    names, name = _encoded(resolutions)
    pair = _folded(name, image)
    sizes: list[tuple[int, int] | None] = []
    refused: dict[int, tuple[str, str]] = {}
    for code, row in enumerate(np.unique(pair, return_index=True)[1].tolist()):
        sizes.append(None)
        if image[row] < 0:
            continue
        resolution, size = names[int(name[row])].as_py(), images[image[row]].size
        with suppress(ValueError):
            card.size_for(resolution)                  # if not, that was said of the resolution
            try:
                sizes[-1] = card.size_for_image(resolution, size.height, size.width)
            except ValueError as error:
                refused[code] = f"{size.width}x{size.height} pixels", _rule(error, "image")
    _complain(refused, pair, "image", complaints)
    return sizes, pair


def _folded(*columns: np.ndarray) -> np.ndarray:
    """One number per distinct combination of integers, from 0."""
    folded = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        code = np.unique(column, return_inverse=True)[1]
        folded = np.unique(folded * (code.max(initial=0) + 1) + code, return_inverse=True)[1]
    return folded


def _order(rows: _Rows, source: np.ndarray, clip_of: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Clips by priority, then one shape after the other, one bucket after the other, one image's clips together, and of
    those one prompt's: to encode an image at a shape costs more than to encode a prompt.

    Shapes, buckets, images and prompts come in the order in which the manifest first names them.
    """
    priority = np.full(len(first), np.iinfo(np.int64).min)
    np.maximum.at(priority, clip_of, rows.priority[source])            # as urgent as the most urgent of its rows
    by_first_use = []
    for code in (rows.prompt_pair, rows.image, rows.bucket, rows.shape):
        code = code[source[first]]
        _, at, number = np.unique(code, return_index=True, return_inverse=True)
        by_first_use.append(at[number])
    return np.lexsort((np.arange(len(first)), *by_first_use, -priority))


def _seeds(table: pa.Table, good: np.ndarray) -> np.ndarray:
    """[R] each row's first seed; one that was not given comes from the row's id, so that it stays when rows move."""
    seeds = table["seed"].fill_null(0).to_numpy().copy()
    missing = good[table["seed"].is_null().to_numpy()[good]]
    for start in range(0, len(missing), BLOCK):
        rows = missing[start: start + BLOCK]
        seeds[rows] = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 2**31
                       for name in table["id"].take(rows).to_pylist()]
    return seeds


def clip_id_of(*, prompt: str, seed: int, **said: Any) -> str:
    """SHA-256 of the canonical JSON (keys sorted, no blanks, ASCII) of all that decides a clip's pixels.

    said: attention, frames, guidance, height, model, negative_prompt, num_steps, precision, weights_fingerprint, width;
    for a clip that begins with an image, `image`: the SHA-256 of its file; decode_precision and variant where they are said.
    """
    head, tail = _json_around(said)
    return _digest(head, prompt, seed, tail).hex()


def with_another_seed(request: Request) -> Request:
    """The clip to make when this one was rejected: the same but for its seed, which follows from this clip alone."""
    seed = int(request.clip_id[:8], 16) % 2**31
    shape, image = request.shape, request.image
    said = dict(attention=request.attention, frames=shape.frames, guidance=request.guidance, height=shape.height,
                model=request.model, negative_prompt=request.negative_prompt, num_steps=request.num_steps,
                precision=request.precision, weights_fingerprint=request.weights_fingerprint, width=shape.width)
    said |= {} if image is None else {"image": image.sha256}
    said |= {} if request.decode_precision is None else {"decode_precision": request.decode_precision}
    said |= {} if request.variant is None else {"variant": request.variant}
    return replace(request, seed=seed, clip_id=clip_id_of(prompt=request.prompt, seed=seed, **said))


def _json_around(said: dict[str, Any]) -> tuple[str, str]:
    """The canonical JSON before the prompt and after the seed: the same for all clips but those two."""
    text = json.dumps(said | {"prompt": 0, "seed": 0}, sort_keys=True, separators=(",", ":"))
    head, _, tail = text.partition('"prompt":0,"seed":0')              # a quote inside a value would be escaped
    return f'{head}"prompt":', tail


def _digest(head: str, prompt: str, seed: int, tail: str) -> bytes:
    return hashlib.sha256(f'{head}{quoted(prompt)},"seed":{seed}{tail}'.encode()).digest()


def _digests(rows: _Rows, source: np.ndarray, seeds: np.ndarray, model: dict[str, str]) -> pa.Array:
    """The clip id of every planned row, 32 bytes each."""
    combination = _folded(rows.bucket, rows.negative, rows.image)

    @lru_cache(maxsize=4096)
    def around(number: int) -> tuple[str, str]:
        row = int(any_row[number])
        image = {"image": rows.images[rows.image[row]].sha256} if rows.image[row] >= 0 else {}
        return _json_around(model | image | dict(
            negative_prompt=rows.negatives[int(rows.negative[row])].as_py(), num_steps=int(rows.steps[row]),
            guidance=float(rows.guidance[row]), frames=int(rows.frames[row]), height=int(rows.height[row]),
            width=int(rows.width[row])))

    any_row = np.unique(combination, return_index=True)[1]
    digests = bytearray()
    for start in range(0, len(source), BLOCK):
        at, block_seeds = source[start: start + BLOCK], seeds[start: start + BLOCK].tolist()
        for number, prompt, seed in zip(combination[at].tolist(), rows.prompts_of(at), block_seeds):
            head, tail = around(number)
            digests += _digest(head, prompt, seed, tail)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(source), [None, pa.py_buffer(bytes(digests))])
