"""Samplers: pure functions of a velocity over streams, (video,) or (video, audio); they know no model and no prompt."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

Streams = tuple[Tensor, ...]
Velocity = Callable[[Streams, float], Streams]          # noisy streams and sigma in, d streams / d sigma out


def euler(velocity: Velocity, streams: Streams, sigmas: Sequence[float]) -> Streams:
    """Integrate from noise at sigmas[0] to clean streams at sigmas[-1] = 0."""
    for sigma, next_sigma in pairwise(sigmas):
        streams = tuple(x + (next_sigma - sigma) * v for x, v in zip(streams, velocity(streams, sigma), strict=True))
    return streams
