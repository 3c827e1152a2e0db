"""What each row of a manifest asks for, in columns, every default resolved: the row decides, then the command line,
then the model card. What this model cannot make joins the manifest's validation errors.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dailies.actors.messages import FirstFrame, Request
from dailies.model.card import ModelCard
from dailies.model.errors import SettingError
from dailies.model.settings import ALIKE_SETTINGS, DEFAULTED, FURTHER, LENGTHS, SAMPLING, Scalar, Setting
from dailies.model.shapes import VideoShape
from dailies.pipeline.manifest.images import ALLOWED_IMAGE, FoundImage, find_images, folder_of
from dailies.pipeline.manifest.manifest import Manifest, rows_without
from dailies.pipeline.manifest.validation import ValidationErrors, shown

SPREAD = 4                              # places that are marked for each number, rather than that they are sorted


class Defaults(Mapping[str, Scalar | None]):
    """What a command line says for rows that do not, by the settings' names; None leaves it to the model card."""

    def __init__(self, **said: Scalar | None):
        """Raises TypeError for what has no default, SettingError for what no model could take."""
        names = [setting.name for setting in DEFAULTED]
        if strange := [name for name in said if name not in names]:
            raise TypeError(f"a default is one of {', '.join(names)}; got {', '.join(strange)}")
        if all(said.get(name) is not None for name in LENGTHS):
            raise SettingError(f"give duration_s or frames, not both; got {said['duration_s']} and {said['frames']}")
        self.said = {setting.name: default(setting, said.get(setting.name)) for setting in DEFAULTED}

    def __getitem__(self, name: str) -> Scalar | None:
        return self.said[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.said)

    def __len__(self) -> int:
        return len(self.said)

    def __repr__(self) -> str:
        return f"Defaults({', '.join(f'{name}={value!r}' for name, value in self.said.items() if value is not None)})"

    def resolved(self, card: ModelCard) -> "Defaults":
        """With the card's values for what is None.  Raises SettingError for what this model cannot do."""
        has_length = any(self[name] is not None for name in LENGTHS)
        said: dict[str, Any] = {setting.name: self[setting.name] for setting in DEFAULTED}
        for setting, other in ALIKE_SETTINGS:
            if setting.own_value(card) is None:
                continue
            both = {said[each.name] for each in (setting, other)} - {None}
            if len(both) > 1:
                raise SettingError(f"{setting.name} is another name for {other.name} with {card.name}: give one of "
                                   f"them; got {said[setting.name]:g} and {said[other.name]:g}")
            said[setting.name] = said[other.name] = next(iter(both), None)
        said |= {setting.name: setting.own_value(card) for setting in DEFAULTED
                 if said[setting.name] is None and not (has_length and setting.name in LENGTHS)}
        try:
            card.shape_for(*(said[name] for name in ("resolution", *LENGTHS)))
            for setting in SAMPLING:
                if (value := said[setting.name]) is not None:
                    setting.check(value, card)
        except ValueError as error:
            raise SettingError(str(error)) from error
        return Defaults(**said)


def default(setting: Setting, value: Scalar | None) -> Scalar | None:
    """The value in its setting's type.  Raises SettingError for one that no row could have; the card says how much."""
    if value is None:
        return None
    is_one = isinstance(value, (int, float) if setting.type is float else setting.type) and (
        isinstance(value, bool) == (setting.type is bool))
    if is_one and isinstance(value, str):
        is_one = len(value.encode()) <= setting.max_bytes and (not setting.choices or value in setting.choices)
    elif is_one and isinstance(value, int | float) and setting.type is not bool:
        is_one = setting.low <= value and math.isfinite(value)
    if not is_one:
        raise SettingError(f"{setting.name} must be {setting.allowed}; got {shown(value)}")
    return setting.type(value)


