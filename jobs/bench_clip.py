"""One clip from prompt to MP4, stage by stage: seconds of each, and what that makes in an hour.

The actors are those of a night, in one process and one after the other, so nothing overlaps. On a GPU the first three
stages are its time, and MP4 the processor's, beside the next clip.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from actors.decoder import Decoder
from actors.denoisers import DENOISERS
from actors.messages import Request
from actors.text_encoder import TextEncoder
from jobs.usage import UsageError, card_named
from model import checkpoint, keys, turbo
from model.card import ModelCard
from model.catalog import DEMO, LinumCard
from model.text import new_encoder
from model.wan_vae import WanVAE

CLIPS, LONG_S = 3, 60.0                                # timed, of which the median counts; but one of a slow model
PROMPTS = ("a red square moves left on a white background", "a small blue circle moves up fast",
           "a large green triangle drifts to the right", "a tiny yellow cross falls slowly")
T5_XXL = dict(model_type="t5", vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
              feed_forward_proj="gated-gelu")


def rows(name: str, *, random_weights: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """A line for each way to run the model here.  Raises UsageError for one that needs weights, or an image."""
    card, device = card_named(name), "cuda" if torch.cuda.is_available() else "cpu"
    if card.takes_image:
        raise UsageError(f"bench clip times models that take text alone; {name} needs an image")
    if card.folder is None and not random_weights:
        raise UsageError(f"the weights of {name} do not come with dailies; say --random-weights: they cost the same")
    with ExitStack() as stack:
        weights = card.folder
        if random_weights:
            weights = Path(stack.enter_context(TemporaryDirectory()))
            write_weights(weights, card, device)
        for precision, attention, compiled in ways(card, device):
            figures = seconds_of_stages(card, weights, device, precision, attention, compiled)
            shape, _ = card.shape_for()
            yield (f"{name}, {shape}, {card.num_steps} steps, {precision}, {attention} attention"
                   f"{', compiled' if compiled else ''}"), figures


def ways(card: ModelCard, device: str) -> list[tuple[str, str, bool]]:
    """Precision, attention, compiled or not: on a CPU what runs by default and INT8; on a GPU more."""
    first = card.attentions[0]
    if device == "cpu":
        return [("fp32", first, False), ("int8", first, False)]
    return [*((precision, attention, False) for precision in ("bf16", "int8") for attention in card.attentions),
            ("int8", first, True)]


def seconds_of_stages(card: ModelCard, weights: Path, device: str, precision: str, attention: str,
                      compiled: bool) -> dict[str, Any]:
    threads = torch.get_num_threads()
    options = dict(precision=precision, threads=threads)
    stages: dict[str, Callable[[list], list]] = {
        "encode": TextEncoder(card, weights, device, **options),
        "sample": DENOISERS[type(card)](card, weights, device, attention=attention, compiled=compiled, **options),
        "decode": Decoder(card, weights, device, **options)}
    if (mp4 := mp4_writer()) is not None:
        stages["mp4"] = mp4
    asked = request_of(card, precision, attention)
    run(stages, replace(asked, num_steps=1), device)    # kernels are compiled and chosen
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken: list[dict[str, float]] = []
    for clip in range(CLIPS):
        prompt = PROMPTS[(clip + 1) % len(PROMPTS)]     # or the encoder would remember it
        taken.append(run(stages, replace(asked, prompt=prompt, seed=clip), device))
        if sum(taken[0].values()) > LONG_S:
            break
    figures: dict[str, Any] = {f"{stage} s": statistics.median(one[stage] for one in taken) for stage in stages}
    of_gpu = sum(figures[f"{stage} s"] for stage in ("encode", "sample", "decode"))
    if device == "cuda":
        figures |= {"GPU s a clip": of_gpu, "clips an hour and GPU": 3600 / of_gpu,
                    "peak GB": torch.cuda.max_memory_allocated() / 1e9}
    else:
        figures["clips an hour"] = 3600 / (of_gpu + figures.get("mp4 s", 0.0))
    if mp4 is None:
        figures["mp4"] = "not timed: av is not installed"
    return figures


def run(stages: dict[str, Callable[[list], list]], request: Request, device: str) -> dict[str, float]:
    """Seconds of each stage for this clip."""
    values, taken = [request], {}
    for name, stage in stages.items():
        began = time.perf_counter()
        values = stage(values)
        if device == "cuda":
            torch.cuda.synchronize()
        taken[name] = time.perf_counter() - began
    return taken


def mp4_writer() -> Callable[[list], list] | None:
    """What encodes frames into a file that is thrown away, and decodes it again; None where there is no PyAV."""
    try:
        from actors.clip_writer import check_encoding, write_mp4
    except ImportError:
        return None

    def write(batch: list) -> list:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            write_mp4(path, batch[0], 48_000)
            check_encoding(path, batch[0])
        return batch
    return write


def request_of(card: ModelCard, precision: str, attention: str) -> Request:
    shape, _ = card.shape_for()
    return Request(clip_id=f"{0:064x}", model=card.name, weights_fingerprint="", prompt=PROMPTS[0],
                   negative_prompt=card.negative_prompt, seed=20, shape=shape, fps=card.fps, num_steps=card.num_steps,
                   guidance=card.guidance, precision=precision, attention=attention)


def write_weights(folder: Path, card: ModelCard, device: str) -> None:
    """What torch and transformers begin with, in the first of the model's layouts; bf16, but for the VAE.

    The tokenizer is the demo model's: its pieces are few, so their numbers are rows of any table.
    """
    layout = card.layouts[0]
    torch.manual_seed(0)

    def write(part: str, make: Callable[[], nn.Module], table: keys.KeyTable, dtype: torch.dtype) -> None:
        with torch.device(device):
            model = make()
        state = {name: tensor.flatten(1) if name in table.flat else tensor
                 for name, tensor in checkpoint.released_state(model, table).items()}
        checkpoint.save(folder / part, {name: tensor.to(dtype) if tensor.ndim > 1 else tensor
                                        for name, tensor in state.items()})

    def dit() -> nn.Module:
        made = card.new_dit()
        if card.tuned_for_sparse:                       # has the projection of its linear branch
            turbo.refit(made, "sparse", card.sparsity)
        return made

    for part in layout.dits:
        write(part, dit, card.dit_tables[0], torch.bfloat16)
    write(layout.vae, lambda: WanVAE(card.vae_config), keys.WAN_VAE, torch.float32)
    if isinstance(card, LinumCard):
        fields = T5_XXL | dict(d_model=card.dit_config.text_dim)
        write(f"{layout.text_encoder}/model.safetensors", lambda: encoder("T5", fields), keys.T5, torch.bfloat16)
        (folder / layout.text_encoder / "config.json").write_text(json.dumps(fields))
    else:
        write(layout.text_encoder, lambda: encoder("umT5", card.text_encoder_fields), keys.UMT5_WAN, torch.bfloat16)
    copytree(DEMO.folder / DEMO.tokenizer_folder, folder / layout.tokenizer)


def encoder(family: str, fields: dict[str, Any]) -> nn.Module:
    """In bf16 from the start: in fp32 the largest would not fit beside a copy of itself."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = new_encoder(family, fields)
    finally:
        torch.set_default_dtype(torch.float32)
    del made.encoder.embed_tokens                       # the same tensor as `shared`
    return made
