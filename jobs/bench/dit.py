"""One forward of a Wan transformer against diffusers': the same random weights, latent, text and threads, in turns.

On a CPU two blocks of the model and 2,340 tokens; on a GPU the whole model and the whole clip that it makes by default.
The weights are made where they run. Where diffusers is not installed, ours are timed alone.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dailies.jobs.bench.kernels import roof, seconds_of
from dailies.jobs.gpu import models
from dailies.jobs.usage import UsageError, card_named
from dailies.model import checkpoint
from dailies.model.catalog import CATALOG
from dailies.model.graphs import Graphed
from dailies.model.wan import keys as wan_keys
from dailies.model.wan.card import WanCard
from dailies.model.wan.transformer import WanConfig, WanDiT

CPU_BLOCKS, CPU_GRID = 2, (3, 60, 52)                  # latent steps, height, width: 2,340 tokens
REPEATS = 8                                            # in turns; the best counts
WAYS = (("fp32", "dense"), ("bf16", "dense"), ("bf16", "sparse"),
        ("int8", "dense"), ("int8", "sage"), ("int8", "sparse"))
NUMBERS = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    latent: Tensor                                     # [1, C, T, H, W]
    timestep: Tensor                                   # [1]
    text: Tensor                                       # [1, L, E]


@torch.inference_mode()
def rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A line for each way to run the model.  Raises UsageError for a model without a peer."""
    card, device = card_with_peer(name), "cuda" if torch.cuda.is_available() else "cpu"
    grid = card.grid.of(card.shape_for()[0])[1:]
    if device == "cpu":
        grid, card = CPU_GRID, replace(card, dit_fields={**card.dit_fields, "layers": CPU_BLOCKS})
    config = card.dit_config
    torch.manual_seed(0)
    given = Inputs(latent=torch.randn(1, config.latent_channels, *grid, device=device),
                   timestep=torch.tensor([500], device=device),
                   text=torch.randn(1, config.text_len, config.text_dim, device=device))
    calls: dict[tuple[str, ...], Callable[[], Tensor]] = {}
    text_calls: dict[tuple[str, ...], Callable[[], Any]] = {}
    precisions = ("fp32", "bf16", "int8") if device == "cpu" else ("bf16", "int8")
    if has_peer := find_spec("diffusers") is not None:
        exact = models.new_dit(card, device, "fp32", "dense")
        for precision in precisions[:-1]:
            calls["diffusers", precision] = diffusers_forward(exact, precision, given)
        del exact
    for way in WAYS:
        if way[0] in precisions:
            dit = models.new_dit(card, device, *way)
            calls[way], text_calls[way] = our_forward(dit, dit, given)
            if device == "cuda":
                calls[*way, "CUDA graph"], _ = our_forward(dit, Graphed(dit.forward), given)
    outputs = {way: call() for way, call in calls.items()}
    wall, cpu = in_turns(calls, device)
    want = outputs["diffusers" if has_peer else "bf16", "bf16" if has_peer else "dense"]
    tokens = math.prod(side // step for side, step in zip(grid, config.patch, strict=True))
    for way, text_call in text_calls.items():
        figures: dict[str, Any] = {"ms": 1e3 * wall[way]}
        for peer in [peer for peer in calls if peer[0] == "diffusers"]:
            figures |= {f"{' '.join(peer)} ms": 1e3 * wall[peer], f"of {' '.join(peer)}": wall[way] / wall[peer]}
            if device == "cpu":                         # where other programs run too, this says more
                figures[f"of its CPU seconds in {peer[1]}"] = cpu[way] / cpu[peer]
        if (*way, "CUDA graph") in calls:
            figures["ms as a CUDA graph"] = 1e3 * wall[*way, "CUDA graph"]
        text_call()
        figures["text ms, once a clip"] = 1e3 * seconds_of(text_call, device)
        figures[f"roof ({NUMBERS[way[0]]})"] = operations(config, tokens) / wall[way] / roof(NUMBERS[way[0]], device)
        difference = "relative difference" if has_peer else "relative difference from ours in bf16"
        figures[difference] = ((outputs[way] - want).norm() / want.norm()).item()
        if not has_peer:
            figures["diffusers"] = "not timed: it is not installed"
        yield f"{name} forward, {config.layers} blocks, {tokens:,} tokens, {way[0]}, {way[1]} attention", figures


def card_with_peer(name: str) -> WanCard:
    comparable = [card.name for card in CATALOG.values() if card.family == WanCard.family and not card.takes_image]
    if card_named(name).name not in comparable:
        raise UsageError("bench model compares with diffusers' text-to-video transformer of Wan: "
                         f"{', '.join(comparable)}; got {name}")
    return CATALOG[name]


def our_forward(dit: WanDiT, forward: Callable[..., Tensor],
                given: Inputs) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
    """The forward of one step, as the sampler calls it, and what it does once a clip: keys and values of the text."""
    context = dit.embed(list(given.text))
    return lambda: forward(given.latent, given.timestep, context, None), lambda: dit.embed(list(given.text))


def diffusers_forward(ours: WanDiT, precision: str, given: Inputs) -> Callable[[], Tensor]:
    """Of the weights of ours, with the modules in fp32 that from_pretrained keeps there."""
    import diffusers
    config = ours.config
    diffusers.logging.set_verbosity_error()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    with torch.device("meta"):
        dit = diffusers.WanTransformer3DModel(
            num_attention_heads=config.heads, attention_head_dim=config.width // config.heads, num_layers=config.layers,
            ffn_dim=config.ffn)
    kept = dit._keep_in_fp32_modules
    state = {name: tensor.to(torch.float32 if any(part in name for part in kept) else dtype, copy=True)
             for name, tensor in checkpoint.released_state(ours, wan_keys.WAN_DIFFUSERS).items()}
    dit.load_state_dict(state, assign=True)
    dit.rope = type(dit.rope)(config.width // config.heads, config.patch, 1024)       # its tables are in no file
    dit.to(given.latent.device).eval().requires_grad_(False)
    latent, text = given.latent.to(dtype), given.text.to(dtype)
    return lambda: dit(latent, given.timestep, text, return_dict=False)[0].float()


def in_turns(calls: dict[tuple[str, ...], Callable[[], Tensor]], device: str,
             repeats: int | None = None) -> tuple[dict, dict]:
    """Seconds by the clock and of the processor, of each one's best; in turns, so that all meet the same machine."""
    wall, cpu = dict.fromkeys(calls, math.inf), dict.fromkeys(calls, math.inf)
    for _ in range(repeats or REPEATS):
        for way, call in calls.items():
            before = time.process_time()
            wall[way] = min(wall[way], seconds_of(call, device))
            cpu[way] = min(cpu[way], time.process_time() - before)
    return wall, cpu


def operations(config: WanConfig, tokens: int) -> int:
    """Of the linear layers and of attention to all keys, two for a product and a sum."""
    width, text = config.width, config.text_len
    linear = 6 * width ** 2 + 2 * width * config.ffn
    return config.layers * 2 * tokens * (linear + 2 * width * (tokens + text))