@dataclass(frozen=True, kw_only=True, eq=False)
class ResolvedRows:
    """What each manifest row asks for, in columns [R]; meaningless for a bad row."""

    height: np.ndarray
    width: np.ndarray
    frames: np.ndarray
    sampling: dict[str, tuple[list, np.ndarray]]     # setting -> its distinct values, and which of them each row has
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
    def resolve(cls, manifest: Manifest, card: ModelCard, defaults: Defaults, errors: ValidationErrors,
                allow_images: Sequence[str]) -> "ResolvedRows":
        """Put in the defaults, and add to `errors` what this model cannot do."""
        table = manifest.table
        resolutions = table["resolution"].fill_null(defaults["resolution"])
        sizes, size = asked_of_card(resolutions, "resolution", card.size_for, errors)
        images, image = images_asked_for(manifest, card, errors, allow_images)
        if images:
            sizes, size = sizes_for_images(resolutions, images, image, card, errors)
        height, width = np.array([found or (0, 0) for found in sizes])[size].T

        lengths, length = lengths_asked_for(table, card, defaults, errors)
        notes = list(dict.fromkeys(["", *(note for _, note in lengths if note)]))
        note_of = {note: at for at, note in enumerate(notes)}

        sampling, asked = {}, sampling_asked_for(table, card, errors)
        for setting in SAMPLING:
            if (own := defaults[setting.name]) is not None:            # None: this model has no such setting
                values = asked[setting.name].fill_null(own)
                values, which = encoded(pc.add(values, 0.0) if setting.type is float else values)   # 0.0 of -0.0
                sampling[setting.name] = values.to_pylist(), which
        prompts, prompt = encoded(table["prompt"])
        negatives, negative = encoded(table["negative_prompt"].fill_null(defaults["negative_prompt"]))
        return cls(
            height=height, width=width, frames=np.array([frames for frames, _ in lengths])[length],
            note=np.array([note_of[note or ""] for _, note in lengths])[length], notes=notes, sampling=sampling,
            priority=table["priority"].fill_null(0).to_numpy(),
            prompt=prompt, negative=negative, image=image, prompts=prompts, negatives=negatives, images=images)

    def request(self, row: int, **said: Any) -> Request:
        """What this row asks for.  said: what all rows share, and clip_id, seed and both prompts."""
        values: dict[str, Any] = dict(self.sampling_of(row))
        return Request(shape=self.shape_of(row), image=self.first_frame_of(row),
                       settings={setting.name: values[setting.name] for setting in FURTHER if setting.name in values},
                       **{setting.field: values[setting.name] for setting in SAMPLING if setting.field}, **said)

    def sampling_of(self, row: int) -> dict[str, Scalar]:
        """How its clips are sampled, by the settings' names."""
        return {name: values[which[row]] for name, (values, which) in self.sampling.items()}

    def shape_of(self, row: int) -> VideoShape:
        return VideoShape(frames=int(self.frames[row]), height=int(self.height[row]), width=int(self.width[row]))

    def largest(self, rows: np.ndarray) -> VideoShape:
        """Of these rows, of which there must be some, the shape of most pixels."""
        pixels = self.height[rows].astype(np.int64) * self.width[rows] * self.frames[rows]
        return self.shape_of(int(rows[pixels.argmax()]))

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
        return folded(self.prompt, self.negative)

    @cached_property
    def shape(self) -> np.ndarray:
        """One number per shape."""
        return folded(self.height, self.width, self.frames)

    @cached_property
    def bucket(self) -> np.ndarray:
        """One number per bucket: shape and sampling."""
        return folded(self.shape, *(which for _, which in self.sampling.values()))


def refuse_rows(manifest: Manifest, errors: ValidationErrors, card: ModelCard, defaults: Defaults) -> None:
    """Add to `errors` what this model cannot make of single rows, their images not looked at.  defaults: resolved."""
    asked_of_card(manifest.table["resolution"], "resolution", card.size_for, errors)
    lengths_asked_for(manifest.table, card, defaults, errors)
    sampling_asked_for(manifest.table, card, errors)
    if not card.takes_image:
        images_asked_for(manifest, card, errors, ())


