"""The norms of a transformer block with what stands around them, in one pass over memory.

A block is a chain of  x = x + gate * update;  y = layer_norm(x) * gain + bias, then y * (1 + scale) + shift;  y into a
linear layer.  Each such link is one call here, and can leave y in int8 for kernels/int8_linear. The other norm is that
of queries and keys: RMS over the full width, and in self-attention rotary positions per head behind it.

Behind a packed INT8 layer, on a CPU, what the layer makes is normed while it is in the cache. It is not rounded on the
way, which the two operators one after the other do.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dailies.kernels import FLOATS, Impl, chosen_impl, implementation
from dailies.kernels.int8_linear import BLOCK, Packed, Quantized, values_scales

Rope = tuple[Tensor, Tensor]
Scheme = Literal["rows", "blocks"]


class Affine(NamedTuple):
    """What a norm is multiplied with and what is added: norm * gain + bias, then that * (1 + scale) + shift.

    gain, bias [D]; scale, shift [B, 1, D]; None leaves a part out.
    """

    gain: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


PLAIN = Affine()


class Update(NamedTuple):
    """gate * value, which joins a residual stream.  value [B, N, D]; gate [B, 1, D], or None for 1."""

    value: Tensor
    gate: Tensor | None = None


def modulated_norm(x: Tensor, affine: Affine = PLAIN, *, updates: Sequence[Update] = (), keep: bool = True,
                   output: torch.dtype | Scheme | None = None, eps: float = 1e-6, centred: bool = True,
                   impl: Impl = "auto") -> tuple[Tensor, Tensor | Quantized]:
    """The stream x + update, in x's dtype, and its layer norm, modulated.

    x [B, N, D] contiguous; it, updates and affine in fp32, bf16 or fp16.  Without updates the stream is x itself.
    Arithmetic is fp32; the norm is that of the stream as it is returned.
    centred: False leaves the mean where it is, which makes it the RMS norm.
    output: the norm's dtype, by default x's; or a scheme: then it is Quantized, by quantize_rows or quantize_blocks of
    the norm in fp32.
    keep=False: the stream is not written, and x is returned in its place. Its update is then given again with the next
    one: two updates join one after the other. To read an update of 16 bits twice is fewer bytes than to write a stream
    of 32 bits.
    Raises ValueError for any other shape or dtype, and for more than two updates.
    """
    check_modulated_norm(x, affine, updates)
    kind = output if isinstance(output, str) else str(output or x.dtype).removeprefix("torch.")
    # tiles of a scale are many rows, and no CPU's model runs on them
    impl = chosen_impl(impl, x, on_cpu="reference" if kind == "blocks" else "cpu")
    joined = [part for update in updates for part in update]
    results = torch.ops.dailies.modulated_norm(x, joined, affine, keep, eps, kind, impl, centred)
    stream, values = (results[0], results[1:]) if keep and updates else (x, results)
    return stream, Quantized(*values) if len(values) > 1 else values[0]


def rms_rope(q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor, rope: Rope, *, heads: int, eps: float = 1e-6,
             dtype: torch.dtype | None = None, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Queries and keys for attention: x / rms(x) * gain over all heads together, then adjacent channel pairs turned.

    q, k [B, N, D], last axis contiguous (parts of one fused projection will do).  gains [D].  rope: cos and sin, each
    [N, 1, D / heads / 2] in fp32.  Returns both as [B, N, heads, D / heads] in `dtype` (by default q's). fp32 inside,
    no rounding between.
    Raises ValueError for any other shape or dtype.
    """
    check_rms_rope(q, k, q_gain, k_gain, rope, heads)
    return torch.ops.dailies.rms_rope(q, k, q_gain, k_gain, *rope, heads, eps, dtype or q.dtype, chosen_impl(impl, q))


