"""INT8 linear layers, y = x W^T with 8-bit operands: two schemes, with the work that follows in the epilogue.

rows    a scale per token of x and per output channel of W, s = max(amax, 1e-8) / 127. Sums stay in int32 over all of K,
        so the scales are applied once: the faster scheme, and the slightly more exact one.
blocks  a scale per 128 x 128 tile of x and of W, s = max(amax, 1e-8) / 128: how TurboDiffusion publishes its weights.
        Sums are int32 within 128 of K and fp32 across. README.md: where we leave the published code; measurements.

A CPU with INT8 products runs layers whose weight is packed once, as its library multiplies it: pack() and what follows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dailies.kernels import FLOATS, Impl, chosen_impl, implementation, processor
from dailies.kernels.int8_linear.reference import BLOCK, spread_scales

MAX_SUM = 2 ** 31 // 128 ** 2                          # terms of 128 * 128 that an int32 is sure to hold


class Quantized(NamedTuple):
    """An int8 tensor and what to multiply it by.  values [..., N, K]; scales fp32, [..., N] or one per tile."""

    values: Tensor
    scales: Tensor


class Packed(NamedTuple):
    """A weight [N, K] in the layout of a CPU's library, for this process alone: it cannot be saved."""

    values: Tensor
    scales: Tensor                                     # fp32 [N]
    zeros: Tensor                                      # int32 [N]: the weights are symmetric
    bias: Tensor | None                                # fp32 [N]


def quantize_rows(x: Tensor, *, impl: Impl = "auto") -> Quantized:
    """One scale per row: of activations x [..., K] per token, of a weight [N, K] per output channel.

    values like x, round_half_even(x * (127 / amax)); scales x.shape[:-1] = amax / 127 with amax = max(1e-8, max|row|).
    Raises ValueError for x that is not floating point.
    """
    return Quantized(*torch.ops.dailies.quantize_rows(check_float(x), chosen_impl(impl, x)))


def quantize_blocks(x: Tensor, *, impl: Impl = "auto") -> Quantized:
    """One scale per tile of 128 x 128, of a weight [N, K] or of activations [M, K] or [B, M, K].

    values like x, round_half_even(x * (128 / amax)) cut to [-128, 127]: the largest positive value becomes 127.
    scales [..., ceil(M / 128), ceil(K / 128)] = amax / 128 with amax = max(1e-8, max|tile|). A tile never spans two
    samples, so a clip does not depend on its batch; the published code lays all samples end to end, for which give it
    [B * M, K].
    Raises ValueError for x that is not floating point, or has not 2 or 3 axes.
    """
    if check_float(x).ndim not in (2, 3):
        raise ValueError(f"quantize_blocks needs [M, K] or [B, M, K]; got {list(x.shape)}. Reshape it to rows of K")
    return Quantized(*torch.ops.dailies.quantize_blocks(x, chosen_impl(impl, x)))


