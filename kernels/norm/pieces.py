"""The norms on a CPU, a few rows at a time: what lies between two steps stays in the cache.

Whole tensors cost more in memory traffic and fresh pages than the arithmetic does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.int8_linear.int_mm import joined, quantize_rows_
from kernels.norm import reference

ROWS = 32                                               # at a time, for a single thread


def rows_at_once() -> int:
    """More for each of several threads, since all wait for each other after every step."""
    threads = torch.get_num_threads()
    return ROWS if threads == 1 else 2 * ROWS * threads


def modulated_norm(x: Tensor, update: Tensor | None, gate: Tensor | None, gain: Tensor | None, bias: Tensor | None,
                   scale: Tensor | None, shift: Tensor | None, eps: float, output: str) -> list[Tensor]:
    if output == "blocks":                             # their tiles are many rows, and no CPU model runs on them
        return reference.modulated_norm(x, update, gate, gain, bias, scale, shift, eps, output)
    batch, tokens, width = x.shape
    step = rows_at_once()
    stream = x if update is None else torch.empty_like(x)
    y = torch.empty_like(x, dtype=torch.int8 if output == "rows" else getattr(torch, output))
    scales = torch.empty(batch, tokens) if output == "rows" else None
    spare = torch.empty(step, width) if output == "rows" else None
    for sample in range(batch):
        factor, offset = affine(sample, gain, bias, scale, shift)
        for start in range(0, tokens, step):
            at = sample, slice(start, start + step)
            if update is not None:
                joined(x[at], update[at], None if gate is None else gate[sample], out=stream[at])
            normed = F.layer_norm(stream[at].float(), (width,), factor, offset, eps)
            if scales is None:
                y[at] = normed
            else:
                quantize_rows_(normed, spare[:len(normed)], y[at], scales[at][:, None])
    return [*([] if update is None else [stream]), y, *([] if scales is None else [scales])]


def affine(sample: int, gain: Tensor | None, bias: Tensor | None, scale: Tensor | None,
           shift: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(norm * gain + bias) * (1 + scale) + shift as norm * factor + offset."""
    factor, offset = (None if part is None else part.float() for part in (gain, bias))
    if scale is not None:
        grow = 1 + scale[sample, 0].float()
        factor, offset = grow if factor is None else factor * grow, None if offset is None else offset * grow
    if shift is not None:
        offset = shift[sample, 0].float() if offset is None else offset + shift[sample, 0].float()
    return factor, offset


def rms_rope(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float, dtype: torch.dtype) -> Tensor:
    batch, tokens, width = x.shape
    step = rows_at_once()
    turn, gain = torch.complex(cos.float(), sin.float()), gain.float()
    y = torch.empty(batch, tokens, heads, width // heads, dtype=dtype, device=x.device)
    for sample in range(batch):
        for start in range(0, tokens, step):
            rows = slice(start, start + step)
            part = x[sample, rows].to(torch.float32, copy=True)
            part *= inverse_rms(part, eps)
            part *= gain
            pairs = torch.view_as_complex(part.view(len(part), heads, -1, 2))
            pairs *= turn[rows]
            y[sample, rows] = part.view(len(part), heads, -1)
    return y


def rms_norm(x: Tensor, gain: Tensor, eps: float, step: int = ROWS) -> Tensor:
    """x / rms(x) * gain over the last axis, rounded once, to x's dtype.  step: of rows_at_once."""
    rows, y, gain = x.reshape(-1, x.shape[-1]), torch.empty_like(x), gain.float()
    into = y.view(-1, x.shape[-1])
    for start in range(0, len(rows), step):
        part = rows[start:start + step].to(torch.float32, copy=True)
        into[start:start + step] = part.mul_(inverse_rms(part, eps)).mul_(gain)
    return y


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
