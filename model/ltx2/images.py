"""What LTX-2 sees of the image that a clip begins with: the latent of its first step."""

import math

import torch.nn.functional as F
from torch import Tensor

from dailies.model.ltx2.card import LtxCard
from dailies.model.ltx2.video_vae import VideoVAE
from dailies.model.shapes import VideoShape


class LtxImages:
    """Images in, normalised latents out; the encoder of the video VAE, on one device."""

    def __init__(self, card: LtxCard, vae: VideoVAE, device: str):
        self.card, self.vae, self.device = card, vae, device

    def fitted(self, whole: Tensor, shape: VideoShape) -> tuple[Tensor, tuple[str, ...]]:
        """As the release: resized (bilinear) until it covers the clip's size, and its middle taken of that.

        whole [3, H, W] in [-1, 1], on the CPU.  Returns the image at the clip's size, and what is to be told of it.
        """
        return covering(whole, shape.height, shape.width), told_of_crop(whole, shape)

    def __call__(self, pixels: Tensor, shape: VideoShape) -> tuple[Tensor, ...]:
        """[C, 1, H, W] at the clip's size; of two stages then [C, H * W] at half of it. fp32 on the CPU."""
        made = [self.latent(pixels)]
        if self.card.two_stages:                        # the first stage's, as a matrix: its size is not the clip's
            made.append(self.latent(covering(pixels, shape.height // 2, shape.width // 2)).flatten(1))
        return tuple(made)

    def latent(self, pixels: Tensor) -> Tensor:
        video = pixels[None, :, None].to(self.device, self.vae.dtype)
        return self.vae.encode(video)[0].float().cpu()


def covering(pixels: Tensor, height: int, width: int) -> Tensor:
    """[3, height, width]: the smallest image in the same aspect that covers it, cut to its middle."""
    scale = max(height / pixels.shape[1], width / pixels.shape[2])
    sides = [math.ceil(side * scale - 1e-6) for side in pixels.shape[1:]]
    large = pixels if sides == list(pixels.shape[1:]) else F.interpolate(
        pixels[None], size=tuple(sides), mode="bilinear", align_corners=False)[0]
    top, left = (sides[0] - height) // 2, (sides[1] - width) // 2
    return large[:, top:top + height, left:left + width].contiguous()


def told_of_crop(whole: Tensor, shape: VideoShape) -> tuple[str, ...]:
    """Nothing where no more was cut off than rounding."""
    high, wide = whole.shape[1:]
    if abs(high * shape.width - wide * shape.height) <= max(shape.width, shape.height):
        return ()
    return f"image {wide}x{high} cropped to the aspect of {shape.width}x{shape.height}",
