"""The parts that time: this device's roofs, our kernels beside their rivals, and whole models with random weights."""

import importlib.util
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dailies.jobs.gpu.checks import around_norm
from dailies.jobs.gpu.ground import Ground
from dailies.jobs.gpu.models import inputs, made_up_encoder, new_dit, new_vae
from dailies.jobs.gpu.night import night
from dailies.kernels.int8_attention import int8_attention
from dailies.kernels.int8_linear import int8_linear, quantize_rows
from dailies.kernels.norm import modulated_norm, rms_norm, rms_rope
from dailies.kernels.sparse_attention import sparse_attention
from dailies.model.card import ModelCard
from dailies.model.catalog import CATALOG
from dailies.model.graphs import Graphed
from dailies.model.layers import rotary_table
from dailies.model.shapes import VideoShape
from dailies.model.turbo import compile_blocks
from dailies.model.wan.decoder import to_uint8
from dailies.model.wan.vae import WanVAE

WANTED = ("triton", "transformers", "ftfy", "pydantic", "av", "ray", "boto3", "diffusers", "pyarrow", "typer")
TURBO_1_3B, TURBO_14B = "turbo-wan2.1-t2v-1.3b-480p", "turbo-wan2.1-t2v-14b-720p"
# tokens, width, feed-forward, heads of 81 frames: Wan 1.3B at 480p, Wan 14B at 720p
SIZES = ((32760, 1536, 8960, 12), (75600, 5120, 13824, 40))
SMALLER = VideoShape(frames=81, height=480, width=832)  # for 14B with dense attention, which at 720p takes 10 s
_TINY_SIZES = ((256, 256, 512, 2),)


def _machine(ground: Ground) -> None:
    """Versions, what is missing, and the roofs that everything else is measured against."""
    ground.tell("versions", torch=torch.__version__, cuda=str(torch.version.cuda), cudnn=torch.backends.cudnn.version(),
                triton=version_of("triton"), transformers=version_of("transformers"), python=platform.python_version())
    ground.tell("machine", cpus=os.cpu_count(), gcc=shutil.which("gcc") or "none", git=shutil.which("git") or "none",
                tmp_gb=shutil.disk_usage("/tmp").free / 1e9,
                missing=[name for name in WANTED if not importable(name)])
    n = 8192 if ground.on_gpu else 512
    if ground.on_gpu:
        about = torch.cuda.get_device_properties(0)
        ground.tell(about.name, capability=f"{about.major}.{about.minor}", multiprocessors=about.multi_processor_count,
                    gb=about.total_memory / 1e9, l2_mb=about.L2_cache_size / 1e6,
                    shared_memory=about.shared_memory_per_block_optin)
        x = ground.random(1 << 30, dtype=torch.float32)
        y = torch.empty_like(x)
        ground.tell("copy", tb_s=8 * len(x) / ground.ms(lambda: y.copy_(x)) / 1e9)
        del x, y
    a, b = ground.random(n, n), ground.random(n, n, seed=1)
    ground.tell(f"bf16 {n}^3", tflops=2 * n ** 3 / ground.ms(lambda: a @ b.mT) / 1e9)
    with ground.trying("int8"):
        i, j = (10 * a.float()).to(torch.int8), (10 * b.float()).to(torch.int8)
        ground.tell(f"int8 {n}^3", tops=2 * n ** 3 / ground.ms(lambda: torch._int_mm(i, j.mT)) / 1e9)
    if not ground.on_gpu:
        return
    for tokens, inner, outer in ((32760, 1536, 1536), (32760, 1536, 8960), (75600, 5120, 5120)):
        x, w = ground.random(tokens, inner), ground.random(outer, inner, seed=1)
        work = 2 * tokens * inner * outer
        name = f"{tokens}x{inner}->{outer}"
        ground.tell(f"cuBLAS bf16 {name}", tflops=work / ground.ms(lambda: x @ w.mT) / 1e9)
        with ground.trying(f"int8 {name}"):
            xi, wi = (30 * x).to(torch.int8), (30 * w).to(torch.int8)
            ground.tell(f"cuBLASLt int8 {name}", tops=work / ground.ms(lambda: torch._int_mm(xi, wi.mT)) / 1e9)
        with ground.trying(f"fp8 {name}"):
            low = dict(scale_a=torch.ones(tokens, 1, device="cuda"), scale_b=torch.ones(1, outer, device="cuda"),
                       out_dtype=torch.bfloat16)
            xf, wf = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
            ground.tell(f"cuBLASLt fp8 in rows {name}",
                        tflops=work / ground.ms(lambda: torch._scaled_mm(xf, wf.mT, **low)) / 1e9)
    from torch.nn.attention import SDPBackend, sdpa_kernel
    for tokens, heads in ((32760, 12), (75600, 40)):
        q, k, v = (ground.random(1, heads, tokens, 128, seed=seed) for seed in range(3))
        work = 4 * heads * tokens ** 2 * 128
        ground.tell(f"SDPA as torch chooses {tokens} {heads} heads", tflops=work / ground.ms(
            lambda: F.scaled_dot_product_attention(q, k, v)) / 1e9)
        for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION") if heads == 12 else ():
            with ground.trying(backend), sdpa_kernel(getattr(SDPBackend, backend)):
                ground.tell(f"SDPA {backend} {tokens} {heads} heads", tflops=work / ground.ms(
                    lambda: F.scaled_dot_product_attention(q, k, v)) / 1e9)


def importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _kernels(ground: Ground) -> None:
    """Ours against the library at rendered shapes; `of` a rival below 1 is a win."""
    for tokens, width, ffn, heads in _TINY_SIZES if ground.tiny else SIZES:
        _norms(ground, tokens, width, heads)
        _layers(ground, tokens, width, ffn)
        _attentions(ground, tokens, width, heads)


def _norms(ground: Ground, tokens: int, width: int, heads: int) -> None:
    x, update = ground.random(1, tokens, width, dtype=torch.float32), ground.random(1, tokens, width, seed=1)
    around, elements, name = around_norm(ground, update), tokens * width, f"{tokens}x{width}"
    rope = rotary_table((tokens, 1, 1), width // heads, ground.device)
    gain = ground.random(width, dtype=torch.float32, seed=6)
    calls: dict[str, tuple[int, Callable[[], Any]]] = {
        "residual, norm, modulation to bf16": (
            12, lambda: modulated_norm(x, **around, output=torch.bfloat16)),
        "residual, norm, modulation to int8": (
            11, lambda: modulated_norm(x, **around, output="rows")),
        "rms, rope of q and k": (8, lambda: rms_rope(update, update, gain, gain, rope, heads=heads)),
        "rms norm of q": (4, lambda: rms_norm(update, gain)),
        "quantise rows": (3, lambda: quantize_rows(update))}
    for what, (size, call) in calls.items():
        with ground.trying(what):
            ms = ground.ms(call)
            ground.tell(f"{what} {name}", ms=ms, tb_s=size * elements / ms / 1e9)


def _layers(ground: Ground, tokens: int, width: int, ffn: int) -> None:
    for inner, outer, gelu, gated in ((width, width, False, True), (width, width, False, False),
                                      (width, ffn, True, False), (ffn, width, False, True)):
        name = f"linear {tokens}x{inner}->{outer}{', GELU' * gelu}{', gated' * gated}"
        with ground.trying(name):
            x, weight = ground.random(1, tokens, inner, seed=5), ground.random(outer, inner, seed=6) / inner ** 0.5
            bias = ground.random(outer, seed=7)
            rest = dict(gate=ground.random(1, 1, outer, dtype=torch.float32),
                        residual=ground.random(1, tokens, outer, dtype=torch.float32)) if gated else {}
            x8, weight8, work = quantize_rows(x), quantize_rows(weight), 2 * tokens * inner * outer
            ours = ground.ms(lambda: int8_linear(x8, weight8, bias, gelu=gelu, **rest))
            bf16 = ground.ms(lambda: F.linear(x, weight, bias))
            ground.tell(name, int8_ms=ours, tops=work / ours / 1e9, bf16_product_alone_ms=bf16,
                        bf16_tflops=work / bf16 / 1e9, of_bf16=ours / bf16)


def _attentions(ground: Ground, tokens: int, width: int, heads: int) -> None:
    q, k, v = (ground.random(1, tokens, heads, width // heads, seed=seed) for seed in range(3))
    work, name = 4 * tokens ** 2 * width, f"{tokens} {heads} heads"
    with ground.trying(f"attention {name}"):
        dense = ground.ms(lambda: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))))
        sage = ground.ms(lambda: int8_attention(q, k, v))
        ground.tell(f"int8 attention {name}", ms=sage, tflops=work / sage / 1e9, dense_ms=dense,
                    dense_tflops=work / dense / 1e9, of_dense=sage / dense)
        for int8, block_q, block_k in ((False, 128, 64), (False, 128, 128), (True, 128, 64), (True, 64, 128)):
            how = f"sparse attention, a tenth{', int8' * int8}, blocks {block_q}x{block_k}, {name}"
            with ground.trying(how):
                ms = ground.ms(lambda: sparse_attention(q, k, v, keep_ratio=0.1, int8=int8, block_q=block_q,
                                                        block_k=block_k))
                ground.tell(how, ms=ms, tflops=0.1 * work / ms / 1e9, of_dense=ms / dense)