def dequantize(x: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """values * scales, multiplied in fp32; for a layer that is to run as an ordinary one."""
    in_rows = x.scales.shape == x.values.shape[:-1]
    scales = x.scales[..., None] if in_rows else spread_scales(x.scales, x.values.shape)
    return (x.values.float() * scales).to(dtype)


def int8_linear(x: Tensor | Quantized, weight: Quantized, bias: Tensor | None = None, *, gelu: bool = False,
                gate: Tensor | None = None, residual: Tensor | None = None, dtype: torch.dtype | None = None,
                impl: Impl = "auto") -> Tensor:
    """residual + gate * gelu(x W^T + bias), the parts that are given, in that order, with one rounding at the end.

    x [..., K], floating (it is quantised as the weight is) or Quantized.  weight [N, K], of quantize_rows or
    quantize_blocks. bias [N].  gelu: the tanh form.  gate [B, 1, N] for x [B, M, K].  residual [..., N].
    Returns [..., N] in `dtype`; by default residual's, or x's, or bf16 for a Quantized x.
    Deterministic: each output is one sum in one order.  Raises ValueError for shapes that do not fit.
    """
    values, scales = values_scales(x)
    if scales is None:
        check_float(values)
    check_linear(values, scales, weight, bias, gate, residual)
    if dtype is None:
        dtype = residual.dtype if residual is not None else values.dtype if scales is None else torch.bfloat16
    # a CPU's product sums over all of K, which scales per block do not allow
    impl = chosen_impl(impl, values, on_cpu="cpu" if weight.scales.ndim == 1 else "reference")
    return torch.ops.dailies.int8_linear(values, scales, *weight, bias, gelu, gate, residual, dtype, impl)


def pack(weight: Quantized, bias: Tensor | None = None) -> Packed:
    """weight: of quantize_rows.  bias [N].

    Raises ValueError on a CPU without INT8 products, where oneDNN's are slow and, adding in 16 bits, wrong.
    """
    if not processor.has_int8_products():
        raise ValueError(f"a packed layer needs a CPU with INT8 products (VNNI); this is {processor.described()}. "
                         "int8_linear takes the weight as it is")
    return Packed(torch.ops.onednn.qlinear_prepack(weight.values, None), weight.scales.float(),
                  torch.zeros(len(weight.scales), dtype=torch.int32), None if bias is None else bias.float())


def packed_linear(x: Tensor | Quantized, weight: Packed, dtype: torch.dtype) -> Tensor:
    """x W^T + bias in `dtype`.  x [..., K], floating or of quantize_rows."""
    return torch.ops.dailies.packed_linear(*values_scales(x), weight, dtype)


def packed_feed_forward_(residual: Tensor, x: Quantized, into: Packed, out: Packed, gate: Tensor) -> None:
    """residual += gate * out(gelu(into(x))). What is between the layers never leaves the cache whole.

    residual [B, N, D], x [B, N, K], of quantize_rows.  gate [B, 1, D].
    """
    torch.ops.dailies.packed_feed_forward_(residual, *x, into, out, gate)


def values_scales(x: Tensor | Quantized) -> tuple[Tensor, Tensor | None]:
    """Values and, of what is quantised, scales: an operator takes tensors."""
    return x if isinstance(x, Quantized) else (x, None)


def check_float(x: Tensor) -> Tensor:
    if x.dtype not in FLOATS:
        raise ValueError(f"a tensor of fp32, bf16 or fp16 is needed; got {x.dtype}. "
                         "What is quantised already is given as Quantized")
    return x


def check_linear(x: Tensor, scales: Tensor | None, weight: Quantized, bias: Tensor | None, gate: Tensor | None,
                 residual: Tensor | None) -> None:
    (out_features, in_features), blocks = weight.values.shape, weight.scales.ndim == 2
    wanted = {"x": (x, (*x.shape[:-1], in_features))}
    if blocks:
        wanted["weight.scales"] = (weight.scales, (-(-out_features // BLOCK), -(-in_features // BLOCK)))
        tiles = (*x.shape[:-2], -(-x.shape[-2] // BLOCK), -(-in_features // BLOCK)) if x.ndim in (2, 3) else ()
        wanted["x.scales"] = (scales, tiles)
    else:
        wanted["weight.scales"] = (weight.scales, (out_features,))
        wanted["x.scales"] = (scales, tuple(x.shape[:-1]))
    wanted["bias"] = (bias, (out_features,))
    wanted["gate"] = (gate, (x.shape[0], 1, out_features) if x.ndim == 3 else "only for x [B, M, K]")
    wanted["residual"] = (residual, (*x.shape[:-1], out_features))
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"int8_linear needs {name} {shape} for x {list(x.shape)} and a weight "
                             f"[{out_features}, {in_features}]; got {list(tensor.shape)}")
    if weight.values.dtype != torch.int8 or scales is not None and x.dtype != torch.int8:
        raise ValueError(f"int8_linear needs int8 values; got a weight of {weight.values.dtype}, x of {x.dtype}")
    if in_features > MAX_SUM:
        raise ValueError(f"int8_linear sums at most {MAX_SUM} products in int32; got {in_features}. Split the layer")


@torch.library.custom_op("dailies::quantize_rows", mutates_args=())
def quantize_rows_op(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return implementation("int8_linear", impl).quantize_rows(x)


@quantize_rows_op.register_fake
def _(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("dailies::quantize_blocks", mutates_args=())
def quantize_blocks_op(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return implementation("int8_linear", impl).quantize_blocks(x)


@quantize_blocks_op.register_fake
def _(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    tiles = (*x.shape[:-2], -(-x.shape[-2] // BLOCK), -(-x.shape[-1] // BLOCK))
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(tiles, dtype=torch.float32)


@torch.library.custom_op("dailies::int8_linear", mutates_args=())
def int8_linear_op(x: Tensor, x_scales: Tensor | None, weight: Tensor, weight_scales: Tensor, bias: Tensor | None,
                   gelu: bool, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype, impl: str) -> Tensor:
    linear = implementation("int8_linear", impl).int8_linear
    return linear(x, x_scales, weight, weight_scales, bias, gelu, gate, residual, dtype)


@int8_linear_op.register_fake
def _(x: Tensor, x_scales: Tensor | None, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, gelu: bool,
      gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype, impl: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


@torch.library.custom_op("dailies::packed_linear", mutates_args=())
def packed_linear_op(x: Tensor, x_scales: Tensor | None, weight: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    return implementation("int8_linear", "cpu").packed_linear(x, x_scales, Packed(*weight), dtype)


@packed_linear_op.register_fake
def _(x: Tensor, x_scales: Tensor | None, weight: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(Packed(*weight).scales)), dtype=dtype)


@torch.library.custom_op("dailies::packed_feed_forward_", mutates_args=("residual",))
def packed_feed_forward_op(residual: Tensor, x: Tensor, x_scales: Tensor, into: Sequence[Tensor | None],
                           out: Sequence[Tensor | None], gate: Tensor) -> None:
    implementation("int8_linear", "cpu").packed_feed_forward_(residual, x, x_scales, Packed(*into), Packed(*out), gate)
