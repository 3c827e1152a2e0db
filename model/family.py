"""The seam between a family of models, which is a folder here, and who encodes, samples, decodes, checks and converts.

A family is one object. Its cards name it, as "module:name", so a card is data: it can be listed, compared and sent
without what builds it. A further family is a module and a card; nothing here or above hears of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from dailies.model.card import ModelCard
from dailies.model.keys import KeyTable
from dailies.model.runtime import Runtime
from dailies.model.settings import Scalar
from dailies.model.shapes import VideoShape

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dailies.model.samplers import Clips, Steps, Streams

OneCard = TypeVar("OneCard", bound=ModelCard)
AnyCard = TypeVar("AnyCard", bound=ModelCard, contravariant=True)


class NonFiniteLatent(ArithmeticError):
    """Sampling ended in NaN or infinity; with another seed it may not."""


class NonFiniteFrames(ArithmeticError):
    """Decoding gave NaN or infinity in the pictures; likewise."""


class NonFiniteSound(ArithmeticError):
    """Decoding gave NaN or infinity in the sound; likewise."""


class Asked(Protocol):
    """What a model reads of a request (dailies.actors.messages.Request)."""

    @property
    def clip_id(self) -> str: ...
    @property
    def shape(self) -> VideoShape: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def guidance(self) -> float: ...
    @property
    def settings(self) -> "Mapping[str, Scalar]": ...


class Told(Protocol):
    """What a clip is sampled from (dailies.actors.messages.Embedding)."""

    @property
    def request(self) -> Asked: ...
    @property
    def prompt(self) -> "Streams": ...
    @property
    def negative(self) -> "Streams": ...
    @property
    def image(self) -> "tuple[Tensor, ...]": ...


class TextModel(Protocol):
    """A text encoder and its tokenizer, loaded."""

    @property
    def max_tokens(self) -> int: ...
    def encode(self, text: str) -> "Streams":
        """[L, E] on the CPU for each stream that is told by text, trimmed to the text's real length."""
    def cut(self, text: str) -> int:
        """How many tokens of the text do not fit."""


class ImageModel(Protocol):
    """What a model sees of the image that a clip begins with, loaded."""

    def fitted(self, whole: "Tensor", shape: VideoShape) -> "tuple[Tensor, tuple[str, ...]]":
        """What is seen of an image, and what is to be told of that.  whole [3, H, W] in [-1, 1], on the CPU."""
    def __call__(self, pixels: "Tensor", shape: VideoShape) -> "tuple[Tensor, ...]":
        """As Told.image, fp32 on the CPU, the first of them [C, T, H, W].  pixels: what was fitted."""


class Sampler(Protocol):
    """A diffusion model, loaded, and its way from noise to a clip. It knows one device, and no lock and no file."""

    @property
    def solver(self) -> str:
        """What two states between steps must agree in, beside the number of steps and the shapes of the streams."""
    @property
    def transformers(self) -> "Sequence[nn.Module]":
        """What may be compiled, and recorded where its weights stay."""
    @property
    def weights_move(self) -> bool:
        """Whether weights leave the device and come back while clips are made."""
    def draws(self, num_steps: int) -> int:
        """How many draws of noise a clip takes: 1 for its start, or one for each step."""
    def sample(self, batch: Sequence[Told], draw: "Callable[[int], Clips]", steps: "Steps") -> "Clips":
        """The batch's clips without noise, fp32 on the device, each to the last bit as if it were alone.

        The requests share shape, steps and guidance.  draw: noise on the device, shaped as the card says; 0 is where
        the clips start, n what is put back after step n.  steps: where they begin, and who is told of each step.
        """


@dataclass(frozen=True, kw_only=True)
class Decoded:
    rgb: "Tensor"                                       # uint8 [frames, height, width, 3] on the CPU
    audio: "Tensor | None" = None                       # [samples, 2] in [-1, 1] on the CPU, at the card's audio_rate
    notes: tuple[str, ...] = ()                         # what was done instead of what was asked for


class StreamDecoder(Protocol):
    """What turns streams into pictures and sound, loaded."""

    def __call__(self, streams: "Streams", shape: VideoShape, memory: int) -> Decoded:
        """memory: bytes that it may fill.  Raises NonFiniteFrames, NonFiniteSound."""


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """One file of weights of a card."""

    kind: str                                           # as Layout.placed has it; of its dits `place` says which
    place: int = 0
    tables: tuple[KeyTable, ...]                        # the names that its tensors may have
    new: "Callable[[], nn.Module] | None" = None        # as it is described, where it can be made INT8 (turbo.py)
    load: "Callable[[Path, Runtime], object]"           # from a folder of weights; on "meta" it is checked and no more
    check: "Callable[[Path, Path | None], None]"        # a file alone; a config beside it.  Raises CheckpointError
    # where `load` wants other tensors than were published, and not other names alone: these of a file of those
    rewritten: "Callable[[Mapping[str, Tensor], Path], dict[str, Tensor]] | None" = None


class Family(Protocol[AnyCard]):
    """Loading raises CheckpointError: it names the file or tensor, and the next step."""

    def parts(self, card: AnyCard) -> tuple[ModelPart, ...]:
        """All files of weights but tokenizers: who checks and converts them goes by this list."""
    def load_encoder(self, card: AnyCard, weights: Path, on: Runtime) -> TextModel: ...
    def load_image_model(self, card: AnyCard, weights: Path, on: Runtime) -> ImageModel:
        """Asked of a card that takes an image, and of no other."""
    def load_sampler(self, card: AnyCard, weights: Path, on: Runtime) -> Sampler: ...
    def load_decoder(self, card: AnyCard, weights: Path, on: Runtime) -> StreamDecoder: ...
    def stored_precision(self, card: AnyCard, weights: Path) -> str | None:
        """The precision that files are bound to, such as int8; None where they leave the choice."""
    def fallbacks(self, card: AnyCard, weights: Path | None, on: Runtime) -> Mapping[str, tuple[str, ...]]:
        """By "sample" and "decode": what is done here instead of what is asked for, known before anything is loaded;
        by "room": what is to be told of this machine and changes no clip.

        weights: None where they are not here yet.
        """


def family_of(card: OneCard) -> Family[OneCard]:
    """Imported when a part is first wanted: it brings torch, which who lists or plans models can do without."""
    module, _, name = card.family.partition(":")
    family: Any = getattr(import_module(module), name)
    return family


def precision_in(card: ModelCard, weights: Path, device: str) -> str:
    """What runs when nobody says: as ModelCard.precision_on, but INT8 layers stay INT8.  Raises CheckpointError."""
    return family_of(card).stored_precision(card, weights) or card.precision_on(device)
