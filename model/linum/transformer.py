"""Linum v2 diffusion transformer: a noisy video latent in, its flow velocity out.

Letters  B clips  C channels  T H W latent grid  N tokens (T*H*W / prod(patch))  D width  L text tokens
Source   Linum v2 release, DiTModel.forward. Tensor names: model/keys.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.model.block import Block, CrossAttention, Head, SelfAttention
from dailies.model.layers import Linear, RMSNorm, rotary_table, timestep_features
from dailies.model.linum.config import LinumConfig


@dataclass(frozen=True, kw_only=True)
class TextContext:
    """What cross-attention needs of the text: it depends on no latent and no time, so it is made once per clip."""

    keys: tuple[Tensor, ...]                           # per block [B, text_len, heads, head_dim]
    values: tuple[Tensor, ...]


class LinumDiT(nn.Module):
    def __init__(self, config: LinumConfig):
        super().__init__()
        self.config = config
        width, cells = config.width, config.latent_channels * math.prod(config.patch)
        self.patch_embed = nn.Conv3d(config.latent_channels, width, config.patch, stride=config.patch)
        self.time_in = Linear(config.time_features, width)
        self.time_out = Linear(width, width)
        self.time_modulation = Linear(width, 6 * width)
        # no bias here nor in the keys and values of cross-attention: padded text is zero and must stay zero
        self.text_in = Linear(config.text_dim, width, bias=False)
        self.text_out = Linear(width, width, bias=False)
        self.blocks = nn.ModuleList(LinumBlock(config) for _ in range(config.layers))
        self.head = LinumHead(width, cells)
        # normalised latent = latent * scale + bias, per channel
        self.register_buffer("latent_scale", torch.ones(config.latent_channels))
        self.register_buffer("latent_bias", torch.zeros(config.latent_channels))

    def forward(self, latent: Tensor, timestep: Tensor, text: TextContext) -> Tensor:
        """Velocity d latent / d sigma (noise minus data), shaped like latent, fp32.

        latent [B, C, T, H, W] normalised.  timestep [B] = 1000 * sigma, 1000 is noise.  text from embed_text.
        """
        tokens, rope = self.patchify(latent)                                    # [B, N, D]
        time = self.embed_time(timestep)                                        # [B, D]
        modulation = self.time_modulation(F.silu(time)).unflatten(1, (6, -1))   # [B, 6, D]
        for block, key, value in zip(self.blocks, text.keys, text.values, strict=True):
            tokens = block(tokens, modulation, (key, value), rope)
        return self.unpatchify(self.head(tokens, time), latent.shape)

    def embed_text(self, texts: list[Tensor]) -> TextContext:
        """Keys and values of every block.  texts: per clip [L_i, text_dim], the encoder's rows of the prompt alone.

        As in the release, every text is padded to text_len zero rows and nothing is masked: a padded row has key 0 and
        value 0, and takes its share of the attention. (One zero key with logit ln(how many) says the same with fewer
        keys, but bf16 rounds that logit: 1 % off for an empty prompt. And without a mask flash attention can run.)
        Raises ValueError for a text that is empty or longer than text_len.
        """
        lengths = [len(text) for text in texts]
        if min(lengths) < 1 or max(lengths) > self.config.text_len:
            raise ValueError(f"a text needs 1 to {self.config.text_len} rows; got {lengths}. "
                             "Truncate the prompt's tokens")
        rows = torch.stack([F.pad(text, (0, 0, 0, self.config.text_len - len(text))) for text in texts])
        return self.embed_rows(rows)

    def embed_rows(self, rows: Tensor) -> TextContext:
        """embed_text() of texts that are padded already: rows [B, text_len, text_dim], zero past each text's end."""
        rows = self.text_out(F.gelu(self.text_in(rows), approximate="tanh"))
        keys, values = zip(*(block.cross.keys_values(rows) for block in self.blocks), strict=True)
        return TextContext(keys=keys, values=values)

    def embed_time(self, timestep: Tensor) -> Tensor:
        return self.time_out(F.silu(self.time_in(timestep_features(timestep, self.config.time_features))))

    def patchify(self, latent: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Tokens [B, N, D] in T, H, W order and the rotary table of their grid; odd sides get zeros below and right."""
        _, ph, pw = self.config.patch
        height, width = latent.shape[3:]
        latent = F.pad(latent, (0, -width % pw, 0, -height % ph))
        cells = self.patch_embed(latent.to(self.patch_embed.weight.dtype))
        rope = rotary_table(tuple(cells.shape[2:]), self.config.width // self.config.heads, cells.device)
        return cells.flatten(2).transpose(1, 2).float().contiguous(), rope

    def unpatchify(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        """[B, N, pt*ph*pw*C] (channel last) -> [B, C, T, H, W], cut back to `shape`."""
        batch, channels, frames, height, width = shape
        pt, ph, pw = self.config.patch
        grid = (frames // pt, -(-height // ph), -(-width // pw))
        x = tokens.reshape(batch, *grid, pt, ph, pw, channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(batch, channels, frames, grid[1] * ph, grid[2] * pw)[..., :height, :width].float()


class LinumBlock(Block):
    def __init__(self, config: LinumConfig):
        super().__init__()
        width = config.width
        self.modulation = nn.Parameter(torch.zeros(1, 6, width))
        self.norm_attn, self.norm_cross, self.norm_ffn = (nn.LayerNorm(width, eps=1e-5) for _ in range(3))
        self.attn = SelfAttention(width, config.heads)
        self.cross = LinumCrossAttention(width, config.heads)
        self.ffn_in = Linear(width, config.ffn)
        self.ffn_out = Linear(config.ffn, width)


class LinumCrossAttention(CrossAttention):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.o = Linear(width, width), Linear(width, width)
        self.k, self.v = Linear(width, width, bias=False), Linear(width, width, bias=False)
        self.norm_q, self.norm_k = RMSNorm(width), RMSNorm(width)


class LinumHead(Head):
    def __init__(self, width: int, cells: int):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 2, width))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.linear = Linear(width, cells)
