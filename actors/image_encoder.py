"""The actor that turns prompts, and the images that clips begin with, into embeddings."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dailies.actors.image_file import decode_image
from dailies.actors.image_parts import ImageError
from dailies.actors.messages import Embedding, FirstFrame, Request
from dailies.actors.recompress import recompressed
from dailies.actors.text_encoder import TextEncoder
from dailies.model.card import ModelCard
from dailies.model.family import family_of
from dailies.model.runtime import Runtime
from dailies.model.shapes import VideoShape


class ImageTextEncoder(TextEncoder):
    """Requests in, Embeddings out, for a model that takes an image: its text encoder, and what it sees of pictures."""

    def __init__(self, card: ModelCard, weights: Path, on: Runtime | None = None, *, read: Callable[[str], bytes],
                 remember: int = 32):
        """read: the file at a FirstFrame's uri.  The rest and what is raised as TextEncoder; remember: images, too."""
        on = on or card.runtime()
        super().__init__(card, weights, on, remember=remember)
        self.card, self.read, self.device = card, read, on.device
        self.pictures = family_of(card).load_image_model(card, weights, on)
        self.recent_images: OrderedDict[tuple[str, VideoShape],
                                        tuple[tuple[Tensor, ...], tuple[str, ...]]] = OrderedDict()

    def embed(self, request: Request) -> Embedding:
        """Raises ImageError for an image that is not there any more, or is another one now."""
        embedding = super().embed(request)
        if request.image is None:
            if not self.card.needs_image:
                return embedding
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
        """What the sampler is told of it, fp32 on the CPU; and what is to be told of how it was fitted."""
        try:
            data = self.read(image.uri)
        except ImageError as error:
            raise ImageError(f"{image.uri}: {error}. It was there when this run was planned; every machine that "
                             "encodes must reach it: keep it on a shared disk, or in a bucket") from error
        if hashlib.sha256(data).hexdigest() != image.sha256:
            raise ImageError(f"{image.uri} has changed since this run was planned: put the old image back, or render "
                             "the new one into another output folder")
        pixels, notes = self.pictures.fitted(decode_image(data), shape)
        if self.card.image_crf is not None:
            pixels = recompressed(pixels, self.card.image_crf)
        with self.lock:
            return self.pictures(pixels, shape), notes

    def release(self) -> None:
        del self.pictures
        self.recent_images.clear()
        super().release()
