"""Layer norm with residual and modulation, RMS norm, and that with rotary positions, in plain torch; to be believed."""

import torch
from torch import Tensor

from dailies.kernels.int8_linear import reference as int8


def modulated_norm(x: Tensor, update: Tensor | None, gate: Tensor | None, gain: Tensor | None, bias: Tensor | None,
                   scale: Tensor | None, shift: Tensor | None, eps: float, output: str) -> list[Tensor]:
    kept = [] if update is None else [joined(x, update, gate)]
    stream = (kept or [x])[0].float()
    centred = stream - stream.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if gain is not None:
        y = y * gain.float()
    if bias is not None:
        y = y + bias.float()
    if scale is not None:
        y = y * (1 + scale.float())
    if shift is not None:
        y = y + shift.float()
    if output == "rows":
        return [*kept, *int8.quantize_rows(y)]
    if output == "blocks":
        return [*kept, *int8.quantize_blocks(y)]
    return [*kept, y.to(getattr(torch, output))]


def joined(x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate * update in x's dtype."""
    return (x.float() + (update.float() if gate is None else gate.float() * update.float())).to(x.dtype)


def rms_rope(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float, dtype: torch.dtype) -> Tensor:
    a, b = rms_norm(x, gain, eps, torch.float32).unflatten(-1, (heads, -1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(dtype)


def rms_norm(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * gain.float()).to(dtype)
