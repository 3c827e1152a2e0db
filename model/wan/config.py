"""The sizes of Wan's transformer, VAE and image encoder; those of the releases stand here (1.3B's transformer)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    patch: tuple[int, int, int] = (1, 2, 2)            # latent cells per token along T, H, W
    latent_channels: int = 16
    condition_channels: int = 0                        # of the image, beside the latent: mask 4 + latent 16, or none
    width: int = 1536
    heads: int = 12
    layers: int = 30
    ffn: int = 8960
    time_features: int = 256
    text_dim: int = 4096
    text_len: int = 512                                # rows the text is padded to; the padding takes part in attention
    image_dim: int | None = None                       # of CLIP's rows, where they are attended to (2.1 image-to-video)


@dataclass(frozen=True, kw_only=True)
class WanVAEConfig:
    width: int = 96                                    # channels at full resolution
    multipliers: tuple[int, ...] = (1, 2, 4, 4)        # channels per stage, in widths; a stage halves the picture
    res_blocks: int = 2                                # per encoder stage; the decoder has one more
    latent_channels: int = 16
    halve_time: tuple[bool, ...] = (False, True, True)  # which of the encoder's three downsamplings also halve time

    @property
    def time_stride(self) -> int:
        return 2 ** sum(self.halve_time)

    @property
    def space_stride(self) -> int:
        return 2 ** len(self.halve_time)


@dataclass(frozen=True, kw_only=True)
class ClipVisionConfig:
    picture: int = 224                                 # pixels of a side
    patch: int = 14
    width: int = 1280
    heads: int = 16
    blocks: int = 31                                   # of 32: Wan takes the rows before the last
    mlp: int = 5120
