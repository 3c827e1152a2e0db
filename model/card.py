"""What every model says of itself: what a row may ask for and gets, its files and sizes. How to build it: family.py."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from dailies.model.errors import SettingError
from dailies.model.runtime import EVERY_ATTENTION, EVERY_PRECISION, Runtime
from dailies.model.shapes import LatentGrid, VideoShape


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the parts of a model lie in a folder. A .safetensors file may also be shards and their index."""

    dits: tuple[str, ...]
    vae: str
    text_encoder: str                                   # a file, or a folder as transformers saves it
    tokenizer: str | None                               # a folder
    image_encoder: str | None = None                    # as text_encoder
    audio_vae: str | None = None
    others: Mapping[str, str] = field(default_factory=dict)         # of further kinds; several parts may share a file

    def placed(self) -> Iterator[tuple[str, int, str]]:
        """kind, place among several of a kind, and file or folder of every part."""
        for place, part in enumerate(self.dits):
            yield "dit", place, part
        for kind in ("vae", "text_encoder", "image_encoder", "audio_vae"):
            if part := getattr(self, kind):
                yield kind, 0, part
        for kind, part in self.others.items():
            yield kind, 0, part

    @property
    def parts(self) -> tuple[str, ...]:
        """Files and folders, each once."""
        return tuple(dict.fromkeys(part for _, _, part in self.placed()))

    def part_of(self, kind: str, place: int = 0) -> str:
        """The file or folder of a part.  Raises KeyError where the layout has none."""
        return {(kind, place): part for kind, place, part in self.placed()}[kind, place]


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Of sparse attention: the share of the key blocks that a block of queries attends to, and the rows of a block."""

    keep_ratio: float
    block_q: int = 128
    block_k: int = 64
    tuned: bool = False             # the weights were tuned for it: they have the projection of its linear branch


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """One model, in plain values, so a card can be pickled. A family's card adds what its parts are made by."""

    name: str
    description: str
    family: str                                         # what loads its parts, "module:name" (family.py)

    # where the weights are, under a folder in one of the layouts
    repo_id: str | None = None                          # on the Hugging Face hub
    least_gb: float | None = None                       # what is fetched from there, if all of it is in 16 bits
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)   # else: several repositories, their files
    folder: Path | None = None                          # weights that come with dailies
    as_published: bool = False                          # its files are read as they are: none is to be converted
    terms: str = ""                                     # licence, and what has to be accepted before a download

    # what a row may ask for, and what it gets when it does not say
    fps: float | Fraction = 24.0                        # 24000/1001, which no float is, as a Fraction
    audio_rate: int = 48_000                            # samples per second, where it has sound
    resolutions: Mapping[str, tuple[int, int]]          # name -> (height, width)
    resolution: str
    duration_s: float = 2.0
    num_steps: int = 50
    guidance: float
    negative_prompt: str = ""
    negative_unused: str = ""                           # what a row with one is told, where the model cannot use it
    guidance_note: str = ""                             # what a row with its own is told, where it is not plain
    differs: tuple[str, ...] = ()                       # from the release, by default, in sentences
    settings: Mapping[str, Any] = field(default_factory=dict)   # further ones that its rows take: name -> its own value
    takes_image: bool = False                           # which becomes the first frame
    needs_image: bool = True                            # of a model that takes one: every row needs it
    image_crf: int | None = None                        # an image is compressed so first, as H.264; None: it is not
    min_side: int = 128                                 # pixels
    side_step: int = 8                                  # sides are multiples of it
    max_pixels: int                                     # height * width
    frame_step: int                                     # a duration is rounded down to this many frames, and one
    max_duration_s: float = 5.0
    min_steps: int = 1
    max_steps: int = 1000
    max_guidance: float = 100.0
    precisions: tuple[str, ...] = ("bf16", "fp32", "int8")
    attentions: tuple[str, ...] = ("dense", "sage", "sparse")      # the first is what runs when nobody says

    # of sparse attention
    keep_ratio: float = 0.25                            # share of the key blocks that a block of queries attends to
    sparse_blocks: tuple[int, int] = (128, 64)          # tokens of a block of queries and of keys
    tuned_for_sparse: bool = False                      # the weights know it, and have its linear branch's projection

    # all the words that its training prompts were made of, where it was taught a few and knows no others
    words: frozenset[str] = frozenset()
    taught: str = ""                                    # what they are about

    clips_per_turn: int = 1                             # sampled together, where that changes no bit and saves work

    # fields that differ from the released sizes
    dit_fields: Mapping[str, Any] = field(default_factory=dict)
    vae_fields: Mapping[str, Any] = field(default_factory=dict)

    memory_gb: Mapping[str, float] = field(default_factory=dict)   # stage -> GPU peak, bf16, largest clip: estimates
    encoder_share: float = 0.25                         # of a GPU; above it no sampler is beside the encoder

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """How the weights may lie; the first is that of the hub's repository."""
        raise NotImplementedError

    def fetched_by_hand(self) -> str:
        """Where its files are, and what is to be done with them, where no one repository has them all."""
        said = "; ".join(f"{', '.join(files)} of {repository}" for repository, files in self.sources.items())
        if self.as_published:
            return f"download {said} into one folder, under these names, and name it with --weights"
        return (f"download {said}; then dailies convert SRC --model {self.name} --to WEIGHTS for each file or "
                "repository's folder, and --weights WEIGHTS")

    @property
    def grid(self) -> LatentGrid:
        return LatentGrid()

    @property
    def width(self) -> int:
        """Of the transformer's rows: what speeds that were measured go by (ways.py)."""
        raise NotImplementedError

    @property
    def text_widths(self) -> Mapping[str, int]:
        """By stream, of the rows that its text is told in."""
        raise NotImplementedError

    def stream_shapes(self, shape: VideoShape) -> dict[str, tuple[int, ...]]:
        """Of a clip's latent: "video" [C, T, H, W], then "audio" [C, A, M] where the model has it."""
        return {"video": self.grid.of(shape)}

    @property
    def further_steps(self) -> int:
        """Steps of a last stage, after those that a row chooses."""
        return 0

    def image_grid(self, shape: VideoShape) -> tuple[int, ...]:
        """[T, H, W] of what the sampler is told of an image."""
        return self.grid.of(shape)[1:]

    def without_sound(self) -> "ModelCard":
        """This model for a run whose rows all want none: what need not be loaded is left out."""
        return self

    def streams_of(self, shape: VideoShape, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """stream_shapes, without the sound where a row wants none."""
        shapes = self.stream_shapes(shape)
        return {name: each for name, each in shapes.items() if name != "audio" or settings.get("audio") is not False}

    @property
    def sparsity(self) -> Sparsity:
        return Sparsity(keep_ratio=self.keep_ratio, block_q=self.sparse_blocks[0], block_k=self.sparse_blocks[1],
                        tuned=self.tuned_for_sparse)

    def runtime(self, device: str = "cpu", precision: str | None = None, attention: str | None = None, *,
                decode_precision: str | None = None, threads: int = 1, compiled: bool = False,
                graphs: bool | None = None, largest: VideoShape | None = None) -> Runtime:
        """What is said, and the model's own for the rest.  Raises SettingError for what no model runs in."""
        precision = precision or self.precision_on(device)
        for name, value, known in (("precision", precision, EVERY_PRECISION), ("attention", attention, EVERY_ATTENTION),
                                   ("decode_precision", decode_precision, ("fp32", "bf16"))):
            if value is not None and value not in known:
                raise SettingError(f"{name} must be {' or '.join(known)}; got {value}")
        return Runtime(device=device, precision=precision, attention=attention or self.attentions[0], threads=threads,
                       decode_precision=decode_precision or self.vae_precision(precision), compiled=compiled,
                       graphs=graphs, largest=largest)

    def vae_precision(self, precision: str) -> str:
        """What the VAE runs when nobody says: fp32 or bf16, by the precision of the rest."""
        return "fp32" if precision == "fp32" else "bf16"

    def precision_on(self, device: str) -> str:
        """What runs when nobody says: fp32 on a CPU, where it is exact; bf16 on a GPU, as the releases run."""
        return "fp32" if device.startswith("cpu") else "bf16"

    def shape_for(self, resolution: str | tuple[int, int] | None = None, duration_s: float | None = None,
                  frames: int | None = None) -> tuple[VideoShape, str | None]:
        """The shape to render, and a note when it is not quite what was asked for.

        resolution: a name in `resolutions`, "WIDTHxHEIGHT" or (width, height).  Give duration_s or frames or neither.
        Raises ValueError, saying what is allowed.
        """
        height, width = self.size_for(resolution if resolution is not None else self.resolution)
        frames, note = self.frames_for(duration_s, frames)
        return VideoShape(frames=frames, height=height, width=width), note

    @property
    def smallest(self) -> VideoShape:
        side = self.checked_size(*[math.ceil(self.min_side / self.side_step) * self.side_step] * 2)[0]
        return VideoShape(frames=1, height=side, width=side)

    def size_for(self, resolution: str | tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels.  Raises ValueError, saying what is allowed."""
        if isinstance(resolution, str):
            if resolution in self.resolutions:
                return self.resolutions[resolution]
            width, _, height = resolution.lower().partition("x")
            # isdecimal alone would let other scripts' digits and very long numbers through
            if not all(side.isascii() and side.isdecimal() and len(side) <= 5 for side in (width, height)):
                raise ValueError(f"resolution must be {', '.join(self.resolutions)} or WIDTHxHEIGHT for {self.name}; "
                                 f"got {resolution!r}")
            resolution = int(width), int(height)
        return self.checked_size(*resolution)

    def checked_size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width).  Raises ValueError, saying what is allowed."""
        step = self.side_step
        for side, name in ((width, "width"), (height, "height")):
            if side < self.min_side or side % step:
                nearest = max(math.ceil(self.min_side / step), round(side / step)) * step
                raise ValueError(f"{name} must be a multiple of {step} and at least {self.min_side} for {self.name}; "
                                 f"got {side} (nearest: {nearest})")
        if width * height > self.max_pixels:
            raise ValueError(f"width x height must be at most {self.max_pixels} pixels for {self.name}; "
                             f"got {width}x{height} = {width * height}")
        return height, width

    def size_for_image(self, resolution: str, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a clip that begins with an image of this size.  Raises ValueError, saying what is allowed.

        A name in `resolutions` is an area: the clip has as many pixels at most, in the image's aspect. WIDTHxHEIGHT is
        what it says. The release computes the sides in floats and so makes 832x464 of an 832x480 image at 480p.
        """
        if resolution not in self.resolutions:
            return self.size_for(resolution)
        area, step = math.prod(self.resolutions[resolution]), self.side_step
        sides = [math.isqrt(area * side // other) // step * step for side, other in ((height, width), (width, height))]
        if min(sides) < self.min_side:
            raise too_narrow(self, resolution, height, width, sides)
        return sides[0], sides[1]

    def frames_for(self, duration_s: float | None = None, frames: int | None = None) -> tuple[int, str | None]:
        """Frame count and a note when it was rounded.  Raises ValueError, saying what is allowed.

        A duration goes down to a multiple of frame_step frames, to which one is added; a frame count to 4n + 1.
        """
        most = int(self.fps * self.max_duration_s) + 1
        if frames is not None and duration_s is not None:
            raise ValueError(f"give duration_s or frames, not both; got {duration_s} and {frames}")
        if frames is not None:
            if not 1 <= frames <= most:
                raise ValueError(f"frames must be 1 to {most} for {self.name}; got {frames}")
            whole = self.grid.nearest_frames(frames)
            return whole, None if whole == frames else f"{frames} frames rounded down to {whole}"
        duration_s = self.duration_s if duration_s is None else duration_s
        if not 1 <= duration_s <= self.max_duration_s:                  # false for NaN too
            raise ValueError(f"duration_s must be 1 to {self.max_duration_s:g} for {self.name}; got {duration_s:g}")
        frames = int(self.fps * duration_s) // self.frame_step * self.frame_step
        if frames == self.fps * duration_s:
            return frames + 1, None
        return frames + 1, f"{duration_s:g} s rounded down to {float(frames / self.fps):g} s ({frames + 1} frames)"


def too_narrow(card: ModelCard, resolution: str, height: int, width: int, sides: list[int]) -> ValueError:
    return ValueError(f"the clip's sides must be at least {card.min_side} for {card.name}; got {sides[1]}x{sides[0]} "
                      f"at {resolution} for an image of {width}x{height}")
