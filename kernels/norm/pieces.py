"""The norms on a CPU, a few rows at a time: what lies between two steps stays in the cache.

Whole tensors cost more in memory traffic and fresh pages than the arithmetic does.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dailies.kernels.int8_linear.int_mm import joined, pieces, quantize_rows_
from dailies.kernels.norm import reference

ROWS = 32                                               # at a time, for a single thread


def rows_at_once() -> int:
    """More for each of several threads, since all wait for each other after every step."""
    threads = torch.get_num_threads()
    return ROWS if threads == 1 else 2 * ROWS * threads


def modulated_norm(x: Tensor, update: Tensor | None, gate: Tensor | None, gain: Tensor | None, bias: Tensor | None,
                   scale: Tensor | None, shift: Tensor | None, eps: float, output: str) -> list[Tensor]:
    if output == "blocks":                             # their tiles are many rows, and no CPU model runs on them
        return reference.modulated_norm(x, update, gate, gain, bias, scale, shift, eps, output)
    step = rows_at_once()
    updates = [[(rows, None if update is None else update[sample, rows]) for rows in pieces(x.shape[1], step)]
               for sample in range(len(x))]
    stream = x if update is None else torch.empty_like(x)
    results = norms_of(x, updates, stream, gate, gain, bias, scale, shift, eps, output)
    return results if update is None else [stream, *results]


def norms_of(x: Tensor, updates: Iterable[Iterable[tuple[slice, Tensor | None]]], stream: Tensor, gate: Tensor | None,
             gain: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float,
             output: str) -> list[Tensor]:
    """The norm of x and its updates, and scales if that is int8.

    updates: per sample which rows, and what joins them, if any.  stream: where both go; it may be x.
    """
    batch, tokens, width = x.shape
    y = torch.empty_like(x, dtype=torch.int8 if output == "rows" else getattr(torch, output))
    scales = torch.empty(batch, tokens) if output == "rows" else None
    spare = None
    for sample, parts in enumerate(updates):
        factor, offset = affine(sample, gain, bias, scale, shift)
        for rows, update in parts:
            at = sample, rows
            if update is not None:
                joined(x[at], update, None if gate is None else gate[sample], out=stream[at])
            normed = F.layer_norm(stream[at].float(), (width,), factor, offset, eps)
            if scales is None:
                y[at] = normed
            else:
                spare = torch.empty_like(normed) if spare is None or len(spare) < len(normed) else spare
                quantize_rows_(normed, spare[:len(normed)], y[at], scales[at][:, None])
    return [y, *([] if scales is None else [scales])]


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
    return turned([fp32_rows(sample, rows_at_once()) for sample in x], x.shape, gain, cos, sin, heads, eps, dtype)


def turned(parts: Iterable[Iterable[tuple[slice, Tensor]]], shape: tuple[int, int, int], gain: Tensor, cos: Tensor,
           sin: Tensor, heads: int, eps: float, dtype: torch.dtype) -> Tensor:
    """parts: per sample which rows, and those rows in fp32, which are used up.  shape [B, N, D] of all."""
    batch, tokens, width = shape
    turn, gain = torch.complex(cos.float(), sin.float()), gain.float()
    y = torch.empty(batch, tokens, heads, width // heads, dtype=dtype, device=gain.device)
    for into, pieces_of_sample in zip(y, parts, strict=True):
        for rows, part in pieces_of_sample:
            pairs = torch.view_as_complex(normed_(part, gain, eps).view(len(part), heads, -1, 2))
            pairs *= turn[rows]
            into[rows] = part.view(len(part), heads, -1)
    return y


def rms_norm(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * gain over the last axis, rounded once, to `dtype`."""
    y, gain = torch.empty(x.shape, dtype=dtype), gain.float()
    into = y.view(-1, x.shape[-1])
    for rows, part in fp32_rows(x.reshape(-1, x.shape[-1]), rows_at_once()):
        into[rows] = normed_(part, gain, eps)
    return y


def fp32_rows(x: Tensor, step: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of x [M, D], so many at a time: which, and a copy in fp32."""
    for rows in pieces(len(x), step):
        yield rows, x[rows].to(torch.float32, copy=True)


def normed_(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / rms(x) * gain, in place."""
    return x.mul_(inverse_rms(x, eps)).mul_(gain)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
