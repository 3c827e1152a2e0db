"""One clip from prompt to MP4, stage by stage: seconds of each, and what that makes in an hour.

The actors are those of a night, in one process and one after the other, so nothing overlaps. On a GPU the first three
stages are its time, and MP4 the processor's, beside the next clip.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dailies.actors.decoder import Decoder
from dailies.actors.denoiser import Denoiser
from dailies.actors.messages import Request
from dailies.actors.text_encoder import TextEncoder
from dailies.jobs.bench.clip_ltx2 import refuse_without_memory
from dailies.jobs.gpu import models
from dailies.jobs.usage import UsageError, card_named
from dailies.model import refitted
from dailies.model.card import ModelCard
from dailies.model.catalog import DEMO
from dailies.model.linum.card import LinumCard
from dailies.model.linum.load import LinumFamily
from dailies.model.ltx2.card import LtxCard
from dailies.model.runtime import Runtime
from dailies.model.settings import FURTHER
from dailies.model.text import T5TextEncoder, UMT5TextEncoder
from dailies.model.wan.card import WanCard
from dailies.model.wan.load import TURBO, WAN, WanFamily

_CLIPS, LONG_S = 3, 60.0                                # timed, of which the median counts; but one of a slow model
PROMPTS = ("a red square moves left on a white background", "a small blue circle moves up fast",
           "a large green triangle drifts to the right", "a tiny yellow cross falls slowly")
NEGATIVE = "blurry, distorted, low quality"            # in place of a model's own, where its weights are made up
T5_XXL = dict(model_type="t5", vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
              feed_forward_proj="gated-gelu")


@dataclass(frozen=True, kw_only=True)
class Way:
    precision: str
    attention: str
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.precision}, {self.attention} attention{', compiled' * self.compiled}"

    @classmethod
    def read(cls, said: str, card: ModelCard) -> "Way":
        """PRECISION:ATTENTION, or PRECISION:ATTENTION:compiled.  Raises UsageError."""
        precision, attention, *rest = [*said.split(":"), ""][:2] + said.split(":")[2:]
        if precision not in card.precisions or attention not in card.attentions or rest not in ([], ["compiled"]):
            raise UsageError(f"a way to run {card.name} is PRECISION:ATTENTION or PRECISION:ATTENTION:compiled, of "
                             f"{', '.join(card.precisions)} and {', '.join(card.attentions)}; got {said!r}")
        return cls(precision=precision, attention=attention, compiled=bool(rest))


def rows(name: str, *, random_weights: bool, ways: str | None = None, steps: int | None = None,
         frames: int | None = None, size: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """A line for each way to run the model here.  A way that fails costs its line.

    ways: some instead of all, with commas between: int8:sparse,bf16:dense:compiled.  steps, frames, size
    (WIDTHxHEIGHT): of the clip, instead of the model's own.
    Raises UsageError for a model that needs weights or an image, and for a way or a clip that it does not make.
    """
    card, device = card_named(name), "cuda" if torch.cuda.is_available() else "cpu"
    if random_weights and card.family not in RANDOM:
        raise UsageError(f"there are no random weights for {name} here; name its own with dailies render instead")
    if random_weights and card.folder and isinstance(card, LtxCard):    # random ones are of a release's sizes
        raise UsageError(f"{name} comes with weights of its own: leave --random-weights out")
    if card.takes_image and card.needs_image:
        raise UsageError(f"bench clip times models that take text alone; {name} needs an image")
    if card.folder is None and not random_weights:
        raise UsageError(f"the weights of {name} do not come with dailies; say --random-weights: they cost the same")
    asked = request_of(card, steps, frames, size)
    chosen = [Way.read(said, card) for said in ways.split(",")] if ways else all_ways(card, device)
    for way in chosen if device == "cpu" and isinstance(card, LtxCard) else ():
        refuse_without_memory(card, way.precision)
    if random_weights:
        card, asked = with_random_weights(card), replace(asked, negative_prompt=asked.negative_prompt and NEGATIVE)
    bench = Bench(card, device)
    for way in chosen:
        case = f"{name}, {asked.shape}, {asked.num_steps} steps, {way}"
        try:
            yield case, bench.seconds_of_stages(way, asked)
        except Exception as error:
            yield case, {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        bench.forget_sampler()


def all_ways(card: ModelCard, device: str) -> list[Way]:
    """On a CPU what runs by default and INT8; on a GPU more."""
    first = card.attentions[0]
    if device == "cpu":
        return [Way(precision=precision, attention=first) for precision in ("fp32", "int8")
                if precision in card.precisions]
    narrow = "int8" if "int8" in card.precisions else "fp8"
    return [*(Way(precision=precision, attention=attention)
              for precision in ("bf16", narrow) for attention in card.attentions),
            Way(precision=narrow, attention=first, compiled=True)]


class Bench:
    """The stages of one model. Encoder, decoder and MP4 stay for all ways of one precision of theirs."""

    def __init__(self, card: ModelCard, device: str):
        self.card, self.device, self.stages = card, device, {}
        self.exact: bool | None = None                  # whether encoder and decoder are in fp32

    def load(self, way: Way) -> dict[str, Callable[[list], list]]:
        on = self.card.runtime(self.device, way.precision, way.attention, compiled=way.compiled,
                               threads=torch.get_num_threads())
        made = dict(card=self.card, weights=self.card.folder, on=on)
        if self.exact != (exact := way.precision == "fp32"):
            self.stages.clear()
            gc.collect()
            self.exact, self.stages = exact, {"encode": TextEncoder(**made), "decode": Decoder(**made)}
        self.stages["sample"] = Denoiser(**made)
        order = {name: self.stages[name] for name in ("encode", "sample", "decode")}
        return order | ({"mp4": mp4} if (mp4 := mp4_writer(self.card.audio_rate)) is not None else {})

    def forget_sampler(self) -> None:
        self.stages.pop("sample", None)
        gc.collect()                                    # a recorded forward and its model hold each other
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def seconds_of_stages(self, way: Way, asked: Request) -> dict[str, Any]:
        began = time.perf_counter()
        stages = self.load(way)
        loaded_s = time.perf_counter() - began
        asked = replace(asked, precision=way.precision, attention=way.attention)
        _run(stages, replace(asked, num_steps=self.card.min_steps), self.device)    # kernels are compiled and chosen
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken: list[dict[str, float]] = []
        for clip in range(_CLIPS):
            prompt = PROMPTS[(clip + 1) % len(PROMPTS)]     # or the encoder would remember it
            taken.append(_run(stages, replace(asked, prompt=prompt, seed=clip), self.device))
            if sum(taken[0].values()) > LONG_S:
                break
        figures: dict[str, Any] = {f"{stage} s": statistics.median(one[stage] for one in taken) for stage in stages}
        of_gpu = sum(figures[f"{stage} s"] for stage in ("encode", "sample", "decode"))
        if self.device == "cuda":
            figures |= {"GPU s a clip": of_gpu, "clips an hour and GPU": 3600 / of_gpu,
                        "peak GB": torch.cuda.max_memory_allocated() / 1e9}
        else:
            figures["clips an hour"] = 3600 / (of_gpu + figures.get("mp4 s", 0.0))
        figures["load s"] = loaded_s
        return figures | ({} if "mp4" in stages else {"mp4": "not timed: av is not installed"})


def _run(stages: dict[str, Callable[[list], list]], request: Request, device: str) -> dict[str, float]:
    """Seconds of each stage for this clip."""
    values, taken = [request], {}
    for name, stage in stages.items():
        began = time.perf_counter()
        values = stage(values)
        if device == "cuda":
            torch.cuda.synchronize()
        taken[name] = time.perf_counter() - began
    return taken


def mp4_writer(audio_rate: int) -> Callable[[list], list] | None:
    """What encodes frames into a file that is thrown away, and decodes it again; None where there is no PyAV."""
    try:
        from dailies.actors.clip_writer import check_encoding, check_sound, with_whole_sound, write_mp4
    except ImportError:
        return None

    def write(batch: list) -> list:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            frames, _ = with_whole_sound(batch[0], audio_rate)
            write_mp4(path, frames, audio_rate)
            check_encoding(path, frames)
            check_sound(path, frames)
        return batch
    return write


def request_of(card: ModelCard, steps: int | None, frames: int | None, size: str | None) -> Request:
    """Raises UsageError for a clip that the model does not make."""
    try:
        shape, _ = card.shape_for(size, frames=frames)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if steps is not None and not card.min_steps <= steps <= card.max_steps:
        raise UsageError(f"{card.name} makes a clip in {card.min_steps} to {card.max_steps} steps; got {steps}")
    return Request(clip_id=f"{0:064x}", model=card.name, weights_fingerprint="", prompt=PROMPTS[0],
                   negative_prompt=card.negative_prompt, seed=20, shape=shape, fps=card.fps,
                   num_steps=steps or card.num_steps, guidance=card.guidance, precision="", attention="",
                   settings={setting.name: own for setting in FURTHER
                             if (own := setting.own_value(card)) is not None})


def with_random_weights(card: ModelCard) -> ModelCard:
    """The card of a model whose parts are made up where they run, instead of loaded."""
    return replace(card, family=RANDOM[card.family])


class RandomParts:
    """What a family loads, of random weights: before the family's own class. Folders are not looked at."""

    def load_dit(self, card: LinumCard | WanCard, weights: Path | None, on: Runtime,
                 expert: int = 0) -> torch.nn.Module:
        return models.new_dit(card, on.device, on.precision, on.attention)      # experts of equal weights cost the same

    def load_vae(self, card: LinumCard | WanCard, weights: Path | None, on: Runtime) -> torch.nn.Module:
        return models.new_vae(card, on.device, on.decode_precision)

    def fallbacks(self, card: ModelCard, weights: Path | None, on: Runtime) -> dict[str, tuple[str, ...]]:
        return refitted.fallbacks(card, None, on)

    def latent_statistics(self, card: LinumCard | WanCard, weights: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
        channels = card.vae_config.latent_channels
        return torch.ones(channels), torch.zeros(channels)


class RandomLinum(RandomParts, LinumFamily):
    def load_encoder(self, card: LinumCard, weights: Path | None, on: Runtime) -> T5TextEncoder:
        return encoder_of(RandomT5, T5_XXL | dict(d_model=card.dit_config.text_dim), card, on)


class RandomWan(RandomParts, WanFamily):
    def load_encoder(self, card: WanCard, weights: Path | None, on: Runtime) -> UMT5TextEncoder:
        return encoder_of(RandomUMT5, card.text_encoder_fields, card, on)


def encoder_of(kind: type[T5TextEncoder], fields: Mapping[str, Any], card: LinumCard | WanCard,
               on: Runtime) -> T5TextEncoder:
    """Its tokenizer is the demo model's, whose pieces are few: their numbers are rows of any table."""
    return kind(Path(), DEMO.folder / DEMO.tokenizer_folder, on.device, name=card.name, precision=on.precision,
                max_tokens=card.dit_config.text_len, width=card.dit_config.text_dim, config=fields)


class RandomEncoder:
    def load(self, encoder: Path, name: str, dtype: torch.dtype) -> None:
        models.fill_weights(self.model.to(dtype), self.device)


class RandomT5(RandomEncoder, T5TextEncoder):
    """T5 with random weights."""


class RandomUMT5(RandomEncoder, UMT5TextEncoder):
    """umT5 with random weights."""


RANDOM_LINUM, RANDOM_WAN, RANDOM_TURBO = RandomLinum(), RandomWan(*WAN.tables), RandomWan(*TURBO.tables)
RANDOM = {f"dailies.model.{family}": f"{__name__}:RANDOM_{name}" for family, name in (
    ("linum.load:LINUM", "LINUM"), ("wan.load:WAN", "WAN"), ("wan.load:TURBO", "TURBO"))}
RANDOM["dailies.model.ltx2.load:LTX2"] = "dailies.jobs.bench.clip_ltx2:RANDOM_LTX2"
