"""What is timed: candidates for attention and for convolutions, each behind what the product runs ("today")."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor

from dailies.kernels.around_conv import kernel as around_conv
from dailies.kernels.cases import Attention
from dailies.kernels.int8_attention import kernel as int8_attention
from dailies.kernels.sparse_attention import kernel as sparse_attention
from dailies.kernels.sparse_attention import reference
from tests.candidates import attention, causal_conv
from tests.candidates.timing import Candidate, Case


def everything(*, tiny: bool) -> list[Candidate]:
    """By worth, a case of the one and a case of the other.  tiny: shapes for the interpreter, in fp16."""
    cases = ([list(of_case) for _, of_case in groupby(found, key=lambda each: each.case)]
             for found in (attentions(tiny), convolutions(tiny)))
    return list(chain.from_iterable(chain.from_iterable(zip_longest(*cases, fillvalue=[]))))


def low(tiny: bool) -> torch.dtype:
    return torch.float16 if tiny else torch.bfloat16   # the interpreter's products of bf16 are wrong


# ---------------------------------------------------------------- attention

def attentions(tiny: bool) -> list[Candidate]:
    sizes = [Attention(queries=tokens, keys=tokens, heads=heads, head_dim=head_dim)
             for tokens, heads, head_dim in ([(300, 2, 64)] if tiny else [(32760, 12, 128), (75600, 40, 128)])]
    small = sizes[0]
    few = ("overlap", "overlap tma", "one", "overlap shared w4")
    return [*sparse(small, tiny), *chosen_blocks(small, tiny), *summaries(small, tiny),
            *sparse(small, tiny, block_k=128, names=("overlap", "overlap tma", "one", "overlap shared tma w4")),
            *sparse(small, tiny, linear=False, names=few), *sparse(small, tiny, int8=True, names=few),
            *dense(small, tiny), *(each for size in sizes[1:] for each in (*sparse(size, tiny),
                                                                          *chosen_blocks(size, tiny)))]


def ways() -> dict[str, attention.Tiling]:
    way = attention.Tiling
    return {"overlap": way(overlap=True), "overlap tma": way(overlap=True, descriptors=True),
            "overlap s4": way(overlap=True, stages=4), "overlap s5": way(overlap=True, stages=5),
            "overlap tma s5": way(overlap=True, descriptors=True, stages=5),
            "ahead": way(ahead=True), "ahead tma": way(ahead=True, descriptors=True),
            "one": way(), "one tma": way(descriptors=True),
            "overlap shared w4": way(overlap=True, share=2, warps=4),
            "overlap shared tma w4": way(overlap=True, share=2, warps=4, descriptors=True),
            "shared tma w4": way(share=2, warps=4, descriptors=True),
            "unroll s2": way(unroll=2, stages=2), "unroll tma s2": way(unroll=2, stages=2, descriptors=True),
            "wide s2": way(wide=2, stages=2), "wide overlap s2": way(wide=2, overlap=True, stages=2)}


def share(tiny: bool) -> float:
    return 0.6 if tiny else 0.1                        # of the blocks, kept


def qkv(size: Attention, tiny: bool, device: str) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(1, size.keys, size.heads, size.head_dim, dtype=low(tiny), device=device) for _ in range(3))


def sparse(size: Attention, tiny: bool, *, block_k: int = 64, linear: bool = True, int8: bool = False,
           names: tuple[str, ...] | None = None) -> list[Candidate]:
    def inputs(device: str) -> tuple:
        q, k, v = qkv(size, tiny, device)
        kept = reference.kept_blocks(reference.pool_blocks(q, 128), reference.pool_blocks(k, block_k), share(tiny))
        shape = 1, size.heads, size.head_dim
        branch = (torch.rand(*shape, size.head_dim, dtype=v.dtype, device=device), torch.rand(shape, device=device),
                  torch.rand(size.head_dim, device=device)) if linear else None
        return q, k, v, kept, branch, int8, 128, block_k

    keys = max(1, int(share(tiny) * -(-size.keys // block_k))) * block_k
    name = f"attention: {size}, blocks of {block_k}" + ", linear branch" * linear + ", int8" * int8
    case = Case(name=name, inputs=inputs, expected=sparse_attention.attend_kept_blocks, bound=1e-2,
                work=4 * size.head_dim * size.queries * size.heads * keys)
    return [Candidate(case, "today", sparse_attention.attend_kept_blocks),
            *(Candidate(case, name, partial(attention.attend, tiling=way)) for name, way in ways().items()
              if names is None or name in names)]


def chosen_blocks(size: Attention, tiny: bool) -> list[Candidate]:
    """Which blocks are kept, of the means of all."""
    def inputs(device: str) -> tuple:
        return tuple(torch.randn(1, size.heads, -(-size.keys // block), size.head_dim, device=device)
                     for block in (128, 64))

    def unsorted(pooled_q: Tensor, pooled_k: Tensor) -> Tensor:
        keep = max(1, int(share(tiny) * pooled_k.shape[2]))
        scores = pooled_q @ (pooled_k - pooled_k.mean(2, keepdim=True)).mT
        return scores.topk(keep, dim=-1, sorted=False).indices.int().sort(dim=-1).values

    today = partial(reference.kept_blocks, keep_ratio=share(tiny))
    case = Case(name=f"attention: {size}, kept blocks", inputs=inputs, expected=today, bound=1e-3)
    return [Candidate(case, "today", today, compiles=False),
            Candidate(case, "topk unsorted, sorted as int32", unsorted, compiles=False),
            Candidate(case, "a kernel", partial(attention.kept_blocks, keep_ratio=share(tiny)))]


def summaries(size: Attention, tiny: bool) -> list[Candidate]:
    """The sums of the linear branch: today's kernel, in stretches and tiles of other lengths."""
    def formula(k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bmhd,bmhe->bhde", k.float().softmax(-1), v.float())

    def summarise(k: Tensor, v: Tensor, stretch: int, tile: int, warps: int, stages: int) -> Tensor:
        batch, keys, heads, head_dim = k.shape
        stretches = -(-keys // stretch)
        mixed = k.new_empty((batch, heads, stretches, head_dim, head_dim), dtype=torch.float32)
        total = k.new_empty((batch, heads, stretches, head_dim), dtype=torch.float32)
        sparse_attention.summary_kernel[(stretches, batch * heads)](
            k, v, mixed, total, keys, heads, *k.stride()[:3], *v.stride()[:3], HEAD_DIM=head_dim, STRETCH=stretch,
            TILE=tile, TILES=-(-min(stretch, keys) // tile), num_warps=warps, num_stages=stages)
        return mixed.sum(2)

    case = Case(name=f"attention: {size}, sums of the linear branch", bound=1e-2,
                inputs=lambda device: qkv(size, tiny, device)[1:], expected=formula)
    others = [(512, 64, 8, 3), (1024, 64, 4, 3), (512, 64, 4, 3), (512, 64, 4, 2), (512, 32, 4, 3), (1024, 32, 4, 3),
              (1024, 128, 8, 2), (2048, 64, 8, 3), (256, 64, 4, 3)]
    return [Candidate(case, name, partial(summarise, stretch=stretch, tile=tile, warps=warps, stages=stages))
            for name, (stretch, tile, warps, stages) in {
                "today": (sparse_attention.STRETCH, sparse_attention.TILE, 8, 3),
                **{f"{each[0]} in {each[1]}, w{each[2]} s{each[3]}": each for each in others}}.items()]


def dense(size: Attention, tiny: bool) -> list[Candidate]:
    """With int8 logits, the quantisers included; and torch's in bf16."""
    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    case = Case(name=f"attention: {size}, all blocks, int8", inputs=partial(qkv, size, tiny), bound=5e-2,
                expected=int8_attention.int8_attention, work=4 * size.head_dim * size.queries * size.keys * size.heads)
    names = ("overlap", "overlap tma", "one", "overlap s4", "one tma", "wide s2", "unroll s2", "unroll tma s2",
             "overlap shared w4", "overlap shared tma w4")
    return [Candidate(case, "today", int8_attention.int8_attention),
            Candidate(case, "torch's, not int8", torchs, compiles=False),
            *(Candidate(case, name, partial(attention.int8_attention, tiling=ways()[name])) for name in names)]


# ---------------------------------------------------------------- convolutions

@dataclass(frozen=True)
class Conv:
    channels: int
    outputs: int
    frames: int
    height: int
    width: int
    kernel: tuple[int, int, int] = (3, 3, 3)

    def __str__(self) -> str:
        kernel = "x".join(map(str, self.kernel))
        return f"{self.channels}->{self.outputs} {kernel} {self.frames}x{self.height}x{self.width}"

    @property
    def work(self) -> float:
        return 2 * self.outputs * self.fan_in * self.frames * self.height * self.width

    @property
    def fan_in(self) -> int:
        return self.channels * self.kernel[0] * self.kernel[1] * self.kernel[2]


CONVS = {"full": Conv(96, 96, 16, 480, 832), "half": Conv(192, 192, 16, 240, 416), "out": Conv(96, 3, 16, 480, 832),
         "slab": Conv(96, 96, 4, 480, 832), "larger": Conv(192, 96, 8, 480, 832, (1, 3, 3)),
         "quarter": Conv(384, 384, 16, 120, 208), "in time": Conv(384, 768, 16, 120, 208, (3, 1, 1))}
TINY_CONVS = {"full": Conv(96, 96, 2, 3, 70, (1, 3, 3)), "half": Conv(64, 192, 1, 3, 9, (2, 1, 3)),
              "out": Conv(32, 3, 1, 2, 5), "larger": Conv(32, 96, 2, 3, 5, (1, 3, 3)),
              "in time": Conv(32, 64, 1, 2, 5, (3, 1, 1))}
PLAIN = causal_conv.Tiling()
# of shared rows: of the first, two programs fit a multiprocessor
NARROW = replace(PLAIN, shared_rows=True, rows=4, stages=2)
WIDE = replace(PLAIN, shared_rows=True, rows=4, columns=128, warps=8, stages=3)
BROAD = replace(WIDE, rows=2, first=128, rest=64)
DEEP = replace(PLAIN, rows=1, columns=128, depth=64, first=128, rest=64, warps=8, stages=4)
TILINGS = {
    "full": {
        "triton 2x64 w4 s5": PLAIN, "shared rows 4x64 w4 s2": NARROW, "shared rows 4x128 w8 s3": WIDE,
        "triton 4x64 w4 s4": replace(PLAIN, rows=4, stages=4),
        "shared rows 2x64 w4 s3": replace(NARROW, rows=2, stages=3),
        "shared rows 2x64 w4 s2": replace(NARROW, rows=2),
        "shared rows 2x128 w8 s4": replace(WIDE, rows=2, stages=4),
        "triton 2x64 w4 s4 168 registers": replace(PLAIN, stages=4, registers=168),
        "triton 2x128 w8 s7": replace(PLAIN, columns=128, warps=8, stages=7),
        "triton 1x128 128 w8 s5": replace(PLAIN, rows=1, columns=128, first=128, rest=0, warps=8, registers=128),
        "triton 1x128 w4 s5": replace(PLAIN, rows=1, columns=128),
        "triton 2x64 128 w4 s5": replace(PLAIN, first=128, rest=0),
        "triton 4x128 w8 s5": replace(PLAIN, rows=4, columns=128, warps=8),
        "pointers 2x64 w4 s4": replace(PLAIN, descriptors=False, stages=4),
        "pointers 1x128 128 w8 s4": replace(PLAIN, rows=1, columns=128, first=128, rest=0, warps=8, descriptors=False,
                                            stages=4),
        "triton 2x64 w4 s5 group 64": replace(PLAIN, group=64),
        "triton 2x64 w4 s5 frame by frame": replace(PLAIN, group=1 << 20),
        "shared rows 4x64 w4 s2 frame by frame": replace(NARROW, group=1 << 20)},
    "half": {"shared rows 2x128 128+64 w8 s3": BROAD, "shared rows 4x64 w4 s2": NARROW, "triton 2x64 w4 s5": PLAIN,
             "triton 1x128 128+64 d64 w8 s4": DEEP, "shared rows 4x128 w8 s3": WIDE},
    "out": {"triton 4x64 16 w4 s6": replace(PLAIN, rows=4, first=16, rest=0, stages=6),
            "shared rows 4x128 16 w4 s3": replace(NARROW, columns=128, first=16, rest=0, stages=3),
            "shared rows 8x64 16 w4 s3": replace(NARROW, rows=8, first=16, rest=0, stages=3)},
    "slab": {"triton 2x64 w4 s5": PLAIN, "shared rows 4x64 w4 s2": NARROW, "shared rows 4x128 w8 s3": WIDE},
    "larger": {"triton 2x64 w4 s5": PLAIN, "shared rows 4x64 w4 s2": NARROW, "shared rows 4x128 w8 s3": WIDE},
    "quarter": {"shared rows 2x128 128+64 w8 s3": BROAD, "shared rows 4x64 w4 s2": NARROW,
                "triton 1x128 128+64 d64 w8 s4": DEEP},
    "in time": {"triton 2x64 w4 s5": PLAIN}}
# channels in and out that the library is offered instead, with zeros behind the real ones
PADDED = {"full": [(96, 128), (128, 128), (128, 96)], "half": [(192, 256)], "out": [(96, 8), (96, 16), (96, 32)],
          "slab": [(96, 128)]}


def convolutions(tiny: bool) -> list[Candidate]:
    found = []
    for part, conv in (TINY_CONVS if tiny else CONVS).items():
        case = Case(name=f"conv: {conv}, bias and residual", inputs=partial(conv_inputs, conv, low(tiny)),
                    expected=conv_expected, bound=6e-3, work=conv.work)          # one rounding to bf16 is 1.7e-3
        found.append(Candidate(case, "today", conv_today))
        found += [Candidate(case, name, partial(causal_conv.causal_conv, tiling=tiling))
                  for name, tiling in TILINGS[part].items() if not (tiny and tiling.shared_rows)]
        found += [] if tiny else conv_alone(conv, PADDED.get(part, []))
    # last what the interpreter could not check: a fault on the device would spoil all that follows
    return sorted(found, key=lambda each: each.name.startswith("shared rows"))


def conv_inputs(conv: Conv, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Window, weight, bias, residual, out."""
    def clip(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last_3d).normal_()

    made = 1, conv.outputs, conv.frames, conv.height, conv.width
    return (clip(1, conv.channels, conv.frames + conv.kernel[0] - 1, conv.height, conv.width),
            clip(conv.outputs, conv.channels, *conv.kernel) * conv.fan_in ** -0.5,
            torch.randn(conv.outputs, dtype=dtype, device=device), clip(*made), clip(*made))


def library(window: Tensor, weight: Tensor) -> Tensor:
    return F.conv3d(window, weight, padding=(0, weight.shape[3] // 2, weight.shape[4] // 2))


def conv_today(window: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, out: Tensor) -> Tensor:
    y = library(window, weight).contiguous(memory_format=torch.channels_last_3d)
    around_conv.add_bias(y, bias, residual, out)
    return out


def conv_expected(window: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
                  out: Tensor | None = None) -> Tensor:
    """In fp32, a frame at a time, so that the library needs little memory. TF32 holds bf16 and fp16 as they are."""
    depth, weight = weight.shape[2], weight.float()
    y = torch.cat([library(window[:, :, frame:frame + depth].float(), weight)
                   for frame in range(window.shape[2] - depth + 1)], 2)
    return y if bias is None else y + bias.float().view(-1, 1, 1, 1) + residual.float()


def conv_alone(conv: Conv, padded: list[tuple[int, int]]) -> list[Candidate]:
    """The library's without bias and residual: what an epilogue could save, and what it makes of more channels."""
    def one(name: str, call: Callable[..., Tensor], ins: int, outs: int) -> Candidate:
        def inputs(device: str) -> tuple[Tensor, Tensor]:
            window, weight, *_ = conv_inputs(conv, torch.bfloat16, device)
            more = ins - conv.channels
            window, weight = (
                F.pad(x, (0, 0) * 3 + pad).contiguous(memory_format=torch.channels_last_3d)
                for x, pad in ((window, (0, more)), (weight, (0, more, 0, outs - conv.outputs))))
            return window, weight

        case = Case(name=f"conv: {conv}, alone", inputs=inputs, expected=conv_expected, bound=6e-3, work=conv.work)
        return Candidate(case, name, call, compiles=False)

    def pictures(window: Tensor, weight: Tensor) -> Tensor:
        y = F.conv2d(window.transpose(1, 2).flatten(0, 1), weight[:, :, 0], padding=1)
        return y.unflatten(0, (1, -1)).transpose(1, 2)

    real = conv.channels, conv.outputs
    found = [one("cuDNN", library, *real), *(one(f"cuDNN {ins}->{outs}", library, ins, outs) for ins, outs in padded)]
    return found + [one("cuDNN, frames as pictures", pictures, *real)] * (conv.kernel == (1, 3, 3))
