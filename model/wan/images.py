"""What a Wan model sees of the image that a clip begins with: its latent beside its own, and CLIP's rows."""

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from dailies.model.memory import memory_on
from dailies.model.shapes import VideoShape
from dailies.model.wan.card import WanCard
from dailies.model.wan.image_encoder import ClipVision
from dailies.model.wan.vae import SLAB, WanVAE


class WanImages:
    """Images in, what the sampler is told of them out; a VAE, and CLIP if the model has one, on one device."""

    def __init__(self, card: WanCard, vae: WanVAE, statistics: tuple[Tensor, Tensor], clip: ClipVision | None,
                 device: str):
        """statistics: scale and bias, each [C] fp32: normalised latent = latent * scale + bias."""
        self.card, self.vae, self.clip, self.device = card, vae, clip, device
        self.scale, self.bias = (t.to(device).view(-1, 1, 1, 1) for t in statistics)

    def fitted(self, whole: Tensor, shape: VideoShape) -> tuple[Tensor, tuple[str, ...]]:
        """The part of an image [3, H, W] that is seen, and what is to be told of it."""
        pixels = whole if is_of(self.card, whole, shape) else cropped(whole, shape, self.card.side_step)
        return pixels, () if pixels.shape == whole.shape else (f"image {said(whole)} cropped to {said(pixels)}",)

    def __call__(self, pixels: Tensor, shape: VideoShape) -> tuple[Tensor, ...]:
        """The condition [4 + C, T, H, W] and, with CLIP, its rows [I, D], fp32 on the CPU."""
        made = [self.condition(pixels, shape).cpu()]
        if self.clip is not None:
            made.append(self.clip(pixels[None].to(self.device))[0].float().cpu())
        return tuple(made)

    def condition(self, pixels: Tensor, shape: VideoShape) -> Tensor:
        """[4 + C, T, H, W]: a mask that is 1 at the first latent step, and the latent, normalised, of a video that is
        the image and then mid-grey.  pixels [3, H, W] in [-1, 1], on the CPU: there the releases resize them.
        """
        video = torch.zeros(1, 3, shape.frames, shape.height, shape.width, device=self.device)
        smooth = self.card.smooth_images
        first = F.interpolate(pixels[None], size=(shape.height, shape.width), antialias=smooth,
                              mode="bilinear" if smooth else "bicubic")
        video[:, :, 0] = first.to(self.device)
        _, *grid = self.card.grid.of(shape)
        rows = self.vae.rows_within(memory_on(self.device), self.vae.encoder, *grid)
        # in small slabs: one image a clip, beside a sampler that may hold most of the memory
        latent = self.vae.encode(video.to(self.vae.from_latent.weight.dtype), rows=rows, slab=SLAB)[0][0].float()
        latent = latent * self.scale + self.bias
        mask = latent.new_zeros(self.card.grid.time_stride, *latent.shape[1:])
        mask[:, 0] = 1
        return torch.cat((mask, latent))


def is_of(card: WanCard, pixels: Tensor, shape: VideoShape) -> bool:
    """Whether a named size of the card is this shape for an image of this size, however its sides were rounded."""
    for resolution in card.resolutions:
        with suppress(ValueError):                      # too narrow an image for this name
            if card.size_for_image(resolution, *pixels.shape[1:]) == (shape.height, shape.width):
                return True
    return False


def cropped(pixels: Tensor, shape: VideoShape, step: int) -> Tensor:
    """The middle of the image in the clip's aspect. The whole image if the aspects are as near as sides that were
    rounded down by less than `step` can be: it is then stretched that little, as the release does it.
    """
    height, width = pixels.shape[1:]
    if shape.height * width < height * (shape.width + step) and height * shape.width < (shape.height + step) * width:
        return pixels
    high = max(1, min(height, round(width * shape.height / shape.width)))
    wide = max(1, min(width, round(height * shape.width / shape.height)))
    top, left = (height - high) // 2, (width - wide) // 2
    return pixels[:, top:top + high, left:left + wide]


def said(pixels: Tensor) -> str:
    return f"{pixels.shape[2]}x{pixels.shape[1]}"
