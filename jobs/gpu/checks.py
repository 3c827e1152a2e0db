"""The parts that check: what is computed on this device against references and other precisions, on the same inputs."""

import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from dailies.jobs.gpu.ground import Ground, difference
from dailies.jobs.gpu.kit import ROOT
from dailies.jobs.gpu.models import inputs, new_dit, new_vae, with_layers
from dailies.kernels.around_conv import add_bias, enlarge, norm_silu
from dailies.kernels.int8_attention import int8_attention
from dailies.kernels.int8_linear import int8_linear, quantize_blocks, quantize_rows
from dailies.kernels.norm import Affine, Update, modulated_norm, rms_norm, rms_rope
from dailies.kernels.sparse_attention import sparse_attention
from dailies.model.catalog import CATALOG, DEMO, DEMO_SPARSE
from dailies.model.graphs import Graphed
from dailies.model.layers import rotary_table
from dailies.model.linum.load import LINUM
from dailies.model.shapes import VideoShape
from dailies.model.turbo import compile_blocks

QUANTIZERS = {"rows": quantize_rows, "blocks": quantize_blocks}
# tokens, width, heads of Wan 1.3B, Wan 14B and Linum; the tokens are ragged: beside a tile, below one, over two
WIDTHS = ((129, 1536, 12), (70, 5120, 40), (260, 1664, 13))
# queries, keys, head_dim: more than a block, other keys than queries, one row over, fewer than a block
ATTENTIONS = ((200, 200, 128), (70, 193, 128), (129, 129, 64), (5, 5, 64))
KIT_TESTS = ("tests/test_graphs.py", "tests/test_kernels_norm.py", "tests/test_kernels_int8_linear.py",
             "tests/test_kernels_int8_attention.py", "tests/test_kernels_sparse_attention.py",
             "tests/test_kernels_around_conv.py", "tests/test_actors.py", "tests/test_wan_actors.py")


