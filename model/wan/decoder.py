"""Latents to pixels by Wan's VAE, in pieces that fit the memory; other families decode with it too."""

from pathlib import Path

import torch
from torch import Tensor

from dailies.model import checkpoint
from dailies.model.card import ModelCard
from dailies.model.convolution import channels_last
from dailies.model.family import Decoded, NonFiniteFrames
from dailies.model.samplers import Streams
from dailies.model.shapes import VideoShape
from dailies.model.wan import keys
from dailies.model.wan.config import WanVAEConfig
from dailies.model.wan.vae import SLAB, WanVAE
from dailies.model.weights import layout_in, stored_at

VAE_TABLES = (keys.WAN_VAE, keys.WAN_VAE_DIFFUSERS)


class VideoDecoder:
    """The video of a clip; one VAE on one device."""

    def __init__(self, vae: WanVAE, statistics: tuple[Tensor, Tensor], device: str):
        """statistics: scale and bias, each [C] fp32: normalised latent = latent * scale + bias."""
        self.vae, self.device = vae, device
        self.scale, self.bias = (t.to(device).view(-1, 1, 1, 1) for t in statistics)
        self.copies = torch.cuda.Stream(device) if device.startswith("cuda") else None

    def __call__(self, streams: Streams, shape: VideoShape, memory: int) -> Decoded:
        """A clip too large for the memory is decoded in bands of rows, which meet exactly.

        Raises NonFiniteFrames, and OutOfMemoryError where a GPU has no memory for the smallest pieces.
        """
        video = (streams["video"].to(self.device) - self.bias) / self.scale     # fp32, before the VAE rounds it
        video = video[None].to(self.vae.from_latent.weight.dtype)
        part, (steps, height, width) = self.vae.decoder, video.shape[2:]
        rows = self.vae.rows_within(memory, part, steps, height, width)
        slab = self.vae.slab_within(memory, part, steps, height, width, rows)
        notes: tuple[str, ...] = ()
        while (rgb := self.pixels(video, shape, rows, slab)) is None:
            rows, slab = -(-rows // 2), max(SLAB, slab // 4)
            notes = (f"decoded {rows * self.vae.config.space_stride} rows at a time: the GPU had no memory for more",)
        return Decoded(rgb=rgb, notes=notes)

    def pixels(self, video: Tensor, shape: VideoShape, rows: int, slab: int) -> Tensor | None:
        """uint8 [frames, height, width, 3] on the CPU, filled piece by piece; None where the GPU's memory ran out.

        On a GPU a piece is copied while the next one is decoded.
        """
        size = (shape.frames, shape.height, shape.width, 3)
        rgb = torch.empty(size, dtype=torch.uint8, pin_memory=self.copies is not None)
        finite = torch.ones(shape.frames, dtype=torch.bool, device=self.device)     # looked at last: looking waits
        try:
            for at, top, piece in self.vae.decode_pieces(video, rows=rows, slab=slab):
                finite[at:at + piece.shape[2]] &= piece.isfinite().all(dim=4).all(dim=3).all(dim=1)[0]
                pixels = to_uint8(piece[0]).permute(1, 2, 3, 0).contiguous()
                self.copy(pixels, rgb[at:at + len(pixels), top:top + pixels.shape[1]])
                del piece, pixels                       # before the next is made
        except torch.OutOfMemoryError:
            if rows == 1 and slab <= SLAB:
                raise
            return None
        finally:
            if self.copies is not None:
                self.copies.synchronize()
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            raise NonFiniteFrames(f"decoding gave NaN or infinity in frames {bad[0]} to {bad[-1]}; try precision fp32")
        return rgb

    def copy(self, pixels: Tensor, place: Tensor) -> None:
        if self.copies is None:
            place.copy_(pixels)
            return
        self.copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copies):
            if place.is_contiguous():
                place.copy_(pixels, non_blocking=True)
            else:
                for picture, rows in zip(pixels, place, strict=True):   # of a band only one frame's rows lie together
                    rows.copy_(picture, non_blocking=True)
        pixels.record_stream(self.copies)


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] to 0..255, the rest cut off; truncated, not rounded, as the release writes its clips: 0 becomes 127."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).to(torch.uint8)


def load_vae(card: ModelCard, config: WanVAEConfig, weights: Path, device: str, precision: str) -> WanVAE:
    """In eval mode; either published key layout.  precision: fp32 or bf16.  Raises CheckpointError."""
    path = stored_at(weights, layout_in(card, weights).vae)
    return channels_last(checkpoint.build(lambda: WanVAE(config), path, *VAE_TABLES, name=card.name, device=device,
                                          precision=precision))


def check_vae(card: ModelCard, config: WanVAEConfig, path: Path) -> None:
    """That the VAE can be loaded from this file.  Raises CheckpointError."""
    checkpoint.build(lambda: WanVAE(config), path, *VAE_TABLES, name=card.name, device="meta", precision="fp32")
