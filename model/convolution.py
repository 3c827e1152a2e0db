"""Convolutions of the VAEs: laid out and run as a CPU is fastest with them, and the clips that they make.

A pixel's channels lie beside each other (channels last): of a weight, of what goes in and of what comes out.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from dailies.kernels import processor
from dailies.kernels.around_conv import channels_adjacent

Module = TypeVar("Module", bound=nn.Module)

# of a 3 x 3 x 3 convolution in bf16 on AMX: the channels whose weights stay in a core's 2 MB of cache beside what they
# meet, and the cells from which it pays to take them apart
CACHED_CHANNELS, MANY_CELLS = 256, 1024


def channels_last(vae: Module) -> Module:
    """Lay the convolutions' weights out so that a CPU runs them about twice as fast, in place; the last bits change."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return vae


def convolve(conv: nn.Conv2d | nn.Conv3d, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """conv(x), or with `weight` in place of its own.

    On a CPU by oneDNN whatever the shape: torch gives small fp32 inputs, such as one frame, to a loop that is five
    times slower.
    """
    weight = conv.weight if weight is None else weight
    if x.is_cpu and x.dtype == weight.dtype and processor.convolves(x.dtype) and not torch.is_autocast_enabled("cpu"):
        if falls_out_of_cache(weight, x):
            return convolve_by_channels(conv, x, weight)
        return torch.mkldnn_convolution(x, weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups)
    return conv._conv_forward(x, weight, conv.bias)


def falls_out_of_cache(weight: Tensor, x: Tensor) -> bool:
    """Whether oneDNN fetches a convolution's weights again and again from memory, which takes it twice the time."""
    channels, cells, taps = x.shape[1], x.shape[2:].numel(), weight.shape[2:].numel()
    return (x.dtype == torch.bfloat16 and taps == 27 and channels == weight.shape[1] and channels > CACHED_CHANNELS
            and channels % CACHED_CHANNELS == 0 and cells >= MANY_CELLS and processor.has_bf16_tiles())


def convolve_by_channels(conv: nn.Conv3d, x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of so many channels after so many, summed; each sum but the last is rounded once more."""
    said = conv.padding, conv.stride, conv.dilation, 1
    some = slice(CACHED_CHANNELS)
    y = torch.mkldnn_convolution(x[:, some], weight[:, some], conv.bias, *said)
    for start in range(CACHED_CHANNELS, x.shape[1], CACHED_CHANNELS):
        some = slice(start, start + CACHED_CHANNELS)
        y += torch.mkldnn_convolution(x[:, some], weight[:, some], None, *said)
    return y


def unbiased(conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """conv(x) without its bias, which torch would add in a pass of its own."""
    y = conv._conv_forward(x, conv.weight, None)
    return adjacent(y) if y.ndim == 5 else y


def adjacent(x: Tensor) -> Tensor:
    """x [B, C, T, H, W] as kernels/around_conv takes it: as it is where cuDNN made it, or else a copy."""
    return x if channels_adjacent(x) else x.contiguous(memory_format=torch.channels_last_3d)


def empty_clip(x: Tensor, frames: int, height: int | None = None) -> Tensor:
    return empty((*x.shape[:2], frames, height or x.shape[3], x.shape[4]), x)


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


def as_frames(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def as_clip(frames: Tensor, clips: int) -> Tensor:
    return frames.unflatten(0, (clips, -1)).transpose(1, 2)
