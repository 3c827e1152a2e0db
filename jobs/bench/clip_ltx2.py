"""LTX-2 with random weights, made where they run, at the sizes of its releases: for `dailies bench clip`."""

import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from dailies.jobs.gpu import models
from dailies.jobs.usage import UsageError
from dailies.kernels import processor
from dailies.model import turbo
from dailies.model.convolution import channels_last
from dailies.model.eight_bits import Fp8Linear, NarrowLinear, fp8_of
from dailies.model.files import CheckpointError
from dailies.model.layers import Linear, compute_in
from dailies.model.ltx2.audio_vae import AudioVAE
from dailies.model.ltx2.card import LtxCard
from dailies.model.ltx2.codec_config import (
    VIDEO_VAE_2_0,
    VIDEO_VAE_2_3,
    VOCODER_2_0,
    VOCODER_2_3,
    AudioVAEConfig,
    UpsamplerConfig,
    VideoVAEConfig,
    VocoderConfig,
)
from dailies.model.ltx2.config import ConnectorsConfig, LtxConfig
from dailies.model.ltx2.connectors import TextConnectors
from dailies.model.ltx2.gemma import Gemma3, GemmaConfig, gemma_config
from dailies.model.ltx2.load import LtxFamily
from dailies.model.ltx2.lora import Lora
from dailies.model.ltx2.refine import SecondStage
from dailies.model.ltx2.room import encoder_part, sampler_part
from dailies.model.ltx2.sampler import Refiner
from dailies.model.ltx2.text import LtxTextEncoder
from dailies.model.ltx2.transformer import LtxTransformer
from dailies.model.ltx2.upsampler import LatentUpsampler
from dailies.model.ltx2.video_vae import VideoVAE, only
from dailies.model.ltx2.vocoder import ExtendedVocoder, Vocoder, make_vocoder
from dailies.model.memory import free_memory
from dailies.model.runtime import Runtime

LORA_RANK = 384                                         # of the published ones
GEMMA_12B = gemma_config(dict(
    model_type="gemma3_text", hidden_size=3840, intermediate_size=15360, num_attention_heads=16, num_hidden_layers=48,
    num_key_value_heads=8, rope_scaling=dict(factor=8.0, rope_type="linear"), sliding_window=1024), "Gemma 3 12B")
