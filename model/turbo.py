"""Speed, applied to a transformer from outside: INT8 linear layers, other self-attention, fused norms.

A refitted model has the blocks of this file instead of its own, around the same weights; linum.py and wan.py never hear
of it. In fp32 with dense attention nothing is refitted: that is the model as it is written, and what all else is
compared to.

Of a model in int8, the linear layers of its blocks are INT8 and the rest is bf16, as TurboDiffusion publishes it:
patches, text, time, head and the projection of sparse attention stay. On a CPU without such products both are computed
in fp32 (kernels/processor.py). Their names in a file are those of the -quant
releases, NAME.int8_weight and NAME.scale; the scales are per output channel where we quantise, per 128 x 128 tile in
the releases.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.kernels import processor
from dailies.kernels.int8_attention import int8_attention
from dailies.kernels.int8_linear import (
    BLOCK,
    Quantized,
    dequantize,
    int8_linear,
    pack,
    packed_feed_forward_,
    packed_linear,
    quantize_rows,
)
from dailies.kernels.norm import (
    Affine,
    Update,
    modulated_norm,
    packed_modulated_norm_,
    packed_rms_norm,
    packed_rms_rope,
    rms_norm,
    rms_rope,
)
from dailies.kernels.sparse_attention import sparse_attention
from dailies.model import checkpoint
from dailies.model.checkpoint import StoredTensor
from dailies.model.keys import KeyTable
from dailies.model.layers import FullPrecisionLinear, Linear, SelfAttention, attention
from dailies.model.private import cache_folder, private_folder
from dailies.model.weights import CheckpointError

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
CODE_CACHE = "TORCHINDUCTOR_CACHE_DIR"
SHAPES = 1000                                           # of clips that one process may compile for
Attend = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Of sparse attention: the share of the key blocks that a block of queries attends to, and the rows of a block."""

    keep_ratio: float
    block_q: int = 128
    block_k: int = 64
    tuned: bool = False             # the weights were tuned for it: they have the projection of its linear branch


def build(make: Callable[[], checkpoint.Model], path: Path, *tables: KeyTable, name: str, device: str, precision: str,
          attention: str, sparsity: Sparsity) -> checkpoint.Model:
    """checkpoint.build, refitted: precision fp32, bf16 or int8, attention dense, sage or sparse.

    A file of INT8 layers is loaded as it is, one of others is quantised layer by layer while it is loaded.
    Raises CheckpointError, also for INT8 weights where another precision is wanted.
    """
    stored = checkpoint.stored_tensors(path)
    scheme = scheme_of(stored)
    if scheme and precision != "int8":
        raise CheckpointError(f"{name}: {path} holds INT8 layers, which cannot be made {precision} again. "
                              "Say --precision int8, or name a folder with the weights that are not quantised")

    def refitted() -> checkpoint.Model:
        dit = make()
        if precision != "fp32" or attention != "dense" or sparsity.tuned:
            refit(dit, attention, sparsity)
        for place, linear in linears_of_blocks(dit) if precision == "int8" else ():
            sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
            layer = Int8Linear(*sizes, scheme=scheme, bias=bias) if scheme else Unquantized(*sizes, bias=bias)
            dit.set_submodule(place, layer)
        return dit

    return checkpoint.build(refitted, path, *tables, name=name, device=device, precision=precision, settle=settled)


def scheme_of(stored: Mapping[str, StoredTensor]) -> str | None:
    """How the INT8 layers of a file are scaled, rows or blocks; None where it has none."""
    scales = {len(tensor.shape) for key, tensor in stored.items()
              if key.endswith(".scale") and key.removesuffix("scale") + "int8_weight" in stored}
    return "rows" if scales == {1} else "blocks" if scales else None


def fallbacks(stored: Mapping[str, StoredTensor], device: str, precision: str) -> tuple[str, ...]:
    """What runs instead of what was asked for, known from a file's header and this machine."""
    if precision == "fp32" or not device.startswith("cpu"):
        return ()
    notes = []
    if precision == "int8" and not processor.has_int8_products():
        notes.append(f"INT8 weights are computed with in {NAMES[processor.dtype_of(precision, device)]}: "
                     "this CPU has no INT8 products")
    elif precision == "int8" and scheme_of(stored) == "blocks":
        notes.append("INT8 weights with scales per block are scaled per row: a CPU has no fast product of blocks")
    return *notes, *processor.instead_of_bf16()


