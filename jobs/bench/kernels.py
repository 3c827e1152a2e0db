"""Each kernel against a named rival: on a GPU at the shapes that are rendered, on a CPU at 2,340 tokens.

Every line first checks that both give the same, then times them in turns, and keeps the best of each. A rival that
gives something else, or nothing, is not timed, and the line says so. `roof` is the share of what the device does
at most, which is measured here, in the same run: bytes of a long copy, operations of torch's own large square product
in the same number format.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dailies.kernels import cases
from dailies.kernels.int8_attention import int8_attention
from dailies.kernels.int8_linear import (
    int8_linear,
    pack,
    packed_feed_forward_,
    packed_linear,
    quantize_blocks,
    quantize_rows,
    reference,
)
from dailies.kernels.norm import Affine, Update, modulated_norm, rms_norm, rms_rope
from dailies.kernels.sparse_attention import sparse_attention
from dailies.kernels.sparse_attention.reference import kept_blocks, pool_blocks
from dailies.model.layers import RMSNorm, rotary_table, rotate

_Rows = Iterator[tuple[str, dict[str, Any]]]
Calls = dict[str, Callable[[], Tensor | tuple]]

SECONDS = 2.0                                          # for the calls of one line


@torch.inference_mode()
def rows() -> _Rows:
    """On a GPU Triton's kernels, on a CPU what runs instead of them."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    for tokens in cases.RENDERED_TOKENS if on_gpu else [cases.CPU_TOKENS]:
        yield from begun(f"norms {tokens}", norms(tokens, device))
    for layer in cases.RENDERED_LAYERS if on_gpu else cases.CPU_LAYERS:
        yield from begun(f"int8 linear {layer}", layers(layer, device))
    if not on_gpu:
        yield from begun("int8 layers, packed", packed_layers(*cases.CPU_LAYERS))
    for case in cases.RENDERED_ATTENTION if on_gpu else [cases.CPU_ATTENTION]:
        yield from begun(f"attention {case}", attentions(case, device))


def begun(name: str, lines: _Rows) -> _Rows:
    """The lines; a line instead of them where what they share cannot be made."""
    try:
        yield from lines
    except Exception as error:
        yield name, {"failed": _said(error)}