def _clip(ground: Ground) -> None:
    """A step of Wan 1.3B at 480p in each way, distilled and not, and the text encoder."""
    card = CATALOG["demo-turbo" if ground.tiny else TURBO_1_3B]
    for precision, attention in (("int8", "sparse"), ("bf16", "sparse"), ("int8", "sage"), ("bf16", "sage")):
        steps(ground, card, precision, attention, ways=(precision, attention) == ("int8", "sparse"))
    card = CATALOG["demo" if ground.tiny else "wan2.1-t2v-1.3b"]
    for precision, attention in (("bf16", "dense"), ("int8", "dense"), ("int8", "sage")):
        steps(ground, card, precision, attention, ways=False)
    if not ground.tiny:
        with ground.trying("umT5"):
            encoder = made_up_encoder(card, ground.device)
            ids = torch.randint(0, 900, (1, 120), device=ground.device)
            ground.tell("umT5, a prompt of 120 tokens", ms=ground.ms(
                lambda: encoder(input_ids=ids).last_hidden_state), peak_gb=ground.peak_gb())


def steps(ground: Ground, card: ModelCard, precision: str, attention: str, *, ways: bool,
          shape: VideoShape | None = None) -> None:
    """A forward: eager, what the host takes to launch it, and with `ways` as a CUDA graph and compiled."""
    name = f"forward of {card.name}, {precision}, {attention}"
    with ground.trying(name):
        began = time.perf_counter()
        dit = new_dit(card, ground.device, precision, attention)
        given = inputs(card, dit, shape or some_shape(ground, card), ground.device)
        ground.wait()
        built_s = time.perf_counter() - began
        ground.peak_gb()
        eager = ground.ms(lambda: dit(*given))
        ground.wait()
        began = time.perf_counter()
        dit(*given)
        host = 1e3 * (time.perf_counter() - began)
        ground.wait()
        ground.tell(name, eager_ms=eager, host_ms=host, peak_gb=ground.peak_gb(), built_s=built_s, model=card.name,
                    precision=precision, attention=attention, width=card.dit_config.width, tuned=card.tuned_for_sparse,
                    tokens=math.prod(given[0].shape[2:]) // math.prod(card.dit_config.patch))
        if ways and ground.on_gpu:
            graphed = Graphed(dit.forward)
            ground.tell(f"{name}, CUDA graph", ms=ground.ms(lambda: graphed(*given)), peak_gb=ground.peak_gb(),
                        recorded=len(graphed.recordings))
            del graphed
            with ground.trying(f"{name}, compiled"):
                began = time.perf_counter()
                compile_blocks(dit)
                dit(*given)
                ground.wait()
                compile_s = time.perf_counter() - began
                ground.tell(f"{name}, compiled", ms=ground.ms(lambda: dit(*given)), compile_s=compile_s)


def some_shape(ground: Ground, card: ModelCard) -> VideoShape:
    return VideoShape(frames=5, height=64, width=64) if ground.tiny else card.shape_for()[0]


def decode(ground: Ground) -> None:
    """A clip of 81 frames at 480p, in slabs of a CPU's size and of a GPU's."""
    decodes(ground, CATALOG["demo" if ground.tiny else TURBO_1_3B], some_shape(ground, CATALOG[TURBO_1_3B]))


DECODES = (("bf16", "auto", None, False), ("bf16", "auto", None, True), ("fp32", "auto", None, False),
           ("bf16", "eager", 2 ** 28, False), ("bf16", "eager", 2 ** 22, False))


def decodes(ground: Ground, card: ModelCard, shape: VideoShape, ways: tuple[tuple, ...] = DECODES) -> None:
    """ways: precision; by kernels or torch's own operators; elements that a layer makes at a time, None as it chooses;
    whether cuDNN chooses by time."""
    _, *grid = card.grid.of(shape)
    for precision, impl, slab, benchmark in ways:
        name = (f"decode {shape}, {precision}, {impl}, slabs of {slab or 'its choice'}"
                f"{', cuDNN chooses by time' * benchmark}")
        with ground.trying(name), cudnn_by_time(benchmark):
            vae = new_vae(card, ground.device, precision)
            vae.impl = impl
            latent = ground.random(1, 16, *grid, dtype=vae.from_latent.weight.dtype)

            def run(vae: WanVAE = vae, latent: Tensor = latent, slab: int | None = slab) -> float:
                began = time.perf_counter()
                for _, _, piece in vae.decode_pieces(latent, slab=slab):
                    to_uint8(piece[0])
                ground.wait()
                return time.perf_counter() - began
            first = run()
            ground.peak_gb()
            ground.tell(name, seconds=min(run(), run()), first_s=first, peak_gb=ground.peak_gb())


@contextmanager
def cudnn_by_time(wanted: bool) -> Iterator[None]:
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False


def profile(ground: Ground) -> None:
    """Where a step and a decode go: the kernels that take most."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * ground.on_gpu]
    card = CATALOG["demo-turbo" if ground.tiny else TURBO_1_3B]
    dit = new_dit(card, ground.device, "int8", "sparse")
    given = inputs(card, dit, some_shape(ground, card), ground.device)
    vae = new_vae(card, ground.device, "bf16")
    latent = ground.random(1, 16, *card.grid.of(some_shape(ground, card))[1:], dtype=vae.from_latent.weight.dtype)
    for name, call in (("step", lambda: dit(*given)), ("decode", lambda: list(vae.decode_pieces(latent)))):
        call()
        ground.wait()
        with profiled(activities=kinds) as seen:
            call()
            ground.wait()
        events = [event for event in seen.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
        total = sum(event.self_device_time_total for event in events)
        ground.tell(f"{name}: all kernels", ms=total / 1e3, launches=sum(event.count for event in events))
        for event in sorted(events, key=lambda event: -event.self_device_time_total)[:16]:
            ground.tell(f"{name}: {event.key[:100]}", ms=event.self_device_time_total / 1e3, calls=event.count)


def big(ground: Ground) -> None:
    """Wan 14B turbo and Linum at 720p, a forward each (a clip takes 4 and 100), and the decoder at 720p."""
    if ground.tiny:
        return
    steps(ground, CATALOG[TURBO_14B], "int8", "sparse", ways=False)
    for precision, attention in (("bf16", "sparse"), ("int8", "sage")):
        steps(ground, CATALOG[TURBO_14B], precision, attention, ways=False)
    for precision, attention in (("bf16", "dense"), ("int8", "dense"), ("int8", "sage")):
        steps(ground, CATALOG["wan2.1-t2v-14b"], precision, attention, ways=False, shape=SMALLER)
    linum = CATALOG["linum-v2-720p"]
    shape = VideoShape(frames=121, height=720, width=1280)
    steps(ground, linum, "bf16", "dense", ways=False, shape=shape)
    decodes(ground, linum, shape, DECODES[:1])


PARTS: dict[str, Callable[[Ground], None]] = {"machine": _machine, "kernels": _kernels, "clip": _clip, "night": night,
                                              "decode": decode, "profile": profile, "big": big}
