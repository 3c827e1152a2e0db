"""A packed INT8 layer and the norm behind it, on a CPU: what the layer makes is normed while it is in the cache.

The layer's result is not rounded on the way, which the two operators one after the other do.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dailies.kernels.int8_linear import Quantized
from dailies.kernels.int8_linear.packed import Packed, parts_of, products
from dailies.kernels.norm import pieces


def modulated_norm_(x: Tensor, y: Tensor | Quantized, layer: Packed, *, gate: Tensor | None = None,
                    gain: Tensor | None = None, bias: Tensor | None = None, scale: Tensor | None = None,
                    shift: Tensor | None = None, eps: float = 1e-6) -> Quantized:
    """x += gate * layer(y), and the norm of that in INT8: dailies.kernels.norm.quantized_modulated_norm in rows, in place.

    x [B, N, D] fp32 or bf16, y [B, N, K] floating or of quantize_rows; the rest as there.
    """
    return Quantized(*torch.ops.dailies.packed_modulated_norm_(x, *parts_of(y), *layer, gate, gain, bias, scale, shift,
                                                               eps))


def rms_rope(x: Tensor | Quantized, layer: Packed, gain: Tensor, rope: tuple[Tensor, Tensor], *, heads: int, eps: float,
             dtype: torch.dtype) -> Tensor:
    """Queries or keys [B, N, heads, D / heads] in `dtype`: layer(x), normed over all heads and turned.

    x [B, N, K], floating or of quantize_rows.  gain [D]; rope as dailies.kernels.norm.rms_rope takes it.
    """
    return torch.ops.dailies.packed_rms_rope(*parts_of(x), *layer, gain, *rope, heads, eps, dtype)


def rms_norm(x: Tensor | Quantized, layer: Packed, gain: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """layer(x) / rms * gain over the last axis, [B, N, D] in `dtype`.

    x [B, N, K], floating or of quantize_rows.  gain [D].
    """
    return torch.ops.dailies.packed_rms_norm(*parts_of(x), *layer, gain, eps, dtype)


def per_sample(x: Tensor, scales: Tensor | None, layer: Packed) -> Iterator[Iterator[tuple[slice, Tensor]]]:
    for sample in range(len(x)):
        yield products(x[sample], None if scales is None else scales[sample], layer)


@torch.library.custom_op("dailies::packed_modulated_norm_", mutates_args=("x",))
def packed_modulated_norm_op(
        x: Tensor, y: Tensor, y_scales: Tensor | None, weight: Tensor, scales: Tensor, zeros: Tensor,
        layer_bias: Tensor | None, gate: Tensor | None, gain: Tensor | None, bias: Tensor | None, scale: Tensor | None,
        shift: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    updates = per_sample(y, y_scales, Packed(weight, scales, zeros, layer_bias))
    values, y_scales = pieces.norms_of(x, updates, x, gate, gain, bias, scale, shift, eps, "rows")
    return values, y_scales


@packed_modulated_norm_op.register_fake
def _(x: Tensor, y: Tensor, y_scales: Tensor | None, weight: Tensor, scales: Tensor, zeros: Tensor,
      layer_bias: Tensor | None, gate: Tensor | None, gain: Tensor | None, bias: Tensor | None, scale: Tensor | None,
      shift: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.custom_op("dailies::packed_rms_rope", mutates_args=())
def packed_rms_rope_op(x: Tensor, x_scales: Tensor | None, weight: Tensor, scales: Tensor, zeros: Tensor,
                       bias: Tensor | None, gain: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float,
                       dtype: torch.dtype) -> Tensor:
    parts = per_sample(x, x_scales, Packed(weight, scales, zeros, bias))
    return pieces.turned(parts, (*x.shape[:2], len(scales)), gain, cos, sin, heads, eps, dtype)


@packed_rms_rope_op.register_fake
def _(x: Tensor, x_scales: Tensor | None, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None,
      gain: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:2], heads, len(scales) // heads), dtype=dtype)


@torch.library.custom_op("dailies::packed_rms_norm", mutates_args=())
def packed_rms_norm_op(x: Tensor, x_scales: Tensor | None, weight: Tensor, scales: Tensor, zeros: Tensor,
                       bias: Tensor | None, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    y, gain = torch.empty((*x.shape[:2], len(scales)), dtype=dtype), gain.float()
    for into, parts in zip(y, per_sample(x, x_scales, Packed(weight, scales, zeros, bias)), strict=True):
        for rows, part in parts:
            into[rows] = pieces.normed_(part, gain, eps)
    return y


@packed_rms_norm_op.register_fake
def _(x: Tensor, x_scales: Tensor | None, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None,
      gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:2], len(scales)), dtype=dtype)