def norms(case: cases.Tokens, device: str) -> _Rows:
    """The rivals are what the models do as they are written; compiled, on a GPU."""
    compiled = torch.compile if device == "cuda" else lambda function: function
    shape, broad = (case.batch, case.tokens, case.width), (case.batch, 1, case.width)
    x = cases.fill("normal", shape, 0, device=device)
    update = cases.fill("normal", shape, 1, torch.bfloat16, device)
    gate, scale, shift = (cases.fill("normal", broad, seed, device=device) for seed in (2, 3, 4))
    around = dict(affine=Affine(scale=scale, shift=shift), updates=[Update(update, gate)])

    @compiled
    def model_norm() -> tuple[Tensor, Tensor]:
        stream = x + gate * update
        return stream, (F.layer_norm(stream, x.shape[-1:], eps=1e-6) * (1 + scale) + shift).bfloat16()

    @compiled
    def model_norm_int8() -> tuple[Tensor, ...]:
        stream, y = model_norm()
        return stream, *reference.quantize_rows(y)

    elements = math.prod(shape)
    yield against(f"residual, norm, modulation {case}, bf16 out", device, elements * (4 + 2 + 4 + 2), "bytes", {
        "dailies": lambda: modulated_norm(x, **around, output=torch.bfloat16),
        f"{by(device)} as the model is written": model_norm})
    yield against(f"residual, norm, modulation {case}, int8 out", device, elements * (4 + 2 + 4 + 1), "bytes", {
        "dailies": lambda: flat(modulated_norm(x, **around, output="rows")),
        f"{by(device)}, quantised after": model_norm_int8})

    q, k = (cases.fill("normal", shape, seed, torch.bfloat16, device) for seed in (5, 6))
    norm = RMSNorm(case.width).to(device)
    rope = rotary_table((case.tokens, 1, 1), case.width // case.heads, device)

    @compiled
    def model_rope() -> tuple[Tensor, ...]:
        return tuple(rotate(norm(x).unflatten(-1, (case.heads, -1)), rope).bfloat16() for x in (q, k))

    yield against(f"RMS norm, rotary of q and k {case}", device, elements * 2 * (2 + 2), "bytes", {
        "dailies": lambda: rms_rope(q, k, norm.weight, norm.weight, rope, heads=case.heads),
        f"{by(device)} as the model is written": model_rope})
    model_rms = compiled(lambda: norm(q).bfloat16())
    yield against(f"RMS norm of cross-attention's q {case}", device, elements * (2 + 2), "bytes", {
        "dailies": lambda: rms_norm(q, norm.weight), f"{by(device)} as the model is written": model_rms})


def layers(case: cases.Layer, device: str) -> _Rows:
    """bf16 in, quantised here, bf16 out, or fp32 onto the residual.  The rivals: bf16 and fp32, and cuBLASLt's INT8."""
    shape = (case.batch, case.tokens, case.inputs)
    x = cases.fill("normal", shape, 0, torch.bfloat16, device)
    weight = cases.fill("normal", (case.outputs, case.inputs), 1, torch.bfloat16, device) / case.inputs ** 0.5
    given = dict(bias=cases.fill("normal", (case.outputs,), 2, torch.bfloat16, device), gelu=case.gelu)
    if case.gated:
        given["gate"] = cases.fill("normal", (case.batch, 1, case.outputs), 3, device=device)
        given["residual"] = cases.fill("normal", (case.batch, case.tokens, case.outputs), 4, device=device)

    def full(x: Tensor, weight: Tensor) -> Tensor:
        y = F.linear(x, weight, given["bias"].to(x.dtype))
        y = F.gelu(y, approximate="tanh") if case.gelu else y
        return torch.addcmul(given["residual"], given["gate"], y.float()) if case.gated else y

    in_rows = quantize_rows(weight)
    calls = {"dailies": lambda: int8_linear(x, in_rows, **given), "torch bf16": lambda: full(x, weight)}
    if device == "cuda":
        in_blocks, compiled = quantize_blocks(weight), torch.compile(library_linear)
        dtype = torch.float32 if case.gated else torch.bfloat16
        calls["torch bf16"] = torch.compile(calls["torch bf16"])
        calls["cuBLASLt int8, the rest compiled"] = lambda: compiled(
            x, *in_rows, given["bias"], case.gelu, given.get("gate"), given.get("residual"), dtype)
        calls["dailies, blocks"] = lambda: int8_linear(x, in_blocks, **given)
    else:
        wide = x.float(), weight.float()
        calls["torch fp32"] = lambda: full(*wide)
    yield against(f"int8 linear {case}", device, 2 * math.prod(shape) * case.outputs, "int8", calls, bound=0.05)


def library_linear(x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor, gelu: bool, gate: Tensor | None,
                   residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """int8_linear in rows by cuBLASLt's product, which takes more than 16 rows, and channels in eights."""
    values, scales = reference.quantize_rows(x)
    rows, pad = values[..., 0].numel(), -x.shape[-1] % 8
    values = F.pad(values.flatten(0, -2), (0, pad, 0, max(0, 17 - rows)))
    sums = torch._int_mm(values, F.pad(weight, (0, pad, 0, -len(weight) % 8)).mT)[:rows, :len(weight)]
    y = sums.view(*x.shape[:-1], len(weight)).float() * (scales[..., None] * weight_scales)
    return reference.epilogue(y, bias, gelu, gate, residual, dtype)


def packed_layers(square: cases.Layer, into: cases.Layer, out: cases.Layer) -> _Rows:
    """What a model in int8 runs on a CPU: weights packed once, x int8 already as its norm leaves it."""
    x = cases.fill("normal", (into.batch, into.tokens, into.inputs), 0)
    quantised, low = quantize_rows(x), x.bfloat16()
    weights = [cases.fill("normal", (case.outputs, case.inputs), seed) / case.inputs ** 0.5
               for seed, case in enumerate((square, into, out), 1)]
    square_int8, into_int8, out_int8 = (pack(quantize_rows(weight)) for weight in weights)
    square_low, into_low, out_low = (weight.bfloat16() for weight in weights)
    gate, residual = cases.fill("normal", (into.batch, 1, out.outputs), 4), cases.fill("normal", x.shape, 5)
    name = f"int8 linear, packed, of int8, {square.tokens}x{square.inputs}->{square.outputs}"
    yield against(name, "cpu", 2 * x.numel() * square.outputs, "int8", {
        "dailies": lambda: packed_linear(quantised, square_int8, torch.bfloat16),
        "torch bf16": lambda: F.linear(low, square_low), "torch fp32": lambda: F.linear(x, weights[0])}, bound=0.05)

    def full(x: Tensor, into: Tensor, out: Tensor) -> Tensor:
        return torch.addcmul(residual, gate, F.linear(F.gelu(F.linear(x, into), approximate="tanh"), out).float())

    def ours() -> Tensor:
        stream = residual.clone()
        packed_feed_forward_(stream, quantised, into_int8, out_int8, gate)
        return stream

    name = f"int8 feed-forward, packed, of int8, {into.tokens}x{into.inputs}->{into.outputs}->{out.outputs}"
    yield against(name, "cpu", 4 * x.numel() * into.outputs, "int8", {
        "dailies": ours, "torch bf16": lambda: full(low, into_low, out_low),
        "torch fp32": lambda: full(x, *weights[1:])}, bound=0.05)


def attentions(case: cases.Attention, device: str) -> _Rows:
    """bf16.  The rivals: torch's attention to all keys (to be beaten, not equalled), FlexAttention to the same."""
    q, k, v = case.inputs("normal", 0, torch.bfloat16, device)
    work = 4 * case.batch * case.heads * case.queries * case.keys * case.head_dim

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    yield against(f"int8 attention {case}", device, work, "bfloat16",
                  {"dailies": lambda: int8_attention(q, k, v), "torch dense": dense}, bound=0.05)

    keep_ratio = 0.1 if device == "cuda" else 0.25
    proj = tuple(cases.fill("normal", (case.head_dim,) * axes, seed, device=device) for seed, axes in ((1, 2), (2, 1)))
    work = int(keep_ratio * work)
    name = f"sparse attention {case} keep {keep_ratio}"
    if device == "cuda":
        yield against(f"{name}, blocks of 128", device, work, "bfloat16", {
            "dailies": lambda: sparse_attention(q, k, v, keep_ratio=keep_ratio, block_k=128),
            "FlexAttention, blocks given": flex(q, k, v, keep_ratio)})
    for what, options in {"": {}, ", int8": {"int8": True}, ", linear branch": {"proj": proj},
                          ", int8, linear branch": {"int8": True, "proj": proj}}.items():
        yield against(f"{name}{what}", device, work, "bfloat16", {
            "dailies": lambda options=options: sparse_attention(q, k, v, keep_ratio=keep_ratio, **options),
            "torch dense": dense}, bound=math.inf)


def flex(q: Tensor, k: Tensor, v: Tensor, keep_ratio: float) -> Callable[[], Tensor]:
    """FlexAttention over the kept blocks of 128, which it is given: their choice is not in its time."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    compiled = torch.compile(flex_attention)
    kept = kept_blocks(pool_blocks(q, 128), pool_blocks(k, 128), keep_ratio)
    counts = torch.full(kept.shape[:-1], kept.shape[-1], dtype=torch.int32, device=q.device)
    blocks = F.pad(kept, (0, -(-k.shape[1] // 128) - kept.shape[-1]))  # a row has room for all; the rest is not read
    mask = BlockMask.from_kv_blocks(counts, blocks, BLOCK_SIZE=128, seq_lengths=(q.shape[1], k.shape[1]))
    return lambda: compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)


def against(name: str, device: str, work: int, kind: str, calls: Calls,
            bound: float = 1e-2) -> tuple[str, dict[str, Any]]:
    """A line: ms of each, ours over each rival's, and our share of the roof, for `work` bytes or operations of a kind.

    A rival is not timed that fails, or whose results differ by more than `bound`, relative to the norm of ours; where
    ours fails, nothing is.
    """
    ours, *rivals = calls
    try:
        want = flat(calls[ours]())
        wrong = {rival: what for rival in rivals if (what := wrong_with(calls[rival], want, bound))}
        seconds = timed({call: run for call, run in calls.items() if call not in wrong}, device)
        figures: dict[str, Any] = {f"{call}, ms": 1e3 * taken for call, taken in seconds.items()}
        figures |= {f"of {rival}": seconds[ours] / seconds[rival] for rival in rivals if rival in seconds}
        return name, figures | {f"roof ({kind})": work / seconds[ours] / roof(kind, device)} | wrong
    except Exception as error:
        return name, {"failed": _said(error)}


def wrong_with(call: Callable, want: tuple[Tensor, ...], bound: float) -> str | None:
    """Why a rival is not timed; None for one that gives what is wanted."""
    try:
        for got, expected in zip(flat(call()), want, strict=True):
            difference = ((got.float() - expected.float()).norm() / expected.float().norm()).item()
            if not difference <= bound:                # nor is it a number
                return f"differs by {difference:.2g}, more than {bound}"
    except Exception as error:
        return f"failed: {_said(error)}"
    return None


def _said(error: Exception) -> str:
    """The first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def timed(calls: Calls, device: str) -> dict[str, float]:
    """Seconds of the best run of each; in turns, so that all meet the same machine."""
    best = dict.fromkeys(calls, math.inf)
    until = time.perf_counter() + SECONDS * len(calls)
    while time.perf_counter() < until or math.inf in best.values():
        for name, call in calls.items():
            best[name] = min(best[name], seconds_of(call, device))
    return best


def seconds_of(call: Callable, device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@cache
def roof(kind: str, device: str) -> float:
    """What the device reaches at most: bytes a second, or operations a second on one kind of numbers."""
    if kind == "bytes":
        x = torch.ones(1 << (28 if device == "cuda" else 26), device=device)
        y = torch.empty_like(x)
        return 8 * len(x) / timed({"copy": lambda: y.copy_(x)}, device)["copy"]
    size = 8192 if device == "cuda" else 1024
    a = cases.fill("normal", (size, size), 0, device=device)
    if kind == "int8":
        a = (10 * a).to(torch.int8)
        y = torch.empty(size, size, dtype=torch.int32, device=device)
        return 2 * size ** 3 / timed({"product": lambda: torch._int_mm(a, a.mT, out=y)}, device)["product"]
    a = a.to(getattr(torch, kind))
    return 2 * size ** 3 / timed({"product": lambda: a @ a.mT}, device)["product"]


def flat(results: Tensor | tuple) -> tuple[Tensor, ...]:
    """Tensors of a result; int8 values and their scales are one, dequantised: rounded the other way is still close."""
    if isinstance(results, Tensor):
        return results,
    parts = [part for result in results for part in (result if isinstance(result, tuple) else (result,))]
    if len(parts) > 1 and parts[-2].dtype == torch.int8:
        parts[-2:] = [parts[-2].float() * parts[-1][..., None]]
    return tuple(parts)


def by(device: str) -> str:
    return "torch.compile" if device == "cuda" else "torch"
