"""The sizes of Linum v2's transformer; the released ones stand here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LinumConfig:
    patch: tuple[int, int, int] = (1, 2, 2)            # latent cells per token along T, H, W
    latent_channels: int = 16
    width: int = 1664
    heads: int = 13
    layers: int = 40
    ffn: int = 8192
    time_features: int = 256
    text_dim: int = 4096
    text_len: int = 256                                # rows the text is padded to; the padding takes part in attention
