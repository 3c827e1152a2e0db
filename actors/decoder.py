"""The actor that turns latents into frames."""

from pathlib import Path

import torch
from torch import Tensor

from dailies.actors.determinism import class_on
from dailies.actors.device_lock import NO_LOCK
from dailies.actors.memory import room_on
from dailies.actors.messages import Frames, Latent
from dailies.model.catalog import ModelCard
from dailies.model.shapes import VideoShape
from dailies.model.wan.vae import SLAB

SAFE_SHARE = 4              # a clip that has failed twice is decoded in a quarter of the memory that is free


class NonFiniteFrames(ArithmeticError):
    """Decoding gave NaN or infinity."""


class Decoder:
    """Latents in, Frames out; one VAE on one device. Making it loads; calling it only computes."""

    lock = NO_LOCK                                      # the worker's

    def __init__(self, card: ModelCard, weights: Path, device: str = "cpu", *, precision: str | None = None,
                 decode_precision: str | None = None, threads: int = 1):
        """precision: of the model; decode_precision: of the VAE, None for what the model's card gives it.
        threads: torch's, for the whole process; fixed, since the last bits of a result may depend on it.

        Raises CheckpointError.
        """
        torch.set_num_threads(threads)
        self.card, self.device, self.safe = card, device, False
        self.determinism = class_on(device, threads=threads)
        self.fallbacks = card.decode_fallbacks(device, precision, decode_precision)
        self.vae = card.vae(weights, device, precision, decode_precision)
        self.scale, self.bias = (t.to(device).view(-1, 1, 1, 1) for t in card.latent_statistics(weights))
        self.copies = torch.cuda.Stream(device) if device.startswith("cuda") else None

    @torch.inference_mode()
    def __call__(self, batch: list[Latent]) -> list[Frames]:
        """Raises NonFiniteFrames, and OutOfMemoryError where a GPU has no memory for the smallest pieces."""
        with self.lock:
            return [self.decode(latent) for latent in batch]

    def decode(self, latent: Latent) -> Frames:
        """A clip too large for the memory is decoded in bands of rows, which meet exactly."""
        video = (latent.streams["video"].to(self.device) - self.bias) / self.scale      # fp32, before the VAE rounds it
        video = video[None].to(self.vae.from_latent.weight.dtype)
        room = room_on(self.device) // (SAFE_SHARE if self.safe else 1)
        clip = self.vae.decoder, *video.shape[2:]
        rows = self.vae.rows_within(room, *clip)
        slab = self.vae.slab_within(room, *clip, rows)
        notes = self.fallbacks
        while (rgb := self.pixels(video, latent.request.shape, rows, slab)) is None:
            rows, slab = -(-rows // 2), max(SLAB, slab // 4)
            notes = (*self.fallbacks, f"decoded {rows * self.vae.config.space_stride} rows at a time: "
                                      "the GPU had no memory for more")
        return Frames(request=latent.request, rgb=rgb, fallbacks=latent.fallbacks + notes,
                      determinism=(*latent.determinism, self.determinism))

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
                for picture, room in zip(pixels, place, strict=True):   # of a band only one frame's rows lie together
                    room.copy_(picture, non_blocking=True)
        pixels.record_stream(self.copies)


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] to 0..255, the rest cut off; truncated, not rounded, as the release writes its clips: 0 becomes 127."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
