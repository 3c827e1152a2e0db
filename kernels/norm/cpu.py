"""The norms on a CPU, a few rows at a time: what lies between two steps stays in the cache.

Whole tensors cost more in memory traffic and fresh pages than the arithmetic does.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dailies.kernels.int8_linear import Packed
from dailies.kernels.int8_linear.cpu import join_into, packed_products, quantize_rows_, row_slices
from dailies.kernels.norm import Affine, Update
from dailies.kernels.norm.reference import join_update

NORM_ROWS = 32                                          # at a time, for a single thread
_Rows = Iterable[tuple[slice, Tensor]]                   # of one sample: which, and those in fp32, which are used up


def modulated_norm(x: Tensor, updates: Sequence[Update], affine: Affine, keep: bool, eps: float, output: str,
                   centred: bool) -> list[Tensor]:
    for earlier in updates[:-1]:                       # in a pass of its own: where passes count it is not asked for
        x = join_update(x, earlier)
    step = rows_of_norm()
    value, gate = updates[-1] if updates else (None, None)
    parts = [[(rows, None if value is None else value[sample, rows]) for rows in row_slices(x.shape[1], step)]
             for sample in range(len(x))]
    stream = torch.empty_like(x) if updates else x
    results = joined_norms(x, parts, stream, gate, affine, eps, output, centred)
    return [stream, *results] if keep and updates else results


def packed_modulated_norm_(x: Tensor, y: Tensor, y_scales: Tensor | None, layer: Packed, gate: Tensor | None,
                           affine: Affine, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    values, scales = joined_norms(x, products_of_samples(y, y_scales, layer), x, gate, affine, eps, "rows", centred)
    return values, scales


def joined_norms(x: Tensor, updates: Iterable[Iterable[tuple[slice, Tensor | None]]], stream: Tensor,
                 gate: Tensor | None, affine: Affine, eps: float, output: str, centred: bool) -> list[Tensor]:
    """The norm of x and its updates, and scales if that is int8.

    updates: per sample which rows, and what joins them, if any.  stream: where both go; it may be x.
    """
    batch, tokens, width = x.shape
    y = torch.empty_like(x, dtype=torch.int8 if output == "rows" else getattr(torch, output))
    scales = torch.empty(batch, tokens) if output == "rows" else None
    spare = None
    for sample, parts in enumerate(updates):
        factor, offset = factor_offset(affine, sample)
        for rows, update in parts:
            at = sample, rows
            if update is not None:
                join_into(x[at], update, None if gate is None else gate[sample], out=stream[at])
            if centred:
                normed = F.layer_norm(stream[at].float(), (width,), factor, offset, eps)
            elif output == "float32":                   # at once to where it goes
                rms_modulated(stream[at].float(), factor, offset, eps, out=y[at])
                continue
            else:
                normed = rms_modulated(stream[at].float(), factor, offset, eps)
            if scales is None:
                y[at] = normed
            else:
                spare = torch.empty_like(normed) if spare is None or len(spare) < len(normed) else spare
                quantize_rows_(normed, spare[:len(normed)], y[at], scales[at][:, None])
    return [y, *([] if scales is None else [scales])]


def factor_offset(affine: Affine, sample: int) -> tuple[Tensor | None, Tensor | None]:
    """(norm * gain + bias) * (1 + scale) + shift as norm * factor + offset."""
    factor, offset = (None if part is None else part.float() for part in (affine.gain, affine.bias))
    if affine.scale is not None:
        grow = 1 + affine.scale[sample, 0].float()
        factor, offset = grow if factor is None else factor * grow, None if offset is None else offset * grow
    if affine.shift is not None:
        shift = affine.shift[sample, 0].float()
        offset = shift if offset is None else offset + shift
    return factor, offset


def rms_rope(q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float,
             dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    turned_q, turned_k = (normed_rope([fp32_rows(sample) for sample in x], x.shape, gain, cos, sin, heads, eps, dtype)
                          for x, gain in ((q, q_gain), (k, k_gain)))
    return turned_q, turned_k


def packed_rms_rope(x: Tensor, x_scales: Tensor | None, layer: Packed, gain: Tensor, cos: Tensor, sin: Tensor,
                    heads: int, eps: float, dtype: torch.dtype, halves: bool = False) -> Tensor:
    shape, samples = (*x.shape[:2], len(gain)), products_of_samples(x, x_scales, layer)
    return (normed_halves if halves else normed_rope)(samples, shape, gain, cos, sin, heads, eps, dtype)


def rms_rope_halves(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float,
                    dtype: torch.dtype) -> Tensor:
    return normed_halves([fp32_rows(sample) for sample in x], x.shape, gain, cos, sin, heads, eps, dtype)


def normed_halves(samples: Iterable[_Rows], shape: tuple[int, int, int], gain: Tensor, cos: Tensor, sin: Tensor,
                  heads: int, eps: float, dtype: torch.dtype) -> Tensor:
    """As normed_rope, of halves of a head."""
    batch, tokens, width = shape
    gain, spare = gain.float(), None
    y = torch.empty(batch, tokens, heads, 2, width // heads // 2, dtype=dtype, device=gain.device)
    for into, parts in zip(y, samples, strict=True):
        for rows, part in parts:
            a, b = rms_norm_(part, gain, eps).view(len(part), heads, 2, -1).unbind(2)
            if spare is None or len(spare) < len(part):
                spare = torch.empty_like(a, memory_format=torch.contiguous_format)
            turned, c, s = spare[:len(part)], cos[rows], sin[rows]
            for half, with_cos, with_sin, sign in ((0, a, b, -1), (1, b, a, 1)):
                if dtype == torch.float32:              # at once to where it goes
                    torch.mul(with_cos, c, out=into[rows, :, half]).addcmul_(with_sin, s, value=sign)
                else:
                    into[rows, :, half] = torch.mul(with_cos, c, out=turned).addcmul_(with_sin, s, value=sign)
    return y.flatten(3)


def normed_rope(samples: Iterable[_Rows], shape: tuple[int, int, int], gain: Tensor, cos: Tensor, sin: Tensor,
                heads: int, eps: float, dtype: torch.dtype) -> Tensor:
    """shape [B, N, D]: of all samples."""
    batch, tokens, width = shape
    turn, gain = torch.complex(cos.float(), sin.float()), gain.float()
    y = torch.empty(batch, tokens, heads, width // heads, dtype=dtype, device=gain.device)
    for into, parts in zip(y, samples, strict=True):
        for rows, part in parts:
            pairs = torch.view_as_complex(rms_norm_(part, gain, eps).view(len(part), heads, -1, 2))
            pairs *= turn[rows]
            into[rows] = part.view(len(part), heads, -1)
    return y


def rms_norm(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    rows = x.reshape(1, -1, x.shape[-1])
    return normed_rows([fp32_rows(rows[0])], rows.shape, gain, eps, dtype).view(x.shape)


def packed_rms_norm(x: Tensor, x_scales: Tensor | None, layer: Packed, gain: Tensor, eps: float,
                    dtype: torch.dtype) -> Tensor:
    return normed_rows(products_of_samples(x, x_scales, layer), (*x.shape[:2], len(gain)), gain, eps, dtype)


def normed_rows(samples: Iterable[_Rows], shape: tuple[int, int, int], gain: Tensor, eps: float,
                dtype: torch.dtype) -> Tensor:
    """shape [B, N, D]: of all samples."""
    y, gain = torch.empty(shape, dtype=dtype), gain.float()
    for into, parts in zip(y, samples, strict=True):
        for rows, part in parts:
            into[rows] = rms_norm_(part, gain, eps)
    return y


def rms_norm_(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * gain, in place."""
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    x.mul_(mean_square.add_(eps).rsqrt_())
    return x if gain is None else x.mul_(gain)


def rms_modulated(x: Tensor, factor: Tensor | None, offset: Tensor | None, eps: float,
                  out: Tensor | None = None) -> Tensor:
    """x / rms(x) * factor + offset."""
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    y = torch.mul(x, mean_square.add_(eps).rsqrt_(), out=out)
    if factor is None:
        return y if offset is None else y.add_(offset)
    return y.mul_(factor) if offset is None else torch.addcmul(offset, y, factor, out=y)


def fp32_rows(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of x [M, D], a few at a time: which, and a copy in fp32."""
    for rows in row_slices(len(x), rows_of_norm()):
        yield rows, x[rows].to(torch.float32, copy=True)


def products_of_samples(x: Tensor, scales: Tensor | None, layer: Packed) -> Iterator[_Rows]:
    for sample in range(len(x)):
        yield packed_products(x[sample], None if scales is None else scales[sample], layer)


def rows_of_norm() -> int:
    """At once; more for each of several threads, since all wait for each other after every step."""
    threads = torch.get_num_threads()
    return NORM_ROWS if threads == 1 else 2 * NORM_ROWS * threads
