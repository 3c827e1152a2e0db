"""Models of any size with random weights, made where they run: no file, and no 28 GB through a CPU.

The numbers depend on a weight's name and the device alone, so a model has the same in every precision and attention.
"""

import math
import zlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dailies.kernels import processor
from dailies.model import turbo
from dailies.model.card import ModelCard
from dailies.model.convolution import channels_last
from dailies.model.family import family_of
from dailies.model.layers import compute_in
from dailies.model.linum.card import LinumCard
from dailies.model.shapes import VideoShape
from dailies.model.wan.card import WanCard
from dailies.model.wan.transformer import WanDiT
from dailies.model.wan.vae import WanVAE


def new_dit(card: ModelCard, device: str, precision: str, attention: str) -> nn.Module:
    """A transformer as `turbo.build` makes it of a file; INT8 layers are quantised in rows."""
    with torch.device("meta"):
        new = next(part.new for part in family_of(card).parts(card) if part.new)
        dit = new().eval().requires_grad_(False)
    fill_weights(dit, device)
    with torch.device("meta"):
        if precision != "fp32" or attention != "dense" or card.sparsity.tuned:
            turbo.refit(dit, attention, card.sparsity, packed=turbo.runs_packed(precision, device))
    fill_weights(dit.requires_grad_(False), device)             # the projection of tuned weights
    compute_in(dit, processor.dtype_of(precision, device))
    for place, layer in turbo.linears_of_blocks(dit) if precision == "int8" else ():
        dit.set_submodule(place, turbo.settled(place, turbo.Int8Linear.of(layer)))
    return dit.eval()


def new_vae(card: ModelCard, device: str, precision: str) -> WanVAE:
    with torch.device("meta"):
        vae = WanVAE(card.vae_config).eval().requires_grad_(False)
    fill_weights(vae, device)
    return channels_last(compute_in(vae, processor.dtype_of(precision, device)))


def made_up_encoder(card: WanCard, device: str) -> nn.Module:
    """umT5 in bf16, which takes ids."""
    from dailies.model.text import new_encoder as new
    with torch.device("meta"):
        encoder = new("umT5", dict(card.text_encoder_fields)).to(torch.bfloat16)
    encoder = encoder.to_empty(device=device).requires_grad_(False)
    for parameter in encoder.parameters():
        parameter.normal_(0, 0.02)
    return encoder


def fill_weights(model: nn.Module, device: str) -> None:
    """Give every tensor that has no memory yet some: normals that keep the size of what passes, gains 1, biases 0."""
    for place, module in list(model.named_modules()):
        for kind in (module._parameters, module._buffers):
            for leaf, tensor in kind.items():
                if tensor is not None and tensor.is_meta:
                    made = filled(f"{place}.{leaf}", tensor, device)
                    kind[leaf] = made if kind is module._buffers else nn.Parameter(made, requires_grad=False)


def filled(name: str, like: Tensor, device: str) -> Tensor:
    made = torch.empty(like.shape, dtype=like.dtype, device=device)
    if like.ndim < 2:
        return made.fill_(1.0 if name.endswith("weight") else 0.0)
    if name.endswith("gamma"):                          # of a channel norm: [C, 1, 1, 1]
        return made.fill_(1.0)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    spread = 0.02 if "modulation" in name else math.prod(like.shape[1:]) ** -0.5
    return made.normal_(0.0, spread, generator=generator)


def with_layers(card: ModelCard, layers: int) -> ModelCard:
    return replace(card, dit_fields={**card.dit_fields, "layers": layers})


def inputs(card: LinumCard | WanCard, dit: nn.Module, shape: VideoShape, device: str) -> tuple[Any, ...]:
    """What a forward takes: latent, timestep, and a text of 40 rows as the model keeps it."""
    generator = torch.Generator(device).manual_seed(1)
    grid = card.grid.of(shape)
    text = torch.randn(40, card.dit_config.text_dim, generator=generator, device=device).bfloat16()
    context = dit.embed([text]) if isinstance(dit, WanDiT) else dit.embed_text([text])
    latent = torch.randn(1, card.dit_config.latent_channels, *grid[1:], generator=generator, device=device)
    return latent, torch.tensor([500.0], device=device), context