def lengths_asked_for(table: pa.Table, card: ModelCard, defaults: Defaults,
                      errors: ValidationErrors) -> tuple[list[tuple[int, str | None]], np.ndarray]:
    """Lengths in frames, each with how it was rounded, and which of them each row has; 0 is that of the defaults."""
    own_length: dict[str, Any] = {name: defaults[name] for name in LENGTHS}
    lengths: list[tuple[int, str | None]] = [card.frames_for(**own_length)]
    length = np.zeros(table.num_rows, np.int64)
    for name in LENGTHS:
        def frames_of(value: Any, name: str = name) -> tuple[int, str | None]:
            return card.frames_for(**{name: value})

        found, at = asked_of_card(table[name], name, frames_of, errors)
        length = np.where(at >= 0, at + len(lengths), length)
        lengths += [answer or (0, None) for answer in found]
    return lengths, length


def sampling_asked_for(table: pa.Table, card: ModelCard, errors: ValidationErrors) -> dict[str, pa.ChunkedArray]:
    """The columns of how clips are sampled, null where a row does not say; what this model cannot do is in `errors`."""
    asked = {setting.name: table[setting.name] for setting in SAMPLING}
    for setting in SAMPLING:
        asked_of_card(asked[setting.name], setting.name, partial(setting.check, card=card), errors)
    for setting, other in ALIKE_SETTINGS:
        if setting.own_value(card) is None:
            continue
        mine, its = asked[setting.name], asked[other.name]
        rows = np.flatnonzero(pc.fill_null(pc.not_equal(mine, its), False).to_numpy()).tolist()
        errors.add(rows, setting.name, [shown(mine[row].as_py()) for row in rows],
                   f"what {other.name} says, whose other name it is with {card.name}; give one of them")
        asked[setting.name] = asked[other.name] = pc.coalesce(its, mine)
    return asked


