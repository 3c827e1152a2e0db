"""The actor that turns latents into frames."""

from pathlib import Path

import torch
from torch import Tensor

from actors.messages import Frames, Latent
from model.catalog import ModelCard


class NonFiniteFrames(ArithmeticError):
    """Decoding gave NaN or infinity."""


class Decoder:
    """Latents in, Frames out; one VAE on one device. Making it loads; calling it only computes."""

    def __init__(self, card: ModelCard, weights: Path, device: str = "cpu", *, precision: str | None = None,
                 threads: int = 1):
        """threads: torch's, for the whole process; fixed, since the last bits of a result may depend on it.

        Raises CheckpointError.
        """
        torch.set_num_threads(threads)
        self.card, self.device = card, device
        self.vae = card.vae(weights, device, precision)
        self.scale, self.bias = (t.to(device).view(-1, 1, 1, 1) for t in card.latent_statistics(weights))

    @torch.inference_mode()
    def __call__(self, batch: list[Latent]) -> list[Frames]:
        """Raises NonFiniteFrames."""
        return [Frames(request=latent.request, rgb=self.decode(latent), fallbacks=latent.fallbacks) for latent in batch]

    def decode(self, latent: Latent) -> Tensor:
        """uint8 [frames, height, width, 3] on the CPU, filled piece by piece: the clip is never whole in floats."""
        shape = latent.request.shape
        video = (latent.streams[0].to(self.device) - self.bias) / self.scale        # fp32, before the VAE rounds it
        video = video[None].to(self.vae.from_latent.weight.dtype)
        rgb = torch.empty(shape.frames, shape.height, shape.width, 3, dtype=torch.uint8)
        at = 0
        for piece in self.vae.decode_chunks(video, chunk=self.card.decode_chunk):
            if not piece.isfinite().all():
                raise NonFiniteFrames(f"decoding gave NaN or infinity in frames {at} to {at + piece.shape[2] - 1}; "
                                      "try precision fp32")
            rgb[at:at + piece.shape[2]] = to_uint8(piece[0]).permute(1, 2, 3, 0)
            at += piece.shape[2]
        return rgb


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] to 0..255, the rest cut off; truncated, not rounded, as the release writes its clips: 0 becomes 127."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
