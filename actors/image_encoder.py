"""The actor that turns prompts, and the images that clips begin with, into embeddings."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dailies.actors.image_file import decode_image
from dailies.actors.image_parts import ImageError
from dailies.actors.messages import Embedding, FirstFrame, Request
from dailies.actors.text_encoder import TextEncoder
from dailies.model.memory import memory_on
from dailies.model.runtime import Runtime
from dailies.model.shapes import VideoShape
from dailies.model.wan.card import WanCard
from dailies.model.wan.load import WAN
from dailies.model.wan.vae import SLAB


class ImageTextEncoder(TextEncoder):
    """Requests in, Embeddings out, for a Wan model that takes an image: text encoder, VAE and CLIP if it has one."""

    def __init__(self, card: WanCard, weights: Path, on: Runtime | None = None, *, read: Callable[[str], bytes],
                 remember: int = 32):
        """read: the file at a FirstFrame's uri.  The rest and what is raised as TextEncoder; remember: images, too."""
        on = on or card.runtime()
        super().__init__(card, weights, on, remember=remember)
        self.card, self.read, self.device = card, read, on.device
        self.vae = WAN.load_vae(card, weights, replace(on, decode_precision=card.vae_precision(on.precision)))
        self.scale, self.bias = (t.to(on.device).view(-1, 1, 1, 1) for t in WAN.latent_statistics(card, weights))
        self.clip = None if card.clip_fields is None else WAN.load_image_encoder(card, weights, on)
        self.recent_images: OrderedDict[tuple[str, VideoShape],
                                        tuple[tuple[Tensor, ...], tuple[str, ...]]] = OrderedDict()

    def embed(self, request: Request) -> Embedding:
        """Raises ImageError for an image that is not there any more, or is another one now."""
        embedding = super().embed(request)
        if request.image is None:
            raise ValueError(f"{self.card.name} makes video from an image; clip {request.clip_id} comes without one")
        key = request.image.sha256, request.shape
        image, notes = self.recent_images.get(key) or self.encode_image(request.image, request.shape)
        with self.lock:
            self.recent_images[key] = image, notes
            self.recent_images.move_to_end(key)
            if len(self.recent_images) > self.remember:
                self.recent_images.popitem(last=False)
        return replace(embedding, image=image, fallbacks=embedding.fallbacks + notes)

    @torch.inference_mode()
    def encode_image(self, image: FirstFrame, shape: VideoShape) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
        """The condition [4 + C, T, H, W] and, with CLIP, its rows [I, D], fp32 on the CPU; and what is to be told."""
        try:
            data = self.read(image.uri)
        except ImageError as error:
            raise ImageError(f"{image.uri}: {error}. It was there when this run was planned; every machine that "
                             "encodes must reach it: keep it on a shared disk, or in a bucket") from error
        if hashlib.sha256(data).hexdigest() != image.sha256:
            raise ImageError(f"{image.uri} has changed since this run was planned: put the old image back, or render "
                             "the new one into another output folder")
        whole = decode_image(data)
        pixels = whole if is_of(self.card, whole, shape) else cropped(whole, shape, self.card.side_step)
        with self.lock:
            made = [self.condition(pixels, shape).cpu()]
            if self.clip is not None:
                made.append(self.clip(pixels[None].to(self.device))[0].float().cpu())
        return tuple(made), () if pixels.shape == whole.shape else (f"image {said(whole)} cropped to {said(pixels)}",)

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

    def release(self) -> None:
        del self.vae, self.clip
        self.recent_images.clear()
        super().release()


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
