"""The Wan family: umT5, one or two transformers, its VAE, CLIP where it attends to an image."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dailies.model import checkpoint, keys, refitted
from dailies.model.family import ModelPart
from dailies.model.keys import KeyTable
from dailies.model.runtime import Runtime
from dailies.model.text import UMT5TextEncoder, check_encoder
from dailies.model.wan.card import WanCard
from dailies.model.wan.decoder import VAE_TABLES, VideoDecoder, check_vae, load_vae
from dailies.model.wan.image_encoder import ClipVision, from_open_clip
from dailies.model.wan.images import WanImages
from dailies.model.wan.keys import CLIP_ORIGINAL, CLIP_VISION, TURBO_WAN, TURBO_WAN_WRAPPED, WAN_DIFFUSERS
from dailies.model.wan.keys import WAN as WAN_KEYS
from dailies.model.wan.sampler import Experts, WanSampler
from dailies.model.wan.transformer import WanDiT
from dailies.model.wan.vae import WanVAE
from dailies.model.weights import layout_in, stored_at

TEXT_TABLES = (keys.UMT5, keys.UMT5_WAN)


class WanFamily:
    def __init__(self, *tables: KeyTable):
        """tables: of the transformers as they are published."""
        self.tables = tables

    def parts(self, card: WanCard) -> tuple[ModelPart, ...]:
        def check_clip(path: Path, config: Path | None) -> None:
            checkpoint.build(lambda: ClipVision(card.clip_config), path, CLIP_VISION, name=card.name, device="meta",
                             precision="fp32")

        def check_dit(path: Path, config: Path | None) -> None:
            refitted.check_dit(card, lambda: self.new_dit(card), self.tables, path)

        clip = ModelPart(kind="image_encoder", tables=(CLIP_VISION, CLIP_ORIGINAL), check=check_clip,
                         rewritten=partial(split_clip, card),
                         load=lambda weights, on: self.load_image_encoder(card, weights, on))
        return (
            ModelPart(kind="text_encoder", tables=TEXT_TABLES,
                      load=lambda weights, on: self.load_encoder(card, weights, on),
                      check=lambda path, config: check_encoder("umT5", card.name, path,
                                                               config or card.text_encoder_fields, TEXT_TABLES)),
            *(ModelPart(kind="dit", place=expert, tables=self.tables, new=lambda: self.new_dit(card), check=check_dit,
                        load=partial(self.load_dit, card, expert=expert)) for expert in range(card.num_experts)),
            ModelPart(kind="vae", tables=VAE_TABLES, load=lambda weights, on: self.load_vae(card, weights, on),
                      check=lambda path, config: check_vae(card, card.vae_config, path)),
            *((clip,) if card.clip_fields is not None else ()))

    def load_encoder(self, card: WanCard, weights: Path, on: Runtime) -> UMT5TextEncoder:
        layout = layout_in(card, weights)
        encoder = stored_at(weights, layout.text_encoder)
        return UMT5TextEncoder(encoder, weights / (layout.tokenizer or ""), on.device, name=card.name,
                               precision=on.precision, max_tokens=card.dit_config.text_len,
                               width=card.dit_config.text_dim,
                               config=None if encoder.is_dir() else card.text_encoder_fields).checked(card.name)

    def load_sampler(self, card: WanCard, weights: Path, on: Runtime) -> WanSampler:
        return WanSampler(card, Experts.load(card, on.device, lambda expert: self.load_dit(card, weights, on, expert)))

    def load_decoder(self, card: WanCard, weights: Path, on: Runtime) -> VideoDecoder:
        return VideoDecoder(self.load_vae(card, weights, on), self.latent_statistics(card, weights), on.device)

    def load_image_model(self, card: WanCard, weights: Path, on: Runtime) -> WanImages:
        vae = self.load_vae(card, weights, replace(on, decode_precision=card.vae_precision(on.precision)))
        clip = None if card.clip_fields is None else self.load_image_encoder(card, weights, on)
        return WanImages(card, vae, self.latent_statistics(card, weights), clip, on.device)

    def stored_precision(self, card: WanCard, weights: Path) -> str | None:
        return refitted.stored_precision(card, weights)

    def fallbacks(self, card: WanCard, weights: Path | None, on: Runtime) -> Mapping[str, tuple[str, ...]]:
        return refitted.fallbacks(card, weights, on)

    def new_dit(self, card: WanCard) -> WanDiT:
        """A transformer as it is described, with whatever weights torch gives it."""
        return WanDiT(card.dit_config)

    def load_dit(self, card: WanCard, weights: Path, on: Runtime, expert: int = 0) -> WanDiT:
        """expert: 0 is the only one or that for high noise."""
        path = stored_at(weights, layout_in(card, weights).dits[expert])
        return refitted.dit_from(card, lambda: self.new_dit(card), self.tables, path, on)

    def load_vae(self, card: WanCard, weights: Path, on: Runtime) -> WanVAE:
        return load_vae(card, card.vae_config, weights, on.device, on.decode_precision)

    def load_image_encoder(self, card: WanCard, weights: Path, on: Runtime) -> ClipVision:
        """CLIP's picture tower, for the models that attend to it."""
        path = stored_at(weights, layout_in(card, weights).image_encoder or "")
        return checkpoint.build(lambda: ClipVision(card.clip_config), path, CLIP_VISION, name=card.name,
                                device=on.device, precision=on.precision)

    def latent_statistics(self, card: WanCard, weights: Path | None) -> tuple[Tensor, Tensor]:
        """scale and bias, each [C] fp32: normalised latent = latent * scale + bias; constants of the family."""
        std = torch.tensor(card.latent_std, dtype=torch.float64)
        return (1 / std).float(), (-torch.tensor(card.latent_mean, dtype=torch.float64) / std).float()


def split_clip(card: WanCard, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """CLIP's picture tower as transformers names it; a file that has those names already stays as it is.

    path: the file, for messages.  Raises CheckpointError.
    """
    if not CLIP_VISION.unknown(tensors):
        return dict(tensors)
    try:
        ours = from_open_clip(tensors, card.clip_config.blocks)
    except KeyError as error:
        raise checkpoint.CheckpointError(f"{path} is not {card.name}'s image encoder: {error.args[0]} is missing"
                                         ) from error
    return {released: tensor for name, tensor in ours.items() if (released := CLIP_VISION.released(name))}


WAN = WanFamily(WAN_KEYS, WAN_DIFFUSERS)
TURBO = WanFamily(TURBO_WAN, TURBO_WAN_WRAPPED)         # TurboDiffusion's, published by other names
