"""The size of a clip, from pixels to latent cells to tokens. Strides and the 4n + 1 rule live here only."""

import math
from dataclasses import dataclass
from fractions import Fraction

NEAR_A_RATE = 5e-3                  # pictures per second by which a rate that was written out, as 23.98, may be off


def frame_rate(fps: float | Fraction) -> Fraction:
    """Pictures per second, exactly: 23.976 and 29.97 are 24000/1001 and 30000/1001, as television has them."""
    if not isinstance(fps, float) or fps.is_integer():
        return Fraction(fps)
    of_television = Fraction(1000 * math.ceil(fps), 1001)
    return of_television if abs(fps - of_television) < NEAR_A_RATE else Fraction(fps).limit_denominator(1001)


@dataclass(frozen=True, kw_only=True)
class VideoShape:
    """A clip in pixels: `frames` pictures of height x width."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


@dataclass(frozen=True, kw_only=True)
class LatentGrid:
    """What a VAE makes of a clip: time x height x width latent cells, of `channels` numbers each.

    A causal video VAE keeps the first frame apart: F frames become (F - 1) / time_stride + 1 latent steps.
    """

    channels: int = 16
    time_stride: int = 4
    space_stride: int = 8

    def of(self, shape: VideoShape) -> tuple[int, int, int, int]:
        """[C, T, H, W] of the latent.  Raises ValueError for a shape that this VAE cannot code."""
        if (shape.frames - 1) % self.time_stride:
            low = self.nearest_frames(shape.frames)
            raise ValueError(f"frames must be {self.time_stride}n + 1 for this VAE; got {shape.frames} "
                             f"(nearest: {low} or {low + self.time_stride})")
        for side, name in ((shape.height, "height"), (shape.width, "width")):
            if side < self.space_stride or side % self.space_stride:
                raise ValueError(f"{name} must be a multiple of {self.space_stride}; got {side}")
        return (self.channels, (shape.frames - 1) // self.time_stride + 1,
                shape.height // self.space_stride, shape.width // self.space_stride)

    def nearest_frames(self, frames: int) -> int:
        """The largest frame count of the form time_stride * n + 1 that is not above `frames`, and at least 1."""
        return max(0, frames - 1) // self.time_stride * self.time_stride + 1