def rms_rope_halves(x: Tensor, gain: Tensor, rope: Rope, *, heads: int, eps: float = 1e-6,
                    dtype: torch.dtype | None = None, impl: Impl = "auto") -> Tensor:
    """As rms_rope of one of the two, where each channel of a head's first half is turned with that of its second, and
    every head has its own angles.

    x [B, N, D].  gain [D].  rope: cos and sin, each [N, heads, D / heads / 2] in fp32.
    Raises ValueError for any other shape or dtype.
    """
    if x.ndim != 3 or x.shape[-1] % (2 * heads) or x.stride(-1) != 1:
        raise ValueError(f"rms_rope_halves needs x [B, N, D], its last axis contiguous and D a multiple of "
                         f"{2 * heads}; got {list(x.shape)}, strides {x.stride()}")
    table = (x.shape[1], heads, x.shape[2] // heads // 2)
    check_operands("rms_rope_halves", x, {"x": (x, tuple(x.shape)), "gain": (gain, (x.shape[2],)),
                                          "cos": (rope[0], table), "sin": (rope[1], table)})
    return torch.ops.dailies.rms_rope_halves(x, gain, *rope, heads, eps, dtype or x.dtype, chosen_impl(impl, x))


def rms_norm(x: Tensor, gain: Tensor, *, eps: float = 1e-6, dtype: torch.dtype | None = None,
             impl: Impl = "auto") -> Tensor:
    """x / rms(x) * gain over the last axis, in `dtype` (by default x's): the queries of cross-attention.

    x [..., D], fp32, bf16 or fp16; gain [D].  fp32 inside, rounded once.
    Raises ValueError for any other shape or dtype.
    """
    if x.ndim < 1:
        raise ValueError("rms_norm needs x [..., D]; got a number")
    check_operands("rms_norm", x, {"x": (x, tuple(x.shape)), "gain": (gain, (x.shape[-1],))})
    return torch.ops.dailies.rms_norm(x, gain, eps, dtype or x.dtype, chosen_impl(impl, x))


def packed_modulated_norm_(x: Tensor, y: Tensor | Quantized, layer: Packed, affine: Affine = PLAIN, *,
                           gate: Tensor | None = None, eps: float = 1e-6, centred: bool = True) -> Quantized:
    """x += gate * layer(y), in place, and the norm of that in rows of INT8.

    x [B, N, D] fp32 or bf16, y [B, N, K] floating or of quantize_rows; the rest as modulated_norm takes it.
    """
    return Quantized(*torch.ops.dailies.packed_modulated_norm_(x, *values_scales(y), layer, gate, affine, eps, centred))


def packed_rms_rope(x: Tensor | Quantized, layer: Packed, gain: Tensor, rope: Rope, *, heads: int, eps: float,
                    dtype: torch.dtype) -> Tensor:
    """Queries or keys [B, N, heads, D / heads] in `dtype`: layer(x), normed over all heads and turned.

    x [B, N, K], floating or of quantize_rows.  gain [D]; rope as rms_rope takes it.
    """
    return torch.ops.dailies.packed_rms_rope(*values_scales(x), layer, gain, *rope, heads, eps, dtype)


def packed_rms_rope_halves(x: Tensor | Quantized, layer: Packed, gain: Tensor, rope: Rope, *, heads: int, eps: float,
                           dtype: torch.dtype) -> Tensor:
    """As packed_rms_rope, turned as by rms_rope_halves."""
    return torch.ops.dailies.packed_rms_rope(*values_scales(x), layer, gain, *rope, heads, eps, dtype, True)


def packed_rms_norm(x: Tensor | Quantized, layer: Packed, gain: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """layer(x) / rms * gain over the last axis, [B, N, D] in `dtype`.

    x [B, N, K], floating or of quantize_rows.  gain [D].
    """
    return torch.ops.dailies.packed_rms_norm(*values_scales(x), layer, gain, eps, dtype)


def check_modulated_norm(x: Tensor, affine: Affine, updates: Sequence[Update]) -> None:
    if x.ndim != 3 or not x.is_contiguous():
        raise ValueError(f"modulated_norm needs x [B, N, D], contiguous; got {list(x.shape)}, strides {x.stride()}")
    if len(updates) > 2:
        raise ValueError(f"modulated_norm joins at most two updates; got {len(updates)}")
    batch, tokens, width = whole = x.shape
    per_sample = (batch, 1, width)
    wanted = {"x": (x, whole), "gain": (affine.gain, (width,)), "bias": (affine.bias, (width,)),
              "scale": (affine.scale, per_sample), "shift": (affine.shift, per_sample)}
    for name, update in zip(("update", "second update"), updates, strict=False):
        wanted |= {name: (update.value, whole), f"{name}'s gate": (update.gate, per_sample)}
    check_operands("modulated_norm", x, wanted)


def check_rms_rope(q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor, rope: Rope, heads: int) -> None:
    if q.ndim != 3 or q.shape[-1] % (2 * heads):
        raise ValueError(f"rms_rope needs q [B, N, D], D a multiple of 2 * heads = {2 * heads}; got {list(q.shape)}")
    if q.stride(-1) != 1 or k.stride(-1) != 1:
        raise ValueError(f"rms_rope needs a contiguous last axis; got strides {q.stride()}, {k.stride()}")
    batch, tokens, width = q.shape
    table = (tokens, 1, width // heads // 2)
    check_operands("rms_rope", q, {
        "q": (q, (batch, tokens, width)), "k": (k, (batch, tokens, width)), "q_gain": (q_gain, (width,)),
        "k_gain": (k_gain, (width,)), "cos": (rope[0], table), "sin": (rope[1], table)})


def check_operands(name: str, x: Tensor, wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Raises ValueError for the first tensor of another shape, a dtype that is no float, or another device than x's."""
    for part, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype not in FLOATS or tensor.device != x.device:
            raise ValueError(f"{name} needs {part} {list(shape)}, fp32, bf16 or fp16, on {x.device}; "
                             f"got {list(tensor.shape)}, {tensor.dtype}, on {tensor.device}")


@torch.library.custom_op("dailies::modulated_norm", mutates_args=())
def modulated_norm_op(x: Tensor, updates: Sequence[Tensor | None], affine: Sequence[Tensor | None], keep: bool,
                      eps: float, output: str, impl: str, centred: bool = True) -> list[Tensor]:
    """The stream, if there are updates and it is kept, then y.

    updates: value and gate of each.  output: y's dtype, or the scheme, for int8 values and scales.
    """
    joined = [Update(*update) for update in zip(updates[::2], updates[1::2], strict=True)]
    return implementation("norm", impl).modulated_norm(x, joined, Affine(*affine), keep, eps, output, centred)


@modulated_norm_op.register_fake
def _(x: Tensor, updates: Sequence[Tensor | None], affine: Sequence[Tensor | None], keep: bool, eps: float, output: str,
      impl: str, centred: bool = True) -> list[Tensor]:
    stream = [torch.empty_like(x)] if keep and updates else []
    batch, tokens, width = x.shape
    if output == "rows":
        return [*stream, torch.empty_like(x, dtype=torch.int8), x.new_empty((batch, tokens), dtype=torch.float32)]
    if output == "blocks":
        tiles = (batch, -(-tokens // BLOCK), -(-width // BLOCK))
        return [*stream, torch.empty_like(x, dtype=torch.int8), x.new_empty(tiles, dtype=torch.float32)]
    return [*stream, torch.empty_like(x, dtype=getattr(torch, output))]


@torch.library.custom_op("dailies::rms_rope", mutates_args=())
def rms_rope_op(q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float,
                dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor]:
    return implementation("norm", impl).rms_rope(q, k, q_gain, k_gain, cos, sin, heads, eps, dtype)


@rms_rope_op.register_fake
def _(q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float,
      dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:-1], heads, q.shape[-1] // heads)
    return q.new_empty(shape, dtype=dtype), k.new_empty(shape, dtype=dtype)


@torch.library.custom_op("dailies::rms_rope_halves", mutates_args=())
def rms_rope_halves_op(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float, dtype: torch.dtype,
                       impl: str) -> Tensor:
    return implementation("norm", impl).rms_rope_halves(x, gain, cos, sin, heads, eps, dtype)


@rms_rope_halves_op.register_fake
def _(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float, dtype: torch.dtype,
      impl: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], heads, x.shape[-1] // heads), dtype=dtype)


@torch.library.custom_op("dailies::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype, impl: str) -> Tensor:
    return implementation("norm", impl).rms_norm(x, gain, eps, dtype)


@rms_norm_op.register_fake
def _(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype, impl: str) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("dailies::packed_modulated_norm_", mutates_args=("x",))
def packed_modulated_norm_op(x: Tensor, y: Tensor, y_scales: Tensor | None, layer: Sequence[Tensor | None],
                             gate: Tensor | None, affine: Sequence[Tensor | None], eps: float,
                             centred: bool = True) -> tuple[Tensor, Tensor]:
    norm = implementation("norm", "cpu").packed_modulated_norm_
    return norm(x, y, y_scales, Packed(*layer), gate, Affine(*affine), eps, centred)


@packed_modulated_norm_op.register_fake
def _(x: Tensor, y: Tensor, y_scales: Tensor | None, layer: Sequence[Tensor | None], gate: Tensor | None,
      affine: Sequence[Tensor | None], eps: float, centred: bool = True) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.custom_op("dailies::packed_rms_rope", mutates_args=())
def packed_rms_rope_op(x: Tensor, x_scales: Tensor | None, layer: Sequence[Tensor | None], gain: Tensor, cos: Tensor,
                       sin: Tensor, heads: int, eps: float, dtype: torch.dtype, halves: bool = False) -> Tensor:
    return implementation("norm", "cpu").packed_rms_rope(x, x_scales, Packed(*layer), gain, cos, sin, heads, eps, dtype,
                                                         halves)


@packed_rms_rope_op.register_fake
def _(x: Tensor, x_scales: Tensor | None, layer: Sequence[Tensor | None], gain: Tensor, cos: Tensor, sin: Tensor,
      heads: int, eps: float, dtype: torch.dtype, halves: bool = False) -> Tensor:
    return x.new_empty((*x.shape[:2], heads, len(gain) // heads), dtype=dtype)


@torch.library.custom_op("dailies::packed_rms_norm", mutates_args=())
def packed_rms_norm_op(x: Tensor, x_scales: Tensor | None, layer: Sequence[Tensor | None], gain: Tensor, eps: float,
                       dtype: torch.dtype) -> Tensor:
    return implementation("norm", "cpu").packed_rms_norm(x, x_scales, Packed(*layer), gain, eps, dtype)


@packed_rms_norm_op.register_fake
def _(x: Tensor, x_scales: Tensor | None, layer: Sequence[Tensor | None], gain: Tensor, eps: float,
      dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:2], len(gain)), dtype=dtype)