def norms_right(ground: Ground) -> None:
    for tokens, width, heads in WIDTHS:
        x, update = ground.random(1, tokens, width, dtype=torch.float32), ground.random(1, tokens, width, seed=1)
        around = around_norm(ground, update)
        with ground.trying(f"norm {tokens}x{width}"):
            got, want = both(partial(modulated_norm, x, **around, output=torch.bfloat16))
            ground.tell(f"norm {tokens}x{width}", stream_equal=bool(torch.equal(got[0], want[0])),
                        relative_error=difference(got[1], want[1]))
        for scheme in QUANTIZERS:
            with ground.trying(f"norm to int8 {scheme} {tokens}x{width}"):
                got, want = both(partial(modulated_norm, x, **around, output=scheme))
                ground.tell(f"norm to int8 {scheme} {tokens}x{width}", values_that_differ=(
                    (got[1].values != want[1].values).float().mean().item()))
        with ground.trying(f"rms, rope {tokens}x{width}"):
            q, k = (ground.random(1, tokens, width, seed=seed) for seed in (9, 10))
            gain = ground.random(width, dtype=torch.float32, seed=11)
            rope = rotary_table((tokens, 1, 1), width // heads, ground.device)
            got, want = both(partial(rms_rope, q, k, gain, gain, rope, heads=heads))
            ground.tell(f"rms, rope {tokens}x{width}", relative_error=max(map(difference, got, want)))
            got, want = both(partial(rms_norm, q, gain))
            ground.tell(f"rms norm {tokens}x{width}", relative_error=difference(got, want))


def around_norm(ground: Ground, update: Tensor) -> dict[str, Any]:
    """What modulated_norm is given beside the stream: the update, gated, and its modulation."""
    gate, scale, shift = (ground.random(1, 1, update.shape[-1], dtype=torch.float32, seed=seed) for seed in (2, 3, 4))
    return dict(affine=Affine(scale=scale, shift=shift), updates=[Update(update, gate)])


def both(call: Callable[..., Any]) -> tuple[Any, Any]:
    """What runs on this device, and the reference."""
    return call(impl="auto"), call(impl="reference")


def linears_right(ground: Ground) -> None:
    for (tokens, width, _), (scheme, quantize) in product(WIDTHS, QUANTIZERS.items()):
        name = f"int8 linear {scheme} {tokens}x{width}->264"
        x = ground.random(1, tokens, width, seed=1)
        weight = quantize(ground.random(264, width, seed=5) / width ** 0.5)
        bias = ground.random(264, seed=6)
        with ground.trying(name):
            got, want = both(partial(int8_linear, x, weight, bias, gelu=True))
            ground.tell(f"{name}, GELU", relative_error=difference(got, want))
            gate = ground.random(1, 1, 264, dtype=torch.float32, seed=7)
            residual = ground.random(1, tokens, 264, dtype=torch.float32, seed=8)
            got, want = both(partial(int8_linear, x, weight, bias, gate=gate, residual=residual))
            ground.tell(f"{name}, gated", relative_error=difference(got, want))


def attention_right(ground: Ground) -> None:
    for dtype, (queries, keys, head_dim) in product((torch.bfloat16, torch.float16), ATTENTIONS):
        name = f"int8 attention {queries}x{keys}x{head_dim} {dtype}"
        with ground.trying(name):
            q, k, v = qkv(ground, queries, keys, head_dim, dtype)
            ground.tell(name, relative_error=difference(*both(partial(int8_attention, q, k, v))))


def sparse_right(ground: Ground) -> None:
    cases = product((torch.bfloat16, torch.float16), ATTENTIONS, (False, True), ((128, 64), (64, 128)))
    for dtype, (queries, keys, head_dim), int8, (block_q, block_k) in cases:
        name = f"sparse attention{', int8' * int8} {block_q}x{block_k} {queries}x{keys}x{head_dim} {dtype}"
        with ground.trying(name):
            q, k, v = qkv(ground, queries, keys, head_dim, dtype)
            proj = ground.random(head_dim, head_dim, seed=3), ground.random(head_dim, seed=4)
            how = dict(keep_ratio=0.5, proj=proj, int8=int8, block_q=block_q, block_k=block_k)
            ground.tell(name, relative_error=difference(
                *both(partial(sparse_attention, q, k, v, **how))))


def qkv(ground: Ground, queries: int, keys: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(ground.random(2, rows, 2, head_dim, dtype=dtype, seed=seed)
                 for seed, rows in enumerate((queries, keys, keys)))


def models_right(ground: Ground) -> None:
    """The shipped model in three ways against fp32, eager, as a CUDA graph, and compiled."""
    for card, precision, attention in ((DEMO, "bf16", "dense"), (DEMO, "int8", "sage"),
                                       (DEMO_SPARSE, "bf16", "sparse")):
        name = f"{card.name} {precision} {attention}"
        with ground.trying(name):
            dit, exact = (LINUM.load_dit(card, card.folder, card.runtime(ground.device, *how))
                          for how in ((precision, attention), ("fp32",)))
            latent, text = ground.random(1, 16, 13, 8, 8, dtype=torch.float32), [ground.random(7, 128)]
            timestep = torch.tensor([500.0], device=ground.device)
            given = latent, timestep, dit.embed_text(text)
            plain = dit(*given)
            ground.tell(name, of_fp32=difference(plain, exact(latent, timestep, exact.embed_text(text))))
            if ground.on_gpu:
                graphed = Graphed(dit.forward)
                graphed(*given)                         # a shape is recorded when it comes again
                ground.tell(f"{name}, CUDA graph", of_eager=difference(graphed(*given), plain),
                            again=difference(graphed(*given), plain), recorded=len(graphed.recordings))
            if not ground.tiny:
                began = time.perf_counter()
                compile_blocks(dit)
                ground.tell(f"{name}, compiled", of_eager=difference(dit(*given), plain),
                            compile_s=time.perf_counter() - began)


def around_conv_right(ground: Ground) -> None:
    """What stands around the VAE's convolutions, with results that are not overwritten left as NaN."""
    shapes = (96, 30, 52), (384, 7, 9), (3, 5, 5)
    for dtype, (channels, height, width) in product((torch.bfloat16, torch.float32), shapes):
        name = f"{channels}x{height}x{width} {dtype}"
        with ground.trying(f"around a convolution {name}"):
            x, residual = (ground.random(1, channels, 3, height, width, dtype=dtype, seed=seed).contiguous(
                memory_format=torch.channels_last_3d) for seed in (0, 1))
            gamma, bias = (ground.random(channels, dtype=dtype, seed=seed) for seed in (2, 3))

            large = (1, channels, 3, 2 * height, 2 * width)
            for what, shape, call in (
                    ("norm, SiLU", x.shape, partial(norm_silu, x, gamma, bias=bias)),
                    ("bias, residual", x.shape, partial(add_bias, x, bias, residual=residual)),
                    ("enlarge", large, partial(enlarge, x, bias=bias))):
                outs = (torch.full(shape, math.nan, dtype=dtype, device=ground.device).contiguous(
                    memory_format=torch.channels_last_3d) for _ in range(2))
                ground.tell(f"{what} {name}", relative_error=difference(
                    *(call(out, impl=impl) for out, impl in zip(outs, ("auto", "reference"), strict=True))))


def parity(ground: Ground) -> None:
    """Two blocks at full width and length: each precision and attention against fp32 on this device."""
    for name in ("demo",) if ground.tiny else ("wan2.1-t2v-1.3b", "linum-v2-360p", "wan2.1-t2v-14b"):
        card, want = with_layers(CATALOG[name], 2), None
        # of 14B at 480p: in fp32 its attention at 720p takes the whole part
        shape = VideoShape(frames=5, height=64, width=64) if ground.tiny else card.shape_for(
            "480p" if "480p" in card.resolutions else None)[0]
        for precision, attention in (("fp32", "dense"), ("bf16", "dense"), ("int8", "dense"), ("int8", "sage")):
            with ground.trying(f"{name} {precision} {attention}"):
                dit = new_dit(card, ground.device, precision, attention)
                got = dit(*inputs(card, dit, shape, ground.device))
                want = got if want is None else want
                ground.tell(f"{name}, 2 blocks, {precision}, {attention}", of_fp32=difference(got, want),
                            finite=bool(got.isfinite().all()))
                del dit


def vae_right(ground: Ground) -> None:
    """The decoder in bf16, and in fp32 with TF32, against fp32."""
    card = DEMO if ground.tiny else CATALOG["wan2.1-t2v-1.3b"]
    latent = ground.random(1, 16, *((3, 8, 8) if ground.tiny else (5, 60, 104)), dtype=torch.float32)
    want = None
    for precision, tf32, impl in (("fp32", False, "eager"), ("fp32", False, "auto"), ("fp32", True, "auto"),
                                  ("bf16", False, "eager"), ("bf16", False, "auto")):
        with ground.trying(f"VAE {precision}, TF32 {tf32}, {impl}"):
            torch.backends.cudnn.allow_tf32 = tf32
            vae = new_vae(card, ground.device, precision)
            vae.impl = impl
            got = vae.decode(latent.to(vae.from_latent.weight.dtype)).float()
            want = got if want is None else want
            ground.tell(f"VAE decode {list(latent.shape)} {precision}, TF32 {tf32}, {impl}",
                        of_fp32=difference(got, want), finite=bool(got.isfinite().all()))
    torch.backends.cudnn.allow_tf32 = True


def tests(ground: Ground) -> None:
    """The tests that need a CUDA device; each is in the log as soon as it is through."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "--maxfail=30",
               "--tb=short", "--continue-on-collection-errors", "--durations=8",
               *(KIT_TESTS if not ground.tiny else KIT_TESTS[:1])]
    said: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        for line in process.stdout:
            said.append(line.strip())
            print(line, end="", flush=True)
    ground.tell("pytest -m gpu", said=next((line.strip("= ") for line in reversed(said) if line), "nothing"),
                exit=process.returncode,
                failures=[line[:200] for line in said if line.startswith(("FAILED", "ERROR"))][:30])


PARTS: dict[str, Callable[[Ground], None]] = {
    "norms-right": norms_right, "linears-right": linears_right, "attention-right": attention_right,
    "sparse-right": sparse_right, "around-conv-right": around_conv_right, "models-right": models_right,
    "parity": parity, "vae-right": vae_right,
    "tests": tests}
