"""Layer norm with residual and modulation, RMS norm, and that with rotary positions, in plain torch; to be believed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dailies.kernels.int8_linear import reference as int8
from dailies.kernels.norm import Affine, Update


def modulated_norm(x: Tensor, updates: Sequence[Update], affine: Affine, keep: bool, eps: float, output: str,
                   about_mean: bool) -> list[Tensor]:
    for update in updates:
        x = join_update(x, update)
    centred = x.float() - x.float().mean(-1, keepdim=True) if about_mean else x.float()
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if affine.gain is not None:
        y = y * affine.gain.float()
    if affine.bias is not None:
        y = y + affine.bias.float()
    if affine.scale is not None:
        y = y * (1 + affine.scale.float())
    if affine.shift is not None:
        y = y + affine.shift.float()
    kept = [x] if keep and updates else []
    if output == "rows":
        return [*kept, *int8.quantize_rows(y)]
    if output == "blocks":
        return [*kept, *int8.quantize_blocks(y)]
    return [*kept, y.to(getattr(torch, output))]


def join_update(x: Tensor, update: Update) -> Tensor:
    """x + gate * value in x's dtype."""
    value = update.value.float()
    return (x.float() + (value if update.gate is None else update.gate.float() * value)).to(x.dtype)


def rms_rope(q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float,
             dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    def turned(x: Tensor, gain: Tensor) -> Tensor:
        a, b = rms_norm(x, gain, eps, torch.float32).unflatten(-1, (heads, -1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(dtype)
    return turned(q, q_gain), turned(k, k_gain)


def rms_rope_halves(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float,
                    dtype: torch.dtype) -> Tensor:
    a, b = rms_norm(x, gain, eps, torch.float32).unflatten(-1, (heads, 2, -1)).unbind(-2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(dtype)


def rms_norm(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * gain.float()).to(dtype)