def linears_of_blocks(dit: nn.Module) -> list[tuple[str, Linear]]:
    """Those that are quantised, and their names."""
    return [(place, module) for place, module in dit.named_modules()
            if place.startswith("blocks.") and isinstance(module, Linear) and not place.endswith(".proj")]


def settled(place: str, module: nn.Module) -> nn.Module:
    """What a layer becomes once its weights are there: INT8, in the form that this device can run."""
    if isinstance(module, Unquantized) and not module.weight.is_meta:
        module = Int8Linear.of(module)
    if isinstance(module, Int8Linear) and module.int8_weight.is_cpu:
        return PackedInt8Linear(module) if processor.has_int8_products() else module.dequantized(processor.dtype_of("int8", "cpu"))
    return module


class Unquantized(FullPrecisionLinear):
    """A layer as its file has it, until it is there and becomes an Int8Linear."""


class Int8Linear(nn.Module):
    """A linear layer in INT8; what it is given is quantised in the scheme of its weight. bf16 out."""

    def __init__(self, in_features: int, out_features: int, *, scheme: str, bias: bool):
        super().__init__()
        scales = (out_features,) if scheme == "rows" else (-(-out_features // BLOCK), -(-in_features // BLOCK))
        self.register_buffer("int8_weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(scales))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        """Quantised in rows, which is the faster and the more exact of the two schemes."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, scheme="rows", bias=linear.bias is not None)
        layer.int8_weight, layer.scale = quantize_rows(linear.weight.detach())
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().float(), requires_grad=False)
        return layer

    @property
    def quantized(self) -> Quantized:
        return Quantized(self.int8_weight, self.scale)

    @property
    def scheme(self) -> str:
        return "rows" if self.scale.ndim == 1 else "blocks"

    def dequantized(self, dtype: torch.dtype) -> Linear:
        rows, columns = self.int8_weight.shape
        with torch.device("meta"):
            linear = Linear(columns, rows, bias=self.bias is not None)
        linear.weight = nn.Parameter(dequantize(self.quantized, dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return linear

    def forward(self, x: Tensor | Quantized) -> Tensor:
        return int8_linear(x, self.quantized, self.bias, dtype=torch.bfloat16)


class PackedInt8Linear(nn.Module):
    """An Int8Linear as a CPU runs it: in rows, whatever it was before, and packed."""

    scheme = "rows"

    def __init__(self, layer: Int8Linear):
        super().__init__()
        rows = layer.quantized if layer.scheme == "rows" else quantize_rows(dequantize(layer.quantized))
        self.weight = pack(rows, layer.bias)
        self.dtype = processor.dtype_of("int8", "cpu")        # of what it makes

    def forward(self, x: Tensor | Quantized) -> Tensor:
        return packed_linear(x, self.weight, self.dtype)


Layer = Linear | Int8Linear | PackedInt8Linear


def refit(dit: nn.Module, attention: str, sparsity: Sparsity) -> None:
    """Put a TurboBlock in the place of every block, and a TurboHead in that of the head, around the same layers."""
    for place, block in enumerate(dit.blocks):
        dit.blocks[place] = TurboBlock(block, attention, sparsity)
    dit.head = TurboHead(dit.head)


def compile_blocks(dit: nn.Module, backend: str = "inductor") -> None:
    """Compile what the blocks have in common, once for each shape of clip; for other shapes as they come.

    The blocks and not the whole, since equal blocks share what is compiled: a shape costs one block's compilation.
    """
    keep_code_private()
    for block in dit.blocks:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    # by default a ninth shape is an error
    limits = torch._dynamo.config.patch(recompile_limit=SHAPES, accumulated_recompile_limit=SHAPES)
    dit.forward = limits(dit.forward)


def keep_code_private() -> None:
    """Compiled code is kept in the user's cache, or for this process alone where there is none that is private.

    torch's own place is a name below /tmp that anybody can take first, and the code that lies there is run. torch puts
    that name into the environment itself, as soon as its compiler is imported: then nobody has chosen it.
    """
    said = os.environ.get(CODE_CACHE, "")
    if said and not said.startswith(os.path.join(tempfile.gettempdir(), "torchinductor_")):
        return
    try:
        place = private_folder(cache_folder() / "inductor", below=cache_folder())
    except OSError:
        place = Path(tempfile.mkdtemp(prefix="dailies-code-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
    os.environ[CODE_CACHE] = str(place)


class Late(NamedTuple):
    """A residual stream [B, N, D], and an update with its gate that the next norm joins to it in its own pass."""

    stream: Tensor
    update: Tensor
    gate: Tensor


class TurboBlock(nn.Module):
    """The block of Linum and of Wan: self-attention, cross-attention and a feed-forward on a residual stream in fp32.

    Each update joins the stream in the same pass over memory that makes the next layer's input. With
    packed layers it does so in place: fresh pages for each new stream cost more than the sum.
    """

    def __init__(self, block: nn.Module, attention: str, sparsity: Sparsity):
        super().__init__()
        self.modulation = block.modulation
        self.norm_attn, self.norm_cross, self.norm_ffn = block.norm_attn, block.norm_cross, block.norm_ffn
        self.attn = TurboSelfAttention(block.attn, attention, sparsity)
        self.cross, self.ffn_in, self.ffn_out = block.cross, block.ffn_in, block.ffn_out
        self.has_gelu_in_product = processor.has_gelu_in_product()       # asked here, because a compiler cannot

    def forward(self, x: Tensor | Late, modulation: Tensor,
                *context_rope: tuple[Tensor, ...] | Tensor) -> Tensor | Late:
        """x [B, N, D] fp32, modulation [B, 6, D], then as the model's own block: keys and values, rotary table.

        With packed layers what is returned is x itself, so the caller's is used up. On a GPU layers that are not INT8
        return their last update beside the stream: the next block or the head joins it.
        """
        *context, rope = context_rope
        context = context[0] if isinstance(context[0], tuple) else context
        modulation = self.modulation + modulation
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = modulation.split(1, dim=1)
        x, h = normed(x, self.norm_attn, self.attn.q, scale=scale_attn, shift=shift_attn)
        y = self.attn(h, rope)
        if x.is_cuda:                                   # the stream is written once for the two updates
            y = self.attn.o(y)
            attended = Update(y, gate_attn)
            _, h = normed(x, self.norm_cross, self.cross.q, updates=[attended], keep=False)
            crossed = Update(self.cross.o(cross_attention(self.cross, h, context)))
            x, h = normed(x, self.norm_ffn, self.ffn_in, scale=scale_ffn, shift=shift_ffn, updates=[attended, crossed])
        else:
            x, h = joined(x, y, self.attn.o, self.norm_cross, self.cross.q, gate=gate_attn)
            x, h = joined(x, cross_attention(self.cross, h, context), self.cross.o, self.norm_ffn, self.ffn_in,
                          scale=scale_ffn, shift=shift_ffn)
        return feed_forward(x, h, self.ffn_in, self.ffn_out, gate_ffn, self.has_gelu_in_product)


def normed(x: Tensor | Late, norm: nn.LayerNorm, before: Layer, *, scale: Tensor | None = None,
           shift: Tensor | None = None, updates: Sequence[Update] = (),
           keep: bool = True) -> tuple[Tensor, Tensor | Quantized]:
    """The stream with its update, and its norm as the layer behind it takes it."""
    if isinstance(x, Late):
        x, *late = x
        updates = [Update(*late)]
    output = before.weight.dtype if isinstance(before, Linear) else before.scheme
    return modulated_norm(x, Affine(norm.weight, norm.bias, scale, shift), updates=updates, keep=keep, output=output,
                          eps=norm.eps)


def joined(x: Tensor, y: Tensor, out: Layer, norm: nn.LayerNorm, before: Layer, *, gate: Tensor | None = None,
           scale: Tensor | None = None, shift: Tensor | None = None) -> tuple[Tensor, Tensor | Quantized]:
    """normed, of the stream that out(y) joins."""
    if isinstance(out, PackedInt8Linear):
        affine = Affine(norm.weight, norm.bias, scale, shift)
        return x, packed_modulated_norm_(x, y, out.weight, affine, gate=gate, eps=norm.eps)
    return normed(x, norm, before, updates=[Update(out(y), gate)], scale=scale, shift=shift)


def cross_attention(cross: nn.Module, x: Tensor | Quantized, context: tuple[Tensor, ...]) -> Tensor:
    """Of either family, but for the last layer.  context: key and value of the text, and then of the image if any."""
    if isinstance(cross.q, PackedInt8Linear):
        q = packed_rms_norm(x, cross.q.weight, cross.norm_q.weight, eps=cross.norm_q.eps, dtype=cross.q.dtype)
    else:
        q = rms_norm(cross.q(x), cross.norm_q.weight, eps=cross.norm_q.eps)
    q = q.unflatten(-1, (cross.heads, -1))
    y = attention(q, *context[:2])
    return y + attention(q, *context[2:]) if len(context) > 2 else y


def feed_forward(x: Tensor, h: Tensor | Quantized, into: Layer, out: Layer, gate: Tensor,
                 has_gelu_in_product: bool) -> Tensor | Late:
    """x + gate * out(gelu(into(h))); on a GPU, where the layers are not INT8, the sum is still to be done."""
    if isinstance(into, PackedInt8Linear):
        packed_feed_forward_(x, h, into.weight, out.weight, gate)
        return x
    if isinstance(into, Int8Linear):
        h = int8_linear(h, into.quantized, into.bias, gelu=True, dtype=torch.bfloat16)
        return int8_linear(h, out.quantized, out.bias, gate=gate, residual=x)
    update = out(gelu_linear(h, into, has_gelu_in_product))
    return Late(x, update, gate) if x.is_cuda else torch.addcmul(x, gate, update)


def gelu_linear(x: Tensor, linear: Linear, has_gelu_in_product: bool) -> Tensor:
    """gelu(linear(x)); in bf16 oneDNN on a CPU, or cuBLASLt on a GPU, does both in one."""
    if x.is_cpu and linear.weight.dtype == torch.bfloat16 and has_gelu_in_product:
        return torch.ops.mkldnn._linear_pointwise(x, linear.weight, linear.bias, "gelu", [], "tanh")
    if x.is_cuda and linear.weight.dtype == torch.bfloat16:
        y = torch._addmm_activation(linear.bias, x.flatten(0, 1), linear.weight.mT, use_gelu=True)      # the tanh form
        return y.view(*x.shape[:-1], -1)
    return F.gelu(linear(x), approximate="tanh")


class TurboHead(nn.Module):
    """The last norm and its modulation in one pass over memory, and the linear layer."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.modulation, self.norm, self.linear = head.modulation, head.norm, head.linear

    def forward(self, x: Tensor | Late, time: Tensor) -> Tensor:
        shift, scale = (self.modulation + time[:, None]).split(1, dim=1)
        return self.linear(normed(x, self.norm, self.linear, scale=scale, shift=shift)[1])


class TurboSelfAttention(nn.Module):
    """Self-attention of either family but for its last layer, the norm and turn of queries and keys in one pass."""

    def __init__(self, base: SelfAttention, attention: str, sparsity: Sparsity):
        super().__init__()
        self.heads = base.heads
        self.q, self.k, self.v, self.o = base.q, base.k, base.v, base.o
        self.norm_q, self.norm_k = base.norm_q, base.norm_k
        self.attend = attend_by(attention, sparsity)
        width = base.q.out_features // base.heads
        self.proj = Linear(width, width) if sparsity.tuned else None

    def forward(self, x: Tensor | Quantized, rope: tuple[Tensor, Tensor]) -> Tensor:
        v = self.v(x).unflatten(-1, (self.heads, -1))
        how = dict(heads=self.heads, eps=self.norm_q.eps, dtype=v.dtype)
        if isinstance(self.q, PackedInt8Linear):
            q, k = (packed_rms_rope(x, layer.weight, norm.weight, rope, **how)
                    for layer, norm in ((self.q, self.norm_q), (self.k, self.norm_k)))
        else:
            q, k = rms_rope(self.q(x), self.k(x), self.norm_q.weight, self.norm_k.weight, rope, **how)
        proj = (self.proj.weight, self.proj.bias) if self.proj is not None else None
        return self.attend(q, k, v, proj).flatten(2)


def attend_by(attention_mode: str, sparsity: Sparsity) -> Attend:
    """Of weights tuned for sparse attention, sage is sparse with INT8 logits, as published; of others it is dense."""
    sparse = partial(sparse_attention, keep_ratio=sparsity.keep_ratio, block_q=sparsity.block_q,
                     block_k=sparsity.block_k)
    if attention_mode == "sparse" or attention_mode == "sage" and sparsity.tuned:
        return lambda q, k, v, proj: sparse(q, k, v, proj=proj, int8=attention_mode == "sage")
    if attention_mode == "sage":
        return lambda q, k, v, proj: int8_attention(q, k, v)
    return lambda q, k, v, proj: attention(q, k, v)
