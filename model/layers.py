"""What the transformer families share: RMS norm, rotary positions in three axes, timestep features, dense attention.

Precision, for every family: linear and convolution weights may be bf16, and such a layer casts what it is given; norm
gains and modulation stay fp32, so the residual stream is fp32 by promotion (specification: Linum v2 release, under
autocast).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.kernels import processor


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its own weight."""

    @property
    def takes(self) -> torch.dtype:
        return self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.to(self.weight.dtype), self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, in fp32 on a CPU by what is the fastest there. x [.., K], weight [N, K], bias [N]."""
    if (x.is_cpu and x.dtype == weight.dtype == torch.float32 and not torch.compiler.is_compiling()
            and processor.has_faster_fp32_products() and not is_learning(x, weight)):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def is_learning(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is to have gradients, or to be made in what training chose."""
    return (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
            or torch.is_autocast_enabled("cpu"))


class FullPrecisionLinear(Linear):
    """A linear layer that stays in fp32 when the others go to bf16."""


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last axis; statistics in fp32, the quotient rounded to x's dtype before the gain."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def compute_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Set the dtype of linear and convolution weights, in place; all else stays as it is."""
    for module in model.modules():
        if takes_low_precision(module):
            module.to(dtype)
    return model


def takes_low_precision(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) and not isinstance(module, FullPrecisionLinear)


def timestep_features(timestep: Tensor, width: int) -> Tensor:
    """[B, width] in float64, cosines first: cos(t w_k), sin(t w_k) with w_k = 10000^(-2k / width).

    timestep [B] in [0, 1000].
    """
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angles = timestep.double()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def rotary_table(grid: tuple[int, int, int], head_dim: int,
                 device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """cos and sin, each [N, 1, head_dim / 2] in fp32, for the tokens of a T x H x W grid in T-major order.

    The head_dim / 2 pairs are split over T, H, W; H and W get a third each, rounded down, T the rest.
    The angle of pair i of an axis with n pairs is position * 10000^(-i / n).
    """
    pairs = head_dim // 2
    per_axis = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    cos, sin = [], []
    for axis, (length, n) in enumerate(zip(grid, per_axis, strict=True)):
        positions = torch.arange(length, dtype=torch.float64, device=device)
        angles = positions[:, None] * 10000.0 ** (-torch.arange(n, dtype=torch.float64, device=device) / n)
        along = [length if other == axis else 1 for other in range(3)]
        for parts, values in ((cos, angles.cos()), (sin, angles.sin())):
            parts.append(values.float().view(*along, n).expand(*grid, n))
    return tuple(torch.cat(parts, dim=-1).flatten(0, 2)[:, None] for parts in (cos, sin))


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn adjacent channel pairs (2i, 2i + 1) by the table's angles.  x [B, N, heads, head_dim]."""
    cos, sin = table
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def rotate_halves(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each channel of a head's first half with that of its second.  x [.., head_dim]; cos and sin
    [.., head_dim / 2], of the same axes or 1."""
    cos, sin = table
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + bias) v in v's dtype.

    q [B, N, heads, head_dim], k and v [B, M, heads, head_dim] -> [B, N, heads * head_dim].
    """
    q, k, v = (x.transpose(1, 2) for x in (q.to(v.dtype), k.to(v.dtype), v))
    bias = None if bias is None else bias.to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