def encoded(values: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """The distinct values, and which of them each row has, -1 for null."""
    values = values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()    # which would copy one, too
    encoded = values.dictionary_encode()
    distinct = encoded.dictionary
    # where no two are equal they are told once, not twice: prompts are most of what a plan holds
    return values if len(distinct) == len(values) else distinct, encoded.indices.fill_null(-1).to_numpy()


def asked_of_card(values: pa.ChunkedArray, column: str, ask: Callable[[Any], Any],
                  errors: ValidationErrors) -> tuple[list, np.ndarray]:
    """ask(value) of each distinct value, None where it was refused with ValueError, and which of them each row has."""
    distinct, code = encoded(values)
    answers, refused = [], {}
    for value in distinct.to_pylist():
        try:
            answers.append(ask(value))
        except ValueError as error:
            refused[len(answers)] = shown(value), rule_of(error, column)
            answers.append(None)
    report_refused(refused, code, column, errors)
    return answers, code


def rule_of(error: ValueError, column: str) -> str:
    """What is allowed, of a refusal; what came is said by the error."""
    return str(error).partition("; got ")[0].removeprefix(f"{column} must be ")


def report_refused(refused: Mapping[int, tuple[str, str]], code: np.ndarray, column: str,
                   errors: ValidationErrors) -> None:
    """Of every row whose code is in `refused`: what was given, what is allowed."""
    by_rule: dict[str, list[int]] = {}
    for row in np.flatnonzero(np.isin(code, list(refused))).tolist() if refused else ():
        by_rule.setdefault(refused[int(code[row])][1], []).append(row)
    for rule, rows in by_rule.items():
        errors.add(rows, column, [refused[int(code[row])][0] for row in rows], rule)


def images_asked_for(manifest: Manifest, card: ModelCard, errors: ValidationErrors,
              allowed: Sequence[str]) -> tuple[list[FoundImage], np.ndarray]:
    """The images, distinct by content, and which of them each row has, -1 for none or one that was refused."""
    names, name = encoded(manifest.table["image"])
    if not card.takes_image:
        rule = f"nothing: {card.name} makes video from text alone"
        refused = {code: (shown(given), rule) for code, given in enumerate(names.to_pylist())}
        report_refused(refused, name, "image", errors)
        return [], np.full(len(name), -1)
    if card.needs_image:
        rows = rows_without(manifest.table["image"], "image", errors)
        errors.add(rows, "image", ["nothing"] * len(rows), f"{ALLOWED_IMAGE}: {card.name} makes video from an image")

    folders = [folder_of(file) for file, _ in manifest.files]
    number_of = {folder: number for number, folder in enumerate(folders)}
    file = np.searchsorted([first for _, first in manifest.files], np.arange(len(name)), side="right") - 1
    place = folded(np.array([number_of[folder] for folder in folders])[file], name)
    place[name < 0] = -1
    places, at = np.unique(place[place >= 0], return_index=True)
    rows = np.flatnonzero(place >= 0)[at]
    given = names.take(pa.array(name[rows])).to_pylist()
    found = find_images([(folders[file[row]], said) for row, said in zip(rows, given, strict=True)], allowed)

    images: dict[str, FoundImage] = {}
    refused = {}
    for code, said, image in zip(places.tolist(), given, found, strict=True):
        if isinstance(image, FoundImage):
            images.setdefault(image.sha256, image)
        else:
            refused[code] = f"{shown(said)}: {image}", ALLOWED_IMAGE
    report_refused(refused, place, "image", errors)
    number_of = {sha256: number for number, sha256 in enumerate(images)}
    number = np.full(len(name) + 1, -1)                # of each place; the last is for none
    number[places] = [number_of[image.sha256] if isinstance(image, FoundImage) else -1 for image in found]
    return list(images.values()), number[place]


def sizes_for_images(resolutions: pa.ChunkedArray, images: list[FoundImage], image: np.ndarray, card: ModelCard,
                     errors: ValidationErrors) -> tuple[list[tuple[int, int] | None], np.ndarray]:
    """Sizes (height, width), None for a bad row, and which each row has. What a clip cannot be is reported."""
    names, name = encoded(resolutions)
    pair = folded(name, image)
    sizes: list[tuple[int, int] | None] = []
    refused: dict[int, tuple[str, str]] = {}
    for code, row in enumerate(np.unique(pair, return_index=True)[1].tolist()):
        sizes.append(None)
        resolution = names[int(name[row])].as_py()
        if image[row] < 0:
            if not card.needs_image:
                with suppress(ValueError):
                    sizes[-1] = card.size_for(resolution)
            continue
        size = images[image[row]].size
        with suppress(ValueError):
            card.size_for(resolution)                  # if not, that was said of the resolution
            try:
                sizes[-1] = card.size_for_image(resolution, size.height, size.width)
            except ValueError as error:
                refused[code] = f"{size.width}x{size.height} pixels", rule_of(error, "image")
    report_refused(refused, pair, "image", errors)
    return sizes, pair


def folded(*columns: np.ndarray) -> np.ndarray:
    """One number per distinct combination of integers, from 0, in the combinations' order."""
    numbers = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        if len(column) and column.min() != column.max():
            code = ranked(column)
            numbers = ranked(numbers * (code.max() + 1) + code)
    return numbers


def ranked(values: np.ndarray) -> np.ndarray:
    """Of each integer its place among the distinct ones, from 0 for the least."""
    low = values.min()
    if values.max() - low >= SPREAD * len(values):
        return np.unique(values, return_inverse=True)[1]
    there = np.zeros(values.max() - low + 1, bool)     # far faster than to sort them
    there[values - low] = True
    return (np.cumsum(there) - 1)[values - low]


def first_uses(codes: np.ndarray) -> np.ndarray:
    """Where each number from 0 to the largest stands first, len(codes) for one that does not.  codes: from 0."""
    found = np.full(codes.max(initial=-1) + 1, len(codes))
    found[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)             # the last to be written is the first
    return found


def num_distinct(codes: np.ndarray) -> int:
    """How many numbers there are.  codes: from 0."""
    return int(np.count_nonzero(np.bincount(codes)))
