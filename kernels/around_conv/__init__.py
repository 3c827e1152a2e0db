"""What stands around the convolutions of a video VAE, each in one pass over memory, written where it is read next.

A convolution in time reads a window of frames: those it remembers, then the new ones. The norm with its SiLU is written
straight into that window; the bias of the convolution before it rides along. Behind a block's last convolution its bias
and the residual are one pass, and before that of an upsampling the larger picture is made in one.

Clips are [B, C, T, H, W] and lie with the channels of a pixel adjacent and the pixels of a frame in order
(channels_last_3d); frames and clips may be further apart, as in a window or a band.

There is no implementation for a CPU, on which the VAE runs torch's own operators: there it is the reference.
"""

from functools import partial

import torch
from torch import Tensor

from dailies.kernels import FLOATS, Impl, chosen_impl, implementation

around_conv_impl = partial(chosen_impl, on_cpu="reference")


def norm_silu(x: Tensor, gamma: Tensor, out: Tensor, *, bias: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """silu(z / max(|z|, 1e-12) * sqrt(C) * gamma) with z = x + bias, |z| over the channels; written to out.

    x, out [B, C, T, H, W]; gamma, bias [C]; all fp32, bf16 or fp16. fp32 inside, rounded once, to out's dtype. out may
    be x.  Returns out.  Raises ValueError for any other shape, layout or dtype.
    """
    check_clips("norm_silu", x, x.shape, {"x": x, "out": out}, {"gamma": gamma, "bias": bias})
    torch.ops.dailies.norm_silu(x, gamma, bias, out, around_conv_impl(impl, x))
    return out


def add_bias(x: Tensor, bias: Tensor, out: Tensor, *, residual: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """x + bias + residual, written to out, which may be x or the residual.

    x, residual, out [B, C, T, H, W]; bias [C]; dtypes, rounding and what is raised as norm_silu.  Returns out.
    """
    check_clips("add_bias", x, x.shape, {"x": x, "out": out, "residual": residual}, {"bias": bias})
    torch.ops.dailies.add_bias(x, bias, residual, out, around_conv_impl(impl, x))
    return out


def enlarge(x: Tensor, out: Tensor, *, bias: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """x + bias with every pixel four times, as 2 x 2; written to out.

    x [B, C, T, H, W], out [B, C, T, 2H, 2W].  Or x [B, 2C, T, H, W], out [B, C, 2T, 2H, 2W]: then the first half of
    x's channels is the even frames, the second the odd.  bias like x's channels; dtypes, rounding and what is raised
    as norm_silu.  Returns out.
    """
    check_clips("enlarge", x, x.shape, {"x": x}, {"bias": bias})
    batch, channels, frames, height, width = x.shape
    pairs = 2 if out.ndim == 5 and channels == 2 * out.shape[1] else 1
    check_clips("enlarge", x, (batch, channels // pairs, pairs * frames, 2 * height, 2 * width), {"out": out}, {})
    torch.ops.dailies.enlarge(x, bias, out, around_conv_impl(impl, x))
    return out


def check_clips(name: str, x: Tensor, shape: tuple[int, ...], clips: dict[str, Tensor | None],
          vectors: dict[str, Tensor | None]) -> None:
    """Raises ValueError for the first clip that is not of this shape, laid out as it should be, or the first vector
    that is not as long as x has channels.
    """
    for part, tensor in (*clips.items(), *vectors.items()):
        if tensor is None:
            continue
        wanted = tuple(shape if part in clips else x.shape[1:2])
        if tuple(tensor.shape) != wanted or tensor.dtype not in FLOATS or tensor.device != x.device:
            raise ValueError(f"{name} needs {part} {list(wanted)}, fp32, bf16 or fp16, on {x.device}; "
                             f"got {list(tensor.shape)}, {tensor.dtype}, on {tensor.device}")
        if part in clips and not channels_adjacent(tensor):
            raise ValueError(f"{name} needs {part} [B, C, T, H, W] with adjacent channels; got {list(tensor.shape)}, "
                             f"strides {tensor.stride()}. Lay it out: "
                             ".contiguous(memory_format=torch.channels_last_3d)")
        if part in vectors and tensor.stride(0) != 1 and len(tensor) > 1:
            raise ValueError(f"{name} needs {part} contiguous; got stride {tensor.stride(0)}")


def channels_adjacent(x: Tensor) -> bool:
    """Whether a pixel's channels are adjacent and a frame's pixels in order; the stride of an axis of one is moot."""
    if x.ndim != 5:
        return False
    channels, width = x.shape[1], x.shape[4]
    wanted = {1: 1, 4: channels, 3: width * channels}
    return all(x.shape[axis] == 1 or x.stride(axis) == stride for axis, stride in wanted.items())


@torch.library.custom_op("dailies::norm_silu", mutates_args=("out",))
def norm_silu_op(x: Tensor, gamma: Tensor, bias: Tensor | None, out: Tensor, impl: str) -> None:
    return implementation("around_conv", impl).norm_silu(x, gamma, bias, out)


@torch.library.custom_op("dailies::add_bias", mutates_args=("out",))
def add_bias_op(x: Tensor, bias: Tensor, residual: Tensor | None, out: Tensor, impl: str) -> None:
    return implementation("around_conv", impl).add_bias(x, bias, residual, out)


@torch.library.custom_op("dailies::enlarge", mutates_args=("out",))
def enlarge_op(x: Tensor, bias: Tensor | None, out: Tensor, impl: str) -> None:
    return implementation("around_conv", impl).enlarge(x, bias, out)


@norm_silu_op.register_fake
def _(x: Tensor, gamma: Tensor, bias: Tensor | None, out: Tensor, impl: str) -> None:
    return None


@add_bias_op.register_fake
def _(x: Tensor, bias: Tensor, residual: Tensor | None, out: Tensor, impl: str) -> None:
    return None


@enlarge_op.register_fake
def _(x: Tensor, bias: Tensor | None, out: Tensor, impl: str) -> None:
    return None
