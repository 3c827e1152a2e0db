"""Clips of one stream, for the tests of samplers."""

from torch import Tensor


def clip(video: Tensor) -> list[dict[str, Tensor]]:
    """A batch of one clip."""
    return [{"video": video}]


def by_clip(velocity):
    """The velocity of a batch, clip by clip.  velocity: video and sigma in, d video / d sigma out."""
    return lambda clips, sigma: [{"video": velocity(each["video"], sigma)} for each in clips]


def solved(solver, velocity, start: Tensor, *how) -> Tensor:
    """What a solver makes of one clip."""
    (made,) = solver(by_clip(velocity), clip(start), *how)
    return made["video"]
