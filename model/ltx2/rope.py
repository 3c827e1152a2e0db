"""Where the tokens of LTX-2 lie in time and space, and the rotary tables that are made of it.

Letters  B clips  N tokens  A axes: time, height, width, or time alone  D width of an attention, of all its heads
Source   LTX-2, ltx-core: positions in seconds and pixels, angles over the full width, so every head has its own.
"""

from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

VIDEO_STRIDES = (8, 32, 32)                             # of the VAE: frames, pixel rows, pixel columns of a latent cell
AUDIO_STRIDE = 4                                        # rows of the mel spectrogram that an audio latent covers


class RotaryTable(NamedTuple):
    """cos and sin [B or 1, N, heads, head_dim / 2] in fp32; halves: a channel turns with that head_dim / 2 on."""

    cos: Tensor
    sin: Tensor
    halves: bool


def video_positions(shape: tuple[int, int, int], fps: Fraction | float) -> Tensor:
    """[1, 3, N, 2] fp32: where each token of a latent grid (T, H, W) begins and ends, in seconds, pixels, pixels.

    Tokens in the order T, H, W. The first latent step covers one frame, each other eight.
    """
    begins = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in shape), indexing="ij")
    bounds = []
    for axis, (begin, stride) in enumerate(zip(begins, VIDEO_STRIDES, strict=True)):
        span = torch.stack((begin.flatten(), begin.flatten() + 1), dim=-1) * stride
        bounds.append((span + (1 - stride)).clamp(min=0) / float(fps) if axis == 0 else span)
    return torch.stack(bounds)[None]


def audio_positions(count: int) -> Tensor:
    """[1, 1, N, 2] fp32: where each of `count` audio latents begins and ends, in seconds; the first is 10 ms long."""
    begin = torch.arange(count, dtype=torch.float32)
    span = torch.stack((begin, begin + 1), dim=-1) * AUDIO_STRIDE
    return ((span + (1 - AUDIO_STRIDE)).clamp(min=0) * 160 / 16000)[None, None]      # in this order, as the release


def middles(positions: Tensor) -> Tensor:
    """[B, A, N] of positions [B, A, N, 2]."""
    return (positions[..., 0] + positions[..., 1]) / 2


def rotary(places: Tensor, most: tuple[float, ...], width: int, heads: int, *, theta: float = 10000.0,
           halves: bool = True, exact: bool = True) -> RotaryTable:
    """The table of tokens that lie at `places` [B, A, N], for an attention of this width.

    most: what each axis is divided by.  exact: the frequencies in float64, as every release says; angles are fp32.
    Angles have the frequency as their slow index and the axis as the fast one; what is left of the width does not turn.
    """
    axes = len(most)
    count = width // (2 * axes)
    dtype = torch.float64 if exact else torch.float32
    grid = torch.linspace(0.0, 1.0, count, dtype=dtype, device=places.device)
    frequencies = (torch.pow(theta, grid) * torch.pi / 2.0).float()
    share = torch.stack([places[:, axis] / most[axis] for axis in range(axes)], dim=-1)         # [B, N, A]
    angles = ((share[..., None] * 2 - 1) * frequencies).transpose(-1, -2).flatten(2)
    cos, sin = angles.cos(), angles.sin()
    still = width // 2 - count * axes
    cos = torch.cat((torch.ones_like(cos[..., :still]), cos), dim=-1)
    sin = torch.cat((torch.zeros_like(sin[..., :still]), sin), dim=-1)
    return RotaryTable(cos.unflatten(-1, (heads, -1)), sin.unflatten(-1, (heads, -1)), halves)
