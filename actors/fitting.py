"""Whether a value that lay in the run folder can be what its request asks for: its tensors' shapes, types and numbers.

A sealed value was made by this run, so this finds what a defect of ours, or somebody with the run's key, has put there;
the next stage would fail on it, and its row would pay.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from dailies.actors.messages import Embedding, Latent, Request
from dailies.model.card import ModelCard

MOST_TOKENS = 2048                                      # of a text: four times those of the longest
MOST_ROW_BYTES = 2**24                                  # of what CLIP makes of an image, which has 1.3 MB


@dataclass(frozen=True)
class Fitting:
    """What values of one model look like; can be pickled."""

    card: ModelCard

    def __call__(self, value: Embedding | Latent) -> str | None:
        """None, or what is wrong."""
        shapes = self.card.streams_of(value.request.shape, value.request.settings)
        if isinstance(value, Latent):
            return self.latent(value, shapes)
        for name, streams in (("prompt", value.prompt), ("negative prompt", value.negative)):
            if set(streams) != set(self.card.text_widths):
                return f"a {name} for {joined(streams)}, where one for {joined(self.card.text_widths)} is wanted"
            for stream, width in self.card.text_widths.items():
                if wrong := text(streams[stream], width):
                    return f"a {name} that is {wrong}"
        return self.image(value, self.card.image_grid(value.request.shape))

    def embedding_bytes(self, request: Request) -> int:
        """More than one can have: two texts and what an image becomes, in fp32."""
        texts = 2 * 4 * MOST_TOKENS * sum(self.card.text_widths.values())
        if not self.card.takes_image:
            return texts
        channels = self.card.stream_shapes(request.shape)["video"][0]
        return texts + 4 * 4 * channels * math.prod(self.card.image_grid(request.shape)) + MOST_ROW_BYTES

    def latent_bytes(self, request: Request) -> int:
        """More than one can have: twice its numbers, in fp32."""
        return 2 * 4 * sum(map(math.prod, self.card.stream_shapes(request.shape).values()))

    def latent(self, value: Latent, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        wanted, got = ({name: f"{name} {list(shape)}" for name, shape in each.items()}
                       for each in (shapes, {name: stream.shape for name, stream in value.streams.items()}))
        if got != wanted:
            return f"a latent of {joined(got.values())}, where {joined(wanted.values())} is wanted"
        return next((wrong for stream in value.streams.values() if (wrong := numbers(stream))), None)

    def image(self, value: Embedding, grid: tuple[int, ...]) -> str | None:
        if bool(value.image) != (self.card.takes_image and (self.card.needs_image or value.request.image is not None)):
            return f"{'with' if value.image else 'without'} an image"
        if value.image and (value.image[0].dim() != 4 or tuple(value.image[0].shape[1:]) != tuple(grid)):
            return f"an image of {list(value.image[0].shape)}, where [C, {', '.join(map(str, grid))}] is wanted"
        if any(rows.dim() != 2 for rows in value.image[1:]):
            return "an image whose rows are no matrix"
        return next((wrong for part in value.image if (wrong := numbers(part))), None)


def joined(names: Iterable[str]) -> str:
    return " and ".join(names) or "nothing"


def text(rows: Tensor, width: int) -> str | None:
    if rows.dim() != 2 or rows.shape[1] != width:
        return f"{list(rows.shape)}, where [L, {width}] is wanted"
    return numbers(rows)


def numbers(tensor: Tensor) -> str | None:
    if not tensor.is_floating_point():
        return f"{tensor.dtype}, where floating point is wanted"
    return None if bool(tensor.isfinite().all()) else "NaN or infinity"
