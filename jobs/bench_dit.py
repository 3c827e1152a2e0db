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

from jobs.bench_kernels import roof, seconds_of
from jobs.gpu import models
from jobs.usage import UsageError, card_named
from model import checkpoint, keys, turbo
from model.catalog import CATALOG, WanCard
from model.graphs import Graphed
from model.wan import WanConfig, WanDiT

CPU_BLOCKS, CPU_GRID = 2, (3, 60, 52)                  # latent steps, height, width: 2,340 tokens
REPEATS = 8                                            # in turns; the best counts
SECONDS = 30.0                                         # for a line: there are fewer turns where they take longer
LONG_S = 5.0                                           # what takes longer is not timed again for every line
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
    precisions = ("fp32", "bf16", "int8") if device == "cpu" else ("bf16", "int8")
    if has_peer := find_spec("diffusers") is not None:
        exact = models.new_dit(card, device, "fp32", "dense")
        for precision in precisions[:-1]:
            calls["diffusers", precision] = diffusers_forward(exact, precision, given)
        del exact
        want = calls["diffusers", "bf16"]()
    else:
        dit = models.new_dit(card, device, "bf16", "dense")
        want = our_forward(dit, dit, given)[0]()
    times = Times(device)
    for way in [way for way in WAYS if way[0] in precisions]:
        dit = models.new_dit(card, device, *way)
        ours, text_call = our_forward(dit, dit, given)
        turns = {**calls, way: ours}
        if device == "cuda":
            turns[*way, "CUDA graph"], _ = our_forward(dit, Graphed(dit.forward), given)
        output = ours()
        for call in turns.values() if device == "cuda" else ():         # kernels are compiled and chosen
            call()
        times.take(turns)
        figures = compared(way, list(calls), times) | {"text ms, once a clip": 1e3 * seconds_of(text_call, device)}
        number = NUMBERS[way[0]] if device == "cuda" or not turbo.fallbacks({}, device, way[0]) else "float32"
        tokens = math.prod(side // step for side, step in zip(grid, config.patch, strict=True))
        figures[f"roof ({number})"] = operations(config, tokens) / times.wall[way] / roof(number, device)
        difference = "relative difference" if has_peer else "relative difference from ours in bf16"
        figures[difference] = ((output - want).norm() / want.norm()).item()
        if not has_peer:
            figures["diffusers"] = "not timed: it is not installed"
        figures |= {"instead": "; ".join(notes)} if (notes := turbo.fallbacks({}, device, way[0])) else {}
        yield f"{name} forward, {config.layers} blocks, {tokens:,} tokens, {way[0]}, {way[1]} attention", figures


def compared(way: tuple[str, str], peers: list[tuple[str, ...]], times: "Times") -> dict[str, Any]:
    """A way's times, over those of its peers."""
    figures: dict[str, Any] = {"ms": 1e3 * times.wall[way]}
    for peer in peers:
        figures |= {f"{' '.join(peer)} ms": 1e3 * times.wall[peer],
                    f"of {' '.join(peer)}": times.wall[way] / times.wall[peer]}
        if times.device == "cpu":                       # where other programs run too, this says more
            figures[f"of its CPU seconds in {peer[1]}"] = times.cpu[way] / times.cpu[peer]
    if (*way, "CUDA graph") in times.wall:
        figures["ms as a CUDA graph"] = 1e3 * times.wall[*way, "CUDA graph"]
    return figures


def card_with_peer(name: str) -> WanCard:
    comparable = [card.name for card in CATALOG.values() if type(card) is WanCard and not card.takes_image]
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
             for name, tensor in checkpoint.released_state(ours, keys.WAN_DIFFUSERS).items()}
    dit.load_state_dict(state, assign=True)
    dit.rope = type(dit.rope)(config.width // config.heads, config.patch, 1024)       # its tables are in no file
    dit.to(given.latent.device).eval().requires_grad_(False)
    latent, text = given.latent.to(dtype), given.text.to(dtype)
    return lambda: dit(latent, given.timestep, text, return_dict=False)[0].float()


class Times:
    """Seconds by the clock and of the processor, of each one's best; in turns, so that all meet the same machine."""

    def __init__(self, device: str):
        self.device = device
        self.wall: dict[tuple[str, ...], float] = {}
        self.cpu: dict[tuple[str, ...], float] = {}

    def take(self, calls: dict[tuple[str, ...], Callable[[], Tensor]]) -> None:
        """REPEATS turns, or as many as there is time for; each once at least, and what is slow no second time."""
        until = time.perf_counter() + SECONDS
        for turn in range(REPEATS):
            for way, call in calls.items():
                known = self.wall.get(way, math.inf)
                if LONG_S < known < math.inf or turn and time.perf_counter() > until:
                    continue
                before = time.process_time()
                self.wall[way] = min(known, seconds_of(call, self.device))
                self.cpu[way] = min(self.cpu.get(way, math.inf), time.process_time() - before)


def operations(config: WanConfig, tokens: int) -> int:
    """Of the linear layers and of attention to all keys, two for a product and a sum."""
    width, text = config.width, config.text_len
    linear = 6 * width ** 2 + 2 * width * config.ffn
    return config.layers * 2 * tokens * (linear + 2 * width * (tokens + text))
