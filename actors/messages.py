"""The values a prompt passes through: Request -> Embedding -> Latent -> Frames -> Clip, or a Failure on the way.

Each stage takes the value before it and returns the one after it. A value is never filled in later: the next stage
makes the next value, and lets the heavy tensor of the one before go.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from torch import Tensor

from dailies.model.samplers import Streams
from dailies.model.settings import FURTHER, SAMPLING, SETTINGS, SIZE, Scalar, sampling_of
from dailies.model.shapes import VideoShape

# by their names in the JSON that a clip_id is the hash of, where that is not the name elsewhere
HASHED_AS = {setting.name: setting.field for setting in SETTINGS if setting.field} | {"image_sha256": "image"}


@dataclass(frozen=True, kw_only=True)
class FirstFrame:
    """The image that a clip begins with."""

    sha256: str                     # of the file's bytes
    uri: str                        # where every worker can read them: an absolute path, or s3://; decides no pixels


@dataclass(frozen=True, kw_only=True)
class Request:
    """All that decides the pixels of one clip; the plan has resolved every default."""

    clip_id: str                    # SHA-256 of `identity`: every other field but fps and where the image lies
    model: str                      # name in the catalogue
    weights_fingerprint: str
    prompt: str
    negative_prompt: str
    seed: int                       # 0 <= seed < 2**63
    shape: VideoShape
    fps: float | Fraction
    num_steps: int
    guidance: float
    precision: str                  # fp32, bf16, int8
    attention: str                  # dense, sage, sparse
    image: FirstFrame | None = None     # for a model that takes one
    decode_precision: str | None = None     # fp32 or bf16: of the VAE, where it is not the model's own
    variant: str | None = None      # what was asked for beside that moves bits: compiled; torch's threads, if not 1
    settings: Mapping[str, Scalar] = field(default_factory=dict, hash=False)   # that some models alone take (FURTHER)

    def identity(self) -> dict[str, Scalar]:
        """All that decides the pixels, by the names that the ledger and the clip's file have for it.

        What came later is said only where it is not at its neutral value, so that clips without it keep their names.
        """
        shape = self.shape
        later: dict[str, Scalar | None] = {"image_sha256": self.image.sha256 if self.image else None,
                                           "decode_precision": self.decode_precision, "variant": self.variant}
        later |= {setting.name: value for setting in FURTHER
                  if (value := self.settings.get(setting.name)) != setting.neutral}
        return {**{setting.name: getattr(self, setting.field) for setting in SETTINGS if setting.field},
                "model": self.model, "weights_fingerprint": self.weights_fingerprint, "precision": self.precision,
                "attention": self.attention, **dict(zip(SIZE, (shape.width, shape.height, shape.frames), strict=True)),
                **{name: value for name, value in later.items() if value is not None}}

    @property
    def embedding_key(self) -> str:
        """Requests with one key share one Embedding."""
        said = [self.model, self.weights_fingerprint, self.precision, self.prompt, self.negative_prompt]
        if self.image is not None:
            said += [self.image.sha256, str(self.shape)]    # it is encoded at the clip's size
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    @property
    def sampling(self) -> dict[str, Scalar]:
        """How it is sampled, by the settings' names."""
        own = {setting.name: getattr(self, setting.field) for setting in SAMPLING if setting.field}
        return own | dict(self.settings)

    @property
    def bucket(self) -> str:
        """Requests in one bucket may be sampled in one batch: same shape and same sampling."""
        return " ".join((str(self.shape), *sampling_of(self.sampling)))


@dataclass(frozen=True, kw_only=True)
class Embedding:
    request: Request
    prompt: Streams                 # [L, E] for each stream that is told by text, trimmed to the prompt's real length
    negative: Streams
    image: tuple[Tensor, ...] = ()  # of the first frame: what is seen beside the latent [C, T, H, W], then CLIP's rows
    fallbacks: tuple[str, ...] = ()  # what was done instead of what was asked for; later values carry it on
    determinism: tuple[str, ...] = ()   # the class of every stage so far (determinism.py), empty where nobody knows


@dataclass(frozen=True, kw_only=True)
class Latent:
    request: Request
    streams: Streams                # "video" [C, T, H, W] as the DiT has it (normalised), "audio" [C, A, M]
    fallbacks: tuple[str, ...] = ()
    determinism: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Frames:
    request: Request
    rgb: Tensor                     # uint8 [frames, height, width, 3]
    audio: Tensor | None = None     # [samples, 2] in [-1, 1]; None is silence
    fallbacks: tuple[str, ...] = ()
    determinism: tuple[str, ...] = ()
    quality: Mapping[str, float | str] = field(default_factory=dict)    # what was measured; the ledger's quality.*


@dataclass(frozen=True, kw_only=True)
class Clip:
    request: Request
    uri: str
    sha256: str
    num_bytes: int
    duration_s: float
    has_audio: bool = False
    audio_padding_ms: float | None = None   # silence behind the sound that was made; below 0, sound that was cut off
    fallbacks: tuple[str, ...] = ()
    determinism: tuple[str, ...] = ()
    quality: Mapping[str, float | str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()     # what else is to be told, though it is the clip that was asked for


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What is left of a request that a stage could not serve; every later stage passes it on untouched."""

    request: Request
    stage: str
    error_type: str                 # the exception's class name, WorkerDied or TimedOut
    error: str                      # its message, for a person
    stack: str = ""                 # a digest of where it was raised, and the last of those places
    about_row: bool = False         # a verdict on what was asked or made, which tells nothing of the worker
    worker: str | None = None       # that tried it last, and on what
    device: str | None = None
    quality: Mapping[str, float | str] = field(default_factory=dict)    # of frames that were refused
