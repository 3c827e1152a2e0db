"""Wan 2.1 and 2.2 diffusion transformer: a noisy video latent in, its flow velocity out; from text, or text and image.

Letters  B clips  C channels  T H W latent grid  N tokens (T*H*W / prod(patch))  D width  L text rows  I image rows
Source   Wan 2.1 and Wan 2.2 releases, WanModel.forward. Tensor names: model/keys.py.

Precision as in the releases under autocast: the time embedding, the modulation, the norms, the residual stream and the
whole head in fp32; all other linear layers in the dtype of their weights.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.model.block import Block, CrossAttention, Head, SelfAttention
from dailies.model.layers import FullPrecisionLinear, Linear, RMSNorm, linear, rotary_table, timestep_features
from dailies.model.wan.config import WanConfig


@dataclass(frozen=True, kw_only=True)
class Context:
    """What cross-attention needs of text and image; it depends on no latent and no time, so once per clip will do."""

    keys: tuple[Tensor, ...]                           # per block [B, text_len, heads, head_dim]
    values: tuple[Tensor, ...]
    image_keys: tuple[Tensor, ...]                     # per block [B, I, heads, head_dim]; or none
    image_values: tuple[Tensor, ...]

    def of_block(self, place: int) -> tuple[Tensor, ...]:
        """Key and value of the text, and then of the image if there is one."""
        parts = (self.keys, self.values, self.image_keys, self.image_values)
        return tuple(part[place] for part in parts if part)


class WanDiT(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = nn.Conv3d(config.latent_channels + config.condition_channels, width, config.patch,
                                     stride=config.patch)
        self.time_in = FullPrecisionLinear(config.time_features, width)
        self.time_out = FullPrecisionLinear(width, width)
        self.time_modulation = FullPrecisionLinear(width, 6 * width)
        self.text_in = Linear(config.text_dim, width)
        self.text_out = Linear(width, width)
        self.image_embed = ImageEmbed(config.image_dim, width) if config.image_dim else None
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.layers))
        self.head = WanHead(width, config.latent_channels * math.prod(config.patch))

    def forward(self, latent: Tensor, timestep: Tensor, context: Context, condition: Tensor | None = None) -> Tensor:
        """Velocity d latent / d sigma (noise minus data), shaped like latent, fp32.

        latent [B, C, T, H, W] normalised, H and W even.  timestep [B] = 1000 * sigma, 1000 is noise; the releases cut
        it to a whole number.  context from embed.  condition [B, condition_channels, T, H, W]: of the image.
        """
        cells = latent if condition is None else torch.cat((latent, condition), dim=1)
        tokens, rope = self.patchify(cells)                                     # [B, N, D]
        time = self.embed_time(timestep)                                        # [B, D]
        modulation = self.time_modulation(F.silu(time)).unflatten(1, (6, -1))   # [B, 6, D]
        for place, block in enumerate(self.blocks):
            tokens = block(tokens, modulation, context.of_block(place), rope)
        return self.unpatchify(self.head(tokens, time), latent.shape)

    def embed(self, texts: list[Tensor], images: list[Tensor] | None = None) -> Context:
        """Keys and values of every block.  texts: per clip [L_i, text_dim], the encoder's rows of the prompt alone.
        images: per clip [I, image_dim], CLIP's rows, for a model that attends to them.

        As in the releases, every text is padded with zero rows to text_len before an embedding that has biases, so the
        padding becomes a constant row that takes its share of the attention. (One such row with logit ln(how many) says
        the same with fewer keys, but bf16 rounds ln 511 = 6.236 to 6.25. And without a mask flash attention can run.)
        Raises ValueError for a text that is empty or longer than text_len, and for images missing or not wanted.
        """
        lengths = [len(text) for text in texts]
        if min(lengths) < 1 or max(lengths) > self.config.text_len:
            raise ValueError(f"a text needs 1 to {self.config.text_len} rows; got {lengths}. "
                             "Truncate the prompt's tokens")
        if (images is None) != (self.image_embed is None):
            wanted = "needs an image with each text" if images is None else "takes no image rows"
            raise ValueError(f"this model {wanted}")
        rows = torch.stack([F.pad(text, (0, 0, 0, self.config.text_len - len(text))) for text in texts])
        rows = self.text_out(F.gelu(self.text_in(rows), approximate="tanh"))
        keys, values = zip(*(block.cross.keys_values(rows) for block in self.blocks), strict=True)
        image_keys, image_values = (), ()
        if images is not None and self.image_embed is not None:
            rows = self.image_embed(torch.stack(images))
            image_keys, image_values = zip(*(block.cross.image_keys_values(rows) for block in self.blocks), strict=True)
        return Context(keys=keys, values=values, image_keys=image_keys, image_values=image_values)

    def embed_time(self, timestep: Tensor) -> Tensor:
        return self.time_out(F.silu(self.time_in(timestep_features(timestep, self.config.time_features))))

    def patchify(self, cells: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Tokens [B, N, D] in T, H, W order and the rotary table of their grid."""
        grid = tuple(side // step for side, step in zip(cells.shape[2:], self.config.patch, strict=True))
        (t, pt), (h, ph), (w, pw) = zip(grid, self.config.patch, strict=True)
        # a convolution whose steps are its kernel is a linear layer of patches, which is faster
        patches = cells.reshape(*cells.shape[:2], t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        patches = patches.flatten(4).flatten(1, 3)
        weight, bias = self.patch_embed.weight, self.patch_embed.bias
        tokens = linear(patches.to(weight.dtype), weight.flatten(1), bias).float()
        return tokens, rotary_table(grid, self.config.width // self.config.heads, cells.device)

    def unpatchify(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        """[B, N, pt*ph*pw*C] (channel last) -> [B, C, T, H, W]."""
        batch, channels, *sides = shape
        pt, ph, pw = self.config.patch
        grid = [side // step for side, step in zip(sides, self.config.patch, strict=True)]
        x = tokens.reshape(batch, *grid, pt, ph, pw, channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(shape).float()


class WanBlock(Block):
    def __init__(self, config: WanConfig):
        super().__init__()
        width = config.width
        self.modulation = nn.Parameter(torch.zeros(1, 6, width))
        self.norm_attn, self.norm_ffn = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.norm_cross = nn.LayerNorm(width, eps=1e-6)
        self.attn = SelfAttention(width, config.heads)
        self.cross = WanCrossAttention(width, config.heads, with_image=config.image_dim is not None)
        self.ffn_in = Linear(width, config.ffn)
        self.ffn_out = Linear(config.ffn, width)


class WanCrossAttention(CrossAttention):
    """Attention to the text and, by a softmax of its own, to the image's rows; added up before the last layer."""

    def __init__(self, width: int, heads: int, *, with_image: bool):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(width), RMSNorm(width)
        if with_image:
            self.k_image, self.v_image = Linear(width, width), Linear(width, width)
            self.norm_k_image = RMSNorm(width)

    def image_keys_values(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.normed_key_value(image, self.k_image, self.norm_k_image, self.v_image)


class ImageEmbed(nn.Module):
    """CLIP's rows [B, I, image_dim] as rows of the model's width."""

    def __init__(self, image_dim: int, width: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(image_dim)
        self.linear_in = Linear(image_dim, image_dim)
        self.linear_out = Linear(image_dim, width)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm_out(self.linear_out(F.gelu(self.linear_in(self.norm_in(image.float())))).float())


class WanHead(Head):
    def __init__(self, width: int, cells: int):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 2, width))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = FullPrecisionLinear(width, cells)
