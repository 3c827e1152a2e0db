"""The LTX-2 family: Gemma 3, connectors, the transformer of two streams, both VAEs, vocoder, upsampler and LoRA.

All of a release but Gemma is in one file. A part reads its own tensors of it, and its table names those of the others:
what no part knows is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dailies.model import checkpoint, refitted
from dailies.model.family import ModelPart
from dailies.model.files import CheckpointError, listed
from dailies.model.keys import KeyTable
from dailies.model.ltx2 import codec_keys
from dailies.model.ltx2.audio_vae import AudioVAE, load_audio_vae
from dailies.model.ltx2.card import LtxCard
from dailies.model.ltx2.config import LtxConfig
from dailies.model.ltx2.decoder import LtxDecoder
from dailies.model.ltx2.gemma import GEMMA_TABLES
from dailies.model.ltx2.header import read_ltx_header
from dailies.model.ltx2.images import LtxImages
from dailies.model.ltx2.keys import connectors_table, transformer_table
from dailies.model.ltx2.lora import LORA_PREFIX, Lora, read_lora
from dailies.model.ltx2.refine import SecondStage
from dailies.model.ltx2.room import BLOCKS, Placed, placed_on
from dailies.model.ltx2.sampler import LtxSampler, Refiner
from dailies.model.ltx2.text import LtxTextEncoder
from dailies.model.ltx2.transformer import LtxTransformer
from dailies.model.ltx2.upsampler import LatentUpsampler, load_upsampler
from dailies.model.ltx2.video_vae import VideoVAE, load_video_vae
from dailies.model.ltx2.vocoder import ExtendedVocoder, Vocoder, load_vocoder
from dailies.model.memory import machine_memory
from dailies.model.runtime import Runtime
from dailies.model.weights import layout_in

LORA = KeyTable(name="LORA", rules={LORA_PREFIX: ""})
_STATISTICS = tuple(f"vae.per_channel_statistics.{name}" for name in ("mean-of-means", "std-of-means"))


class LtxFamily:
    def parts(self, card: LtxCard) -> tuple[ModelPart, ...]:
        """Its files are read as they are published, so nothing of them is converted: `check` serves no one else."""
        def part(kind: str, load: Callable[[Path, Runtime], object], *tables: object) -> ModelPart:
            def check(path: Path, config: Path | None) -> None:
                load(path.parent, card.runtime("meta", "fp32"))
            return ModelPart(kind=kind, tables=tables, load=load, check=check)      # type: ignore[arg-type]

        halves = ("encoder", "decoder") if card.takes_image else ("decoder",)
        found = [
            part("text_encoder", partial(self.load_encoder, card), *GEMMA_TABLES),
            part("connectors", partial(self.check_connectors, card), connectors_table(audio=card.sound)),
            part("dit", partial(self.load_dit, card), transformer_table(audio=card.sound)),
            part("vae", partial(self.load_vae, card, halves=halves), *codec_keys.video_vae_tables(halves))]
        if card.sound:
            found += [part("audio_vae", partial(self.load_audio_vae, card), *codec_keys.audio_vae_tables(("decoder",))),
                      part("vocoder", partial(self.load_vocoder, card), *codec_keys.vocoder_tables())]
        if card.upsampler:
            found.append(part("upsampler", partial(self.load_upsampler, card), *codec_keys.upsampler_tables()))
        if card.lora:
            found.append(part("lora", partial(self.check_lora, card), LORA))
        return tuple(found)

    def load_encoder(self, card: LtxCard, weights: Path, on: Runtime) -> LtxTextEncoder:
        layout = layout_in(card, weights)
        precision = "bf16" if on.precision == "fp8" else on.precision      # the files' FP8 is the transformer's alone
        return LtxTextEncoder(weights / layout.text_encoder, weights / layout.dits[0], on.device, name=card.name,
                              precision=precision, audio=card.sound, length=card.text_rows,
                              resident=self.placed(card, on).gemma,
                              tokenizer=weights / (layout.tokenizer or layout.text_encoder))

    def load_image_model(self, card: LtxCard, weights: Path, on: Runtime) -> LtxImages:
        return LtxImages(card, self.load_vae(card, weights, on, halves=("encoder",)), on.device)

    def load_sampler(self, card: LtxCard, weights: Path, on: Runtime) -> LtxSampler:
        dit = self.load_dit(card, weights, on)
        return LtxSampler(card, dit, on.device, self.load_refiner(card, weights, on, dit) if card.two_stages else None)

    def load_decoder(self, card: LtxCard, weights: Path, on: Runtime) -> LtxDecoder:
        sound = (self.load_audio_vae(card, weights, on), self.load_vocoder(card, weights, on)) if card.sound else (
            None, None)
        return LtxDecoder(self.load_vae(card, weights, on), *sound, device=on.device)

    def load_dit(self, card: LtxCard, weights: Path, on: Runtime) -> LtxTransformer:
        path = weights / layout_in(card, weights).dits[0]
        refuse_lora(card, weights)
        config = read_ltx_header(path, card.name).transformer()
        config = config if card.sound else replace(config, audio=False)
        check_sizes(card, config, path)
        tables = transformer_table(audio=config.audio),
        return refitted.dit_from(card, lambda: LtxTransformer(config), tables, path, on,
                                 resident=self.placed(card, on).blocks)

    def placed(self, card: LtxCard, on: Runtime) -> Placed:
        """What stays on the device.  Raises CheckpointError where a GPU is too small."""
        if not on.device.startswith("cuda") or not card.memory_gb:
            return Placed()
        return placed_on(card, on.precision, torch.cuda.get_device_properties(on.device).total_memory / 1e9,
                         machine_memory() / 1e9, on.largest)

    def load_refiner(self, card: LtxCard, weights: Path, on: Runtime, dit: LtxTransformer) -> Refiner:
        upsampler = self.load_upsampler(card, weights, on)
        mean, std = (values.float().to(on.device).view(-1, 1, 1, 1) for values in checkpoint.read_tensors(
            weights / layout_in(card, weights).vae, _STATISTICS, name=card.name))

        def enlarged(video: Tensor) -> Tensor:
            return (upsampler((video * std + mean)[None])[0] - mean) / std
        if card.lora is None:
            return Refiner(enlarged=enlarged, refining=nullcontext)
        return Refiner(enlarged=enlarged, refining=SecondStage(dit, self.load_lora(card, weights), on.device))

    def load_upsampler(self, card: LtxCard, weights: Path, on: Runtime) -> LatentUpsampler:
        return load_upsampler(weights / layout_in(card, weights).part_of("upsampler"), name=card.name,
                              device=on.device, precision=on.decode_precision)

    def load_lora(self, card: LtxCard, weights: Path) -> Lora:
        return read_lora(weights / layout_in(card, weights).part_of("lora"), card.lora_strength, card.name)

    def check_lora(self, card: LtxCard, weights: Path, on: Runtime) -> None:
        """That it is one of this transformer.  Raises CheckpointError."""
        self.load_lora(card, weights).check(self.load_dit(card, weights, on))

    def check_connectors(self, card: LtxCard, weights: Path, on: Runtime) -> None:
        """They are loaded with Gemma, whose width they take."""

    def load_vae(self, card: LtxCard, weights: Path, on: Runtime, halves: Sequence[str] = ("decoder",)) -> VideoVAE:
        return load_video_vae(weights / layout_in(card, weights).vae, name=card.name, device=on.device,
                              precision=on.decode_precision, halves=halves)

    def load_audio_vae(self, card: LtxCard, weights: Path, on: Runtime) -> AudioVAE:
        return load_audio_vae(weights / layout_in(card, weights).part_of("audio_vae"), name=card.name,
                              device=on.device, precision=on.decode_precision)

    def load_vocoder(self, card: LtxCard, weights: Path, on: Runtime) -> Vocoder | ExtendedVocoder:
        path = weights / layout_in(card, weights).part_of("vocoder")
        vocoder = load_vocoder(path, name=card.name, device=on.device)
        if vocoder.sample_rate != card.audio_rate:
            raise CheckpointError(f"{card.name}: {path} makes sound of {vocoder.sample_rate:,} samples per second, "
                                  f"where {card.audio_rate:,} are planned. Is it another model's file?")
        return vocoder

    def stored_precision(self, card: LtxCard, weights: Path) -> str | None:
        return refitted.stored_precision(card, weights)

    def fallbacks(self, card: LtxCard, weights: Path | None, on: Runtime) -> Mapping[str, tuple[str, ...]]:
        refuse_fp8(card, on)
        placed = self.placed(card, on)
        if placed.blocks is not None and on.compiled:
            raise CheckpointError(f"{card.name}: --compile takes a GPU with room for all layers of the transformer; "
                                  f"in {on.precision} {placed.blocks} of {BLOCKS} have it here. Leave it out, or "
                                  "choose a precision in which they fit (docs/ltx2.md)")
        return refitted.fallbacks(card, weights, on) | {"room": placed.notes}


def check_sizes(card: LtxCard, config: LtxConfig, path: Path) -> None:
    """Raises CheckpointError where a file makes other streams than the card plans for."""
    sound = card.audio_channels * card.audio_bins
    if config.channels != card.channels or config.audio and config.audio_channels != sound:
        raise CheckpointError(f"{card.name}: {path} makes {config.channels} channels of picture and "
                              f"{config.audio_channels} of sound, where {card.channels} and {sound} are planned. Is it "
                              "another model's file?")
    if card.sound and not config.audio:
        raise CheckpointError(f"{card.name}: {path} has no modules of sound. Give it to a run whose rows say "
                              "audio=false, or fetch the whole file")


def refuse_lora(card: LtxCard, weights: Path) -> None:
    """Raises CheckpointError for the LoRA that distils beside weights that are distilled, and no others that it fits:
    whoever put it there expects that it is used, and twice distilled is nothing that was ever trained.
    """
    loras = sorted(path.name for path in weights.glob("*lora*.safetensors")) if card.distilled else []
    if loras and not any("-dev" in path.name for path in weights.glob("*.safetensors")):
        raise CheckpointError(f"{card.name}: {weights} has {listed(loras)}, which is for the dev weights and makes of "
                              f"them what {card.name} is already; there are none. Move it away, or fetch the dev "
                              "weights and render with the two-stage model that takes it")


def refuse_fp8(card: LtxCard, on: Runtime) -> None:
    """Raises CheckpointError where products in FP8 are asked for that this device does not compute."""
    if on.precision == "fp8" and on.device.startswith("cpu"):
        raise CheckpointError(f"{card.name}: precision fp8 computes in FP8, which takes a GPU (Ada, Hopper or later); "
                              "this is a CPU. Without --precision the file's FP8 layers are widened as they are read")


LTX2 = LtxFamily()
