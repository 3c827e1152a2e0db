"""LTX-2's latents to pictures and sound: video VAE in tiles that fit the memory, audio VAE, vocoder."""

import torch
from torch import Tensor

from dailies.model.family import Decoded, NonFiniteFrames, NonFiniteSound
from dailies.model.ltx2.audio_vae import AudioVAE
from dailies.model.ltx2.vae_tiles import TileSize, decode_groups, release_tile, tile_within
from dailies.model.ltx2.video_vae import VideoVAE
from dailies.model.ltx2.vocoder import ExtendedVocoder, Vocoder
from dailies.model.samplers import Streams
from dailies.model.shapes import VideoShape


class LtxDecoder:
    """Both streams of a clip, or the pictures alone where there is no stream of sound; one device."""

    def __init__(self, video_vae: VideoVAE, audio_vae: AudioVAE | None, vocoder: Vocoder | ExtendedVocoder | None, *,
                 device: str):
        """audio_vae, vocoder: None of a model that makes no sound; a stream of sound is refused then."""
        self.video_vae, self.audio_vae, self.vocoder, self.device = video_vae, audio_vae, vocoder, device

    @property
    def sample_rate(self) -> int | None:
        """Of the sound, per second; None where there is none."""
        return None if self.vocoder is None else self.vocoder.sample_rate

    @torch.inference_mode()
    def __call__(self, streams: Streams, shape: VideoShape, memory: int) -> Decoded:
        """streams: "video" [C, T, H, W] and perhaps "audio" [C, A, M], normalised.  memory: bytes for the pictures; the
        sound of a minute takes less than 1 GB.

        The sound is as long as the model makes it, 10 to 50 ms shorter than the pictures.
        Raises NonFiniteFrames, NonFiniteSound, and OutOfMemoryError where a GPU has no memory for the smallest tiles.
        """
        audio = self.sound(streams["audio"]) if "audio" in streams else None
        rgb, notes = self.pictures(streams["video"][None].to(self.device), shape, memory)
        return Decoded(rgb=rgb, audio=audio, notes=notes)

    def pictures(self, latent: Tensor, shape: VideoShape, memory: int) -> tuple[Tensor, tuple[str, ...]]:
        steps, height, width = latent.shape[2:]
        usual = release_tile(height, width, steps)
        size = tile_within(memory, self.video_vae, height, width, steps)
        while (rgb := self.decoded(latent, shape, size)) is None:
            smaller = tile_within(memory, self.video_vae, height, width, steps, below=size)
            if smaller == size:
                raise torch.OutOfMemoryError("the GPU has no memory for the smallest tiles of a video VAE")
            size = smaller
        if size == usual:
            return rgb, ()
        time, rows, columns = self.video_vae.config.strides
        return rgb, (f"decoded in tiles of {columns * size.width}x{rows * size.height}, {time * size.steps} frames at "
                     "a time: there was no memory for larger ones",)

    def decoded(self, latent: Tensor, shape: VideoShape, size: TileSize) -> Tensor | None:
        """uint8 [frames, height, width, 3] on the CPU; None where the GPU's memory ran out.

        On a GPU frames are copied while the next are decoded.
        """
        on_gpu = self.device.startswith("cuda")
        rgb = torch.empty((shape.frames, shape.height, shape.width, 3), dtype=torch.uint8, pin_memory=on_gpu)
        finite = torch.ones(shape.frames, dtype=torch.bool, device=self.device)     # looked at last: looking waits
        try:
            for at, pixels in decode_groups(self.video_vae, latent, size):
                finite[at:at + pixels.shape[2]] = pixels[0].isfinite().flatten(2).all(2).all(0)
                frames = to_rounded_uint8(pixels[0]).permute(1, 2, 3, 0).contiguous()
                rgb[at:at + len(frames)].copy_(frames, non_blocking=on_gpu)
                del pixels
        except torch.OutOfMemoryError:
            return None
        bad = (~finite).nonzero().flatten().tolist()    # waits for the copies, too
        if bad:
            raise NonFiniteFrames(f"decoding gave NaN or infinity in frames {bad[0]} to {bad[-1]}; try precision fp32")
        return rgb

    def sound(self, latent: Tensor) -> Tensor:
        """[samples, 2] in [-1, 1], fp32 on the CPU.  latent [C, A, M]"""
        if self.audio_vae is None or self.vocoder is None:
            raise ValueError("this decoder was loaded without sound, and the clip has a stream of it; load it with the "
                             "audio VAE and the vocoder")
        mel = self.audio_vae.decode(latent[None].to(self.device))
        wave = self.vocoder(mel)[0].T.cpu().contiguous()
        if not wave.isfinite().all():
            raise NonFiniteSound("decoding gave NaN or infinity in the sound; try precision fp32")
        return wave.clamp_(-1, 1)


def to_rounded_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] to 0..255, the rest cut off, rounded: as the release writes its frames."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round_().to(torch.uint8)