AnyPart = TypeVar("AnyPart", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class LtxSizes:
    """Of the parts of a release."""

    dit: LtxConfig
    connectors: ConnectorsConfig
    vae: VideoVAEConfig
    vocoder: VocoderConfig
    gemma: GemmaConfig = GEMMA_12B
    audio_vae: AudioVAEConfig = AudioVAEConfig()
    upsampler: UpsamplerConfig = UpsamplerConfig()


SIZES_OF_2_0 = LtxSizes(dit=LtxConfig(), connectors=ConnectorsConfig(), vae=VIDEO_VAE_2_0, vocoder=VOCODER_2_0)
SIZES_OF_2_3 = LtxSizes(dit=LtxConfig(gated=True, modulated_text=True, caption_width=None),
                        connectors=ConnectorsConfig(layers=8, heads=32, width=4096, audio_heads=32, audio_width=2048,
                                                    per_token=True, gated=True),
                        vae=VIDEO_VAE_2_3, vocoder=VOCODER_2_3)


def sizes_of(card: LtxCard) -> LtxSizes:
    return SIZES_OF_2_3 if card.audio_rate == VOCODER_2_3.sample_rate else SIZES_OF_2_0


def refuse_without_memory(card: LtxCard, precision: str) -> None:
    """Raises UsageError where a CPU's machine has no memory for it: the system would end other programs too."""
    if not card.memory_gb:
        return
    wide = precision == "bf16" and processor.dtype_of("bf16", "cpu") == torch.float32
    kept = "fp32" if wide else precision                # where a CPU has no such products
    needs, has = sum(part(card, kept).whole for part in (sampler_part, encoder_part)), free_memory() / 1e9
    if needs > has:
        raise UsageError(f"{card.name} in {precision} takes about {needs:.0f} GB, with its text encoder, and {has:.0f} "
                         "are free on this machine, which has no GPU. Time it on one with a GPU; on a CPU two of its "
                         "blocks are timed by: dailies bench model ltx-2-19b --random-weights")


class Words:
    """In place of a tokenizer: a number for each word, as many as Gemma has pieces of plain English, about."""

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def ids(self, text: str, at_most: int | None = None) -> list[int]:
        return [2, *(zlib.crc32(word.encode()) % self.vocabulary for word in text.split())][:at_most]


class RandomLtxEncoder(LtxTextEncoder):
    """Gemma and connectors with random weights."""

    def __init__(self, card: LtxCard, on: Runtime, sizes: LtxSizes):
        precision = "bf16" if on.precision == "fp8" else on.precision
        self.device, self.max_tokens, self.tokenizer = on.device, card.text_rows, Words(sizes.gemma.vocabulary)
        self.connectors = made(lambda: TextConnectors(sizes.connectors, audio=card.sound), on.device, precision)
        with torch.device("meta"):
            gemma = Gemma3(sizes.gemma)
            gemma.embed_tokens.to(processor.dtype_of(precision, on.device))
        models.fill_weights(gemma.embed_tokens, "cpu")  # where it stays
        self.gemma = given_weights(gemma, on.device, precision)
        for place, layer in [*self.gemma.named_modules()] if precision == "int8" else ():
            if isinstance(layer, Linear):
                self.gemma.set_submodule(place, NarrowLinear(layer))


class RandomLtx(LtxFamily):
    """The family, whose parts are made up. Folders are not looked at."""

    def load_encoder(self, card: LtxCard, weights: Path | None, on: Runtime) -> RandomLtxEncoder:
        return RandomLtxEncoder(card, on, sizes_of(card))

    def load_dit(self, card: LtxCard, weights: Path | None, on: Runtime) -> LtxTransformer:
        if self.placed(card, on).blocks is not None:
            raise CheckpointError(f"{card.name} in {on.precision} does not fit on this GPU as a whole, and with random "
                                  "weights it is timed in no other way. Choose another precision with --ways")
        with torch.device("meta"):
            dit = LtxTransformer(sizes_of(card).dit)
            turbo.refit(dit, on.attention, card.sparsity, packed=turbo.runs_packed(on.precision, on.device))
        given_weights(dit, on.device, on.precision)
        for place, layer in turbo.linears_of_blocks(dit) if on.precision in ("int8", "fp8") else ():
            dit.set_submodule(place, narrow(place, layer, on.precision))
        return dit

    def load_vae(self, card: LtxCard, weights: Path | None, on: Runtime,
                 halves: Sequence[str] = ("decoder",)) -> VideoVAE:
        return with_statistics(made(lambda: VideoVAE(only(sizes_of(card).vae, halves)), on.device, on.decode_precision))

    def load_audio_vae(self, card: LtxCard, weights: Path | None, on: Runtime) -> AudioVAE:
        return with_statistics(made(lambda: AudioVAE(sizes_of(card).audio_vae, ("decoder",)), on.device,
                                    on.decode_precision))

    def load_vocoder(self, card: LtxCard, weights: Path | None, on: Runtime) -> Vocoder | ExtendedVocoder:
        return made(lambda: make_vocoder(sizes_of(card).vocoder), on.device, "fp32")

    def load_refiner(self, card: LtxCard, weights: Path | None, on: Runtime, dit: LtxTransformer) -> Refiner:
        upsampler = channels_last(made(lambda: LatentUpsampler(sizes_of(card).upsampler), on.device,
                                       on.decode_precision))

        def enlarged(video: Tensor) -> Tensor:
            return upsampler(video[None])[0]
        if card.lora is None:
            return Refiner(enlarged=enlarged, refining=nullcontext)
        return Refiner(enlarged=enlarged, refining=SecondStage(dit, empty_lora(dit), on.device))


def made(describe: Callable[[], AnyPart], device: str, precision: str) -> AnyPart:
    with torch.device("meta"):
        model = describe()
    return given_weights(model, device, precision)


def given_weights(model: AnyPart, device: str, precision: str) -> AnyPart:
    """In the dtypes that it computes in from the beginning: 19 billion numbers in fp32 are more than most GPUs hold."""
    compute_in(model.eval().requires_grad_(False), processor.dtype_of(precision, device))
    models.fill_weights(model, device)
    return model


def narrow(place: str, layer: Linear, precision: str) -> nn.Module:
    if precision == "int8":
        return turbo.settled(place, turbo.Int8Linear.of(layer))
    with torch.device("meta"):
        eight = Fp8Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, input_scale=False)
    eight.weight, eight.weight_scale = fp8_of(layer.weight)
    eight.bias = layer.bias
    return eight


def with_statistics(vae: AnyPart) -> AnyPart:
    """Of no spread at all a latent would be one number."""
    for name, values in vae.named_buffers():
        if name.endswith("std-of-means"):
            values.fill_(1.0)
    return channels_last(vae)


def empty_lora(dit: LtxTransformer) -> Lora:
    """Of zeros, which are added as any others."""
    return Lora(where="random weights", pairs={
        place: (torch.zeros(LORA_RANK, layer.in_features, dtype=torch.bfloat16),
                torch.zeros(layer.out_features, LORA_RANK, dtype=torch.bfloat16))
        for place, layer in turbo.linears_of_blocks(dit)})


RANDOM_LTX2 = RandomLtx()
