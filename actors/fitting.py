"""Whether a value that lay in the run folder can be what its request asks for: its tensors' shapes, types and numbers.

A sealed value was made by this run, so this finds what a defect of ours, or somebody with the run's key, has put there;
the next stage would fail on it, and its row would pay.
"""

from dataclasses import dataclass

from torch import Tensor

from dailies.actors.messages import Embedding, Latent
from dailies.model.catalog import ModelCard


@dataclass(frozen=True)
class Fitting:
    """What values of one model look like; can be pickled."""

    card: ModelCard

    def __call__(self, value: Embedding | Latent) -> str | None:
        """None, or what is wrong."""
        grid = self.card.grid.of(value.request.shape)
        if isinstance(value, Latent):
            return self.latent(value, grid)
        wanted = self.card.dit_config.text_dim
        for name, streams in (("prompt", value.prompt), ("negative prompt", value.negative)):
            if list(streams) != ["video"]:
                return f"a {name} for {' and '.join(streams) or 'nothing'}, where one for video is wanted"
            if wrong := text(streams["video"], wanted):
                return f"a {name} that is {wrong}"
        return self.image(value, grid)

    def latent(self, value: Latent, grid: tuple[int, ...]) -> str | None:
        got = {name: list(stream.shape) for name, stream in value.streams.items()}
        if got != {"video": list(grid)}:
            said = " and ".join(f"{name} {shape}" for name, shape in got.items()) or "nothing"
            return f"a latent of {said}, where video {list(grid)} is wanted"
        return next((wrong for stream in value.streams.values() if (wrong := numbers(stream))), None)

    def image(self, value: Embedding, grid: tuple[int, ...]) -> str | None:
        if bool(value.image) != self.card.takes_image:
            return f"{'with' if value.image else 'without'} an image"
        if value.image and (value.image[0].dim() != 4 or tuple(value.image[0].shape[1:]) != tuple(grid[1:])):
            return f"an image of {list(value.image[0].shape)}, where [C, {', '.join(map(str, grid[1:]))}] is wanted"
        if any(rows.dim() != 2 for rows in value.image[1:]):
            return "an image whose rows are no matrix"
        return next((wrong for part in value.image if (wrong := numbers(part))), None)


def text(rows: Tensor, width: int) -> str | None:
    if rows.dim() != 2 or rows.shape[1] != width:
        return f"{list(rows.shape)}, where [L, {width}] is wanted"
    return numbers(rows)


def numbers(tensor: Tensor) -> str | None:
    if not tensor.is_floating_point():
        return f"{tensor.dtype}, where floating point is wanted"
    return None if bool(tensor.isfinite().all()) else "NaN or infinity"
