"""The norms of a transformer block with what stands around them, in one pass over memory.

A block is a chain of  x = x + gate * update;  y = layer_norm(x) * gain + bias, then y * (1 + scale) + shift;  y into a
linear layer.  Each such link is one call here, and can leave y in int8 for kernels/int8_linear. The other norm is that
of queries and keys: RMS over the full width, and in self-attention rotary positions per head behind it.
"""

from typing import Literal

import torch
from torch import Tensor

from dailies.kernels.int8_linear import BLOCK, FLOATS, Quantized
from dailies.kernels.norm import pieces, reference

Impl = Literal["auto", "torch", "pieces", "triton"]
Rope = tuple[Tensor, Tensor]
Update = tuple[Tensor, Tensor | None]                  # and its gate


def modulated_norm(x: Tensor, *, update: Tensor | None = None, gate: Tensor | None = None,
                   earlier: Update | None = None, keep: bool = True, gain: Tensor | None = None,
                   bias: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None,
                   eps: float = 1e-6, dtype: torch.dtype | None = None, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """The stream x + gate * update, in x's dtype, and its layer norm, modulated, in `dtype` (by default x's).

    x, update [B, N, D] contiguous, fp32, bf16 or fp16.  gate, scale, shift [B, 1, D]; gain, bias [D].  What is not
    given is left out: without update the stream is x itself. Arithmetic is fp32; the norm is that of the stream as it
    is returned.
    keep=False: the stream is not written, and x is returned in its place. Its update is then given again with the next
    one, as `earlier`, an update and its gate that join before. To read an update of 16 bits twice is fewer bytes than
    to write a stream of 32 bits.
    Raises ValueError for any other shape or dtype.
    """
    output = str(dtype or x.dtype).removeprefix("torch.")
    stream, values = _modulated_norm(x, update, gate, earlier, keep, gain, bias, scale, shift, eps, output, impl)
    return stream, values[0]


def quantized_modulated_norm(x: Tensor, scheme: Literal["rows", "blocks"], *, update: Tensor | None = None,
                             gate: Tensor | None = None, earlier: Update | None = None, keep: bool = True,
                             gain: Tensor | None = None, bias: Tensor | None = None, scale: Tensor | None = None,
                             shift: Tensor | None = None, eps: float = 1e-6,
                             impl: Impl = "auto") -> tuple[Tensor, Quantized]:
    """modulated_norm whose second result is int8: quantize_rows or quantize_blocks of the norm in fp32."""
    stream, values = _modulated_norm(x, update, gate, earlier, keep, gain, bias, scale, shift, eps, scheme, impl)
    return stream, Quantized(*values)


def rms_rope(q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor, rope: Rope, *, heads: int, eps: float = 1e-6,
             dtype: torch.dtype | None = None, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Queries and keys for attention: x / rms(x) * gain over all heads together, then adjacent channel pairs turned.

    q, k [B, N, D], last axis contiguous (parts of one fused projection will do).  gains [D].  rope: cos and sin, each
    [N, 1, D / heads / 2] in fp32.  Returns both as [B, N, heads, D / heads] in `dtype` (by default q's). fp32 inside,
    no rounding between.
    Raises ValueError for any other shape or dtype.
    """
    check_rms_rope(q, k, q_gain, k_gain, rope, heads)
    if impl == "auto":
        impl = "triton" if q.is_cuda else "pieces"
    return torch.ops.dailies.rms_rope(q, k, q_gain, k_gain, *rope, heads, eps, dtype or q.dtype, impl)


def rms_norm(x: Tensor, gain: Tensor, *, eps: float = 1e-6, dtype: torch.dtype | None = None,
             impl: Impl = "auto") -> Tensor:
    """x / rms(x) * gain over the last axis, in `dtype` (by default x's): the queries of cross-attention.

    x [..., D], fp32, bf16 or fp16; gain [D].  fp32 inside, rounded once.
    Raises ValueError for any other shape or dtype.
    """
    if x.ndim < 1:
        raise ValueError("rms_norm needs x [..., D]; got a number")
    check("rms_norm", x, {"x": (x, tuple(x.shape)), "gain": (gain, (x.shape[-1],))})
    if impl == "auto":
        impl = "triton" if x.is_cuda else "pieces"
    return torch.ops.dailies.rms_norm(x, gain, eps, dtype or x.dtype, impl)


def _modulated_norm(x: Tensor, update: Tensor | None, gate: Tensor | None, earlier: Update | None, keep: bool,
                    gain: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float,
                    output: str, impl: Impl) -> tuple[Tensor, list[Tensor]]:
    first, first_gate = earlier or (None, None)
    check_modulated_norm(x, update, gate, first, first_gate, gain, bias, scale, shift)
    if impl == "auto":
        impl = "triton" if x.is_cuda else "pieces"
    results = torch.ops.dailies.modulated_norm(x, update, gate, gain, bias, scale, shift, eps, output, impl,
                                               first, first_gate, keep)
    return (results[0], results[1:]) if keep and update is not None else (x, results)


def check_modulated_norm(x: Tensor, update: Tensor | None, gate: Tensor | None, earlier: Tensor | None,
                         earlier_gate: Tensor | None, gain: Tensor | None, bias: Tensor | None, scale: Tensor | None,
                         shift: Tensor | None) -> None:
    if x.ndim != 3 or not x.is_contiguous():
        raise ValueError(f"modulated_norm needs x [B, N, D], contiguous; got {list(x.shape)}, strides {x.stride()}")
    batch, tokens, width = whole = x.shape
    per_sample = (batch, 1, width)
    check("modulated_norm", x, {
        "x": (x, whole), "update": (update, whole), "earlier": (earlier, whole), "gate": (gate, per_sample),
        "earlier's gate": (earlier_gate, per_sample), "scale": (scale, per_sample), "shift": (shift, per_sample),
        "gain": (gain, (width,)), "bias": (bias, (width,))})
    if update is None and (gate is not None or earlier is not None):
        raise ValueError("modulated_norm gates an update, and joins an earlier one before it; got no update")


def check_rms_rope(q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor, rope: Rope, heads: int) -> None:
    if q.ndim != 3 or q.shape[-1] % (2 * heads):
        raise ValueError(f"rms_rope needs q [B, N, D], D a multiple of 2 * heads = {2 * heads}; got {list(q.shape)}")
    if q.stride(-1) != 1 or k.stride(-1) != 1:
        raise ValueError(f"rms_rope needs a contiguous last axis; got strides {q.stride()}, {k.stride()}")
    batch, tokens, width = q.shape
    table = (tokens, 1, width // heads // 2)
    check("rms_rope", q, {
        "q": (q, (batch, tokens, width)), "k": (k, (batch, tokens, width)), "q_gain": (q_gain, (width,)),
        "k_gain": (k_gain, (width,)), "cos": (rope[0], table), "sin": (rope[1], table)})


def check(name: str, x: Tensor, wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Raises ValueError for the first tensor of another shape, a dtype that is no float, or another device than x's."""
    for part, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype not in FLOATS or tensor.device != x.device:
            raise ValueError(f"{name} needs {part} {list(shape)}, fp32, bf16 or fp16, on {x.device}; "
                             f"got {list(tensor.shape)}, {tensor.dtype}, on {tensor.device}")


@torch.library.custom_op("dailies::modulated_norm", mutates_args=())
def modulated_norm_op(x: Tensor, update: Tensor | None, gate: Tensor | None, gain: Tensor | None, bias: Tensor | None,
                      scale: Tensor | None, shift: Tensor | None, eps: float, output: str, impl: str,
                      earlier: Tensor | None = None, earlier_gate: Tensor | None = None,
                      keep: bool = True) -> list[Tensor]:
    """The stream, if there is an update and it is kept, then y; `output`: y's dtype, or the scheme, for int8 values and
    scales."""
    if impl == "triton":
        from dailies.kernels.norm import kernel  # Triton is imported only where it runs
        return kernel.modulated_norm(x, update, gate, earlier, earlier_gate, keep, gain, bias, scale, shift, eps, output)
    norm = {"torch": reference, "pieces": pieces}[impl].modulated_norm
    if earlier is not None:                            # in a pass of its own: where passes count it is not asked for
        x = reference.joined(x, earlier, earlier_gate)
    results = norm(x, update, gate, gain, bias, scale, shift, eps, output)
    return results if keep or update is None else results[1:]


@modulated_norm_op.register_fake
def _(x: Tensor, update: Tensor | None, gate: Tensor | None, gain: Tensor | None, bias: Tensor | None,
      scale: Tensor | None, shift: Tensor | None, eps: float, output: str, impl: str, earlier: Tensor | None = None,
      earlier_gate: Tensor | None = None, keep: bool = True) -> list[Tensor]:
    stream = [torch.empty_like(x)] if keep and update is not None else []
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
    if impl != "triton":
        turned = {"torch": reference, "pieces": pieces}[impl].rms_rope
        return turned(q, q_gain, cos, sin, heads, eps, dtype), turned(k, k_gain, cos, sin, heads, eps, dtype)
    from dailies.kernels.norm import kernel
    return kernel.rms_rope(q, k, q_gain, k_gain, cos, sin, heads, eps, dtype)


@rms_rope_op.register_fake
def _(q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float,
      dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:-1], heads, q.shape[-1] // heads)
    return q.new_empty(shape, dtype=dtype), k.new_empty(shape, dtype=dtype)


@torch.library.custom_op("dailies::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype, impl: str) -> Tensor:
    if impl == "torch":
        return reference.rms_norm(x, gain, eps, dtype)
    if impl == "pieces":
        return pieces.rms_norm(x, gain, eps, dtype)
    from dailies.kernels.norm import kernel
    return kernel.rms_norm(x, gain, eps, dtype)


@rms_norm_op.register_fake
def _(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype, impl: str) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)
