"""The Linum family: T5, one transformer, Wan's VAE."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dailies.model import checkpoint, keys, refitted
from dailies.model.family import ModelPart
from dailies.model.linum.card import LinumCard
from dailies.model.linum.keys import LINUM as LINUM_KEYS
from dailies.model.linum.sampler import LinumSampler
from dailies.model.linum.transformer import LinumDiT
from dailies.model.runtime import Runtime
from dailies.model.text import T5TextEncoder, check_encoder
from dailies.model.wan.decoder import VAE_TABLES, VideoDecoder, check_vae, load_vae
from dailies.model.wan.vae import WanVAE


class LinumFamily:
    tables = (LINUM_KEYS,)

    def parts(self, card: LinumCard) -> tuple[ModelPart, ...]:
        return (
            ModelPart(kind="text_encoder", tables=(keys.T5,),
                      load=lambda weights, on: self.load_encoder(card, weights, on),
                      check=lambda path, config: check_encoder("T5", card.name, path, config, (keys.T5,))),
            ModelPart(kind="dit", tables=self.tables, new=lambda: self.new_dit(card),
                      load=lambda weights, on: self.load_dit(card, weights, on),
                      check=lambda path, config: refitted.check_dit(card, lambda: self.new_dit(card), self.tables,
                                                                    path)),
            ModelPart(kind="vae", tables=VAE_TABLES, load=lambda weights, on: self.load_vae(card, weights, on),
                      check=lambda path, config: check_vae(card, card.vae_config, path)))

    def load_encoder(self, card: LinumCard, weights: Path, on: Runtime) -> T5TextEncoder:
        return T5TextEncoder(weights / card.text_encoder_folder, weights / card.tokenizer_folder, on.device,
                             name=card.name, precision=on.precision, max_tokens=card.dit_config.text_len,
                             width=card.dit_config.text_dim).checked(card.name)

    def load_sampler(self, card: LinumCard, weights: Path, on: Runtime) -> LinumSampler:
        return LinumSampler(card, self.load_dit(card, weights, on), on.device)

    def load_decoder(self, card: LinumCard, weights: Path, on: Runtime) -> VideoDecoder:
        return VideoDecoder(self.load_vae(card, weights, on), self.latent_statistics(card, weights), on.device)

    def stored_precision(self, card: LinumCard, weights: Path) -> str | None:
        return refitted.stored_precision(card, weights)

    def fallbacks(self, card: LinumCard, weights: Path | None, on: Runtime) -> Mapping[str, tuple[str, ...]]:
        return refitted.fallbacks(card, weights, on)

    def new_dit(self, card: LinumCard) -> LinumDiT:
        """A transformer as it is described, with whatever weights torch gives it."""
        return LinumDiT(card.dit_config)

    def load_dit(self, card: LinumCard, weights: Path, on: Runtime) -> LinumDiT:
        return refitted.dit_from(card, lambda: self.new_dit(card), self.tables, weights / card.dit_file, on)

    def load_vae(self, card: LinumCard, weights: Path, on: Runtime) -> WanVAE:
        return load_vae(card, card.vae_config, weights, on.device, on.decode_precision)

    def latent_statistics(self, card: LinumCard, weights: Path) -> tuple[Tensor, Tensor]:
        """scale and bias, each [C] fp32: normalised latent = latent * scale + bias.  Raises CheckpointError."""
        names = "video_data_scale", "video_data_bias"
        scale, bias = checkpoint.read_tensors(weights / card.dit_file, names, name=card.name)
        return scale.float(), bias.float()


LINUM = LinumFamily()
