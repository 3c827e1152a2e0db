"""From a text encoder's hidden states to the text that LTX-2's two streams attend to.

Letters  n tokens of the text  S rows of context, 1,024 in every release  D width  L hidden states of the encoder
Source   LTX-2, ltx-core 1.2: feature extractors V1 (2.0) and V2 (2.3 on), EmbeddingsProcessor, Embeddings1DConnector

What is no token of the text is a learned register, so every row counts and nothing is masked. Of padding nothing is
computed: neither the statistics nor the connectors read it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.model.layers import Linear
from dailies.model.ltx2.attention import FeedForward, LtxAttention, RootMeanSquare
from dailies.model.ltx2.config import ConnectorsConfig
from dailies.model.ltx2.rope import RotaryTable, rotary

ROWS = 128                                              # of features at a time: each is 188,160 numbers


class TextConnectors(nn.Module):
    def __init__(self, config: ConnectorsConfig, *, audio: bool = True):
        """audio: False makes nothing of what sound alone needs."""
        super().__init__()
        self.config, self.audio = config, audio
        flat = config.hidden * config.stack
        if config.per_token:
            layers = {"video_aggregate_embed": Linear(flat, config.width)}
            if audio:
                layers["audio_aggregate_embed"] = Linear(flat, config.audio_width)
        else:
            layers = {"aggregate_embed": Linear(flat, config.width, bias=False)}
        self.text_embedding_projection = nn.ModuleDict(layers)
        self.video_embeddings_connector = Connector(config, config.width, config.heads)
        if audio:
            self.audio_embeddings_connector = Connector(config, config.audio_width, config.audio_heads)

    def forward(self, stack: Tensor, length: int) -> tuple[Tensor, Tensor | None]:
        """Contexts of picture and sound [S, D], in the dtype that the layers compute in.

        stack [n, D, L]: of the text's own tokens.  length: S, a multiple of the registers, at least n.
        Raises ValueError for another length.
        """
        picture, sound = self.features(stack)
        return (self.video_embeddings_connector(picture, length),
                self.audio_embeddings_connector(sound, length) if self.audio else None)

    def features(self, stack: Tensor) -> tuple[Tensor, Tensor]:
        """[n, D of a connector] for picture and sound; of 2.0 the same."""
        layers = self.text_embedding_projection
        if not self.config.per_token:
            offset, factor = spread_of(stack)
            rows = self.projected(layers["aggregate_embed"], stack, lambda x: (x - offset) * factor)
            return rows, rows
        picture, sound = (
            self.projected(layers[name], stack, lambda x, width=width: per_token(x) * math.sqrt(
                width / self.config.hidden)) if name in layers else stack[:0, :, 0]
            for name, width in (("video_aggregate_embed", self.config.width),
                                ("audio_aggregate_embed", self.config.audio_width)))
        return picture, sound

    @staticmethod
    def projected(layer: Linear, stack: Tensor, normed) -> Tensor:
        """[n, D]; a feature's number is that of the channel times L, and that of the hidden state."""
        return torch.cat([layer(normed(part.float()).flatten(1)).float() for part in stack.split(ROWS)])


def spread_of(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 8 / range of each hidden state over tokens and channels, each [L] fp32 (V1)."""
    x = stack.float().flatten(0, 1)
    low, high = x.aminmax(dim=0)
    return x.sum(0) / (len(x) + 1e-6), 8 / (high - low + 1e-6)


def per_token(x: Tensor) -> Tensor:
    """[n, D, L]: each token of each hidden state over its root mean square (V2)."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)


class Connector(nn.Module):
    """Rows of text and registers, which attend to each other."""

    def __init__(self, config: ConnectorsConfig, width: int, heads: int):
        super().__init__()
        self.config, self.width, self.heads = config, width, heads
        self.learnable_registers = nn.Parameter(torch.zeros(config.registers, width))
        self.transformer_1d_blocks = nn.ModuleList(
            ConnectorBlock(config, width, heads) for _ in range(config.layers))
        self.norm_out = RootMeanSquare(config.norm_eps)

    def forward(self, rows: Tensor, length: int) -> Tensor:
        """[S, D]: rows [n, D], then from place n on the register of each place."""
        count = len(self.learnable_registers)
        if length % count or not len(rows) <= length:
            raise ValueError(f"a context must have a multiple of {count} rows, and no fewer than the text's "
                             f"{len(rows)}; got {length}")
        registers = self.learnable_registers.repeat(length // count, 1)[len(rows):]
        x = torch.cat((rows.float(), registers))[None]
        places = torch.arange(length, dtype=torch.float32, device=x.device)[None, None]
        rope = rotary(places, (self.config.most,), self.width, self.heads, theta=self.config.theta,
                      halves=self.config.rope_halves, exact=self.config.rope_exact)
        for block in self.transformer_1d_blocks:
            x = block(x, rope)
        return self.norm_out(x)[0].to(self.transformer_1d_blocks[0].ff.into.takes)


class ConnectorBlock(nn.Module):
    def __init__(self, config: ConnectorsConfig, width: int, heads: int):
        super().__init__()
        self.norm = RootMeanSquare(config.norm_eps)
        self.attn1 = LtxAttention(width, width, width, heads, gated=config.gated)
        self.ff = FeedForward(width, bias=config.ff_bias)

    def forward(self, x: Tensor, rope: RotaryTable) -> Tensor:
        """x [1, S, D] fp32."""
        h = self.norm(x)
        x = x + self.attn1.out(self.attn1(h, h, rope, rope))
        return x + self.ff.out(F.gelu(self.ff.into(self.norm(x)), approximate="tanh"))
