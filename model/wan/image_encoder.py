"""CLIP's image encoder: a picture in, a row of numbers per patch out; Wan 2.1's image-to-video models attend to it.

Letters  B pictures  P patches  I rows = 1 + P  D width
Source   Wan 2.1 release, CLIPModel.visual (Open-CLIP ViT-H/14). Tensor names: model/keys.py.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.model.layers import Linear, attention
from dailies.model.wan.config import ClipVisionConfig

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)     # of CLIP's training pictures


class ClipVision(nn.Module):
    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)
        self.class_row = nn.Parameter(torch.zeros(config.width))
        self.positions = nn.Parameter(torch.zeros(1 + (config.picture // config.patch) ** 2, config.width))
        self.norm_in = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.blocks))

    def forward(self, pictures: Tensor) -> Tensor:
        """Rows [B, I, D] in fp32.  pictures [B, 3, H, W] in [-1, 1], of any size."""
        patches = self.patch_embed(self.prepare(pictures).to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)
        rows = torch.cat((self.class_row.expand(len(patches), 1, -1), patches.float()), dim=1) + self.positions
        rows = self.norm_in(rows)
        for block in self.blocks:
            rows = block(rows)
        return rows

    def prepare(self, pictures: Tensor) -> Tensor:
        """Squeezed into a square, whatever the aspect, without smoothing, and normalised: as the release does it."""
        size = (self.config.picture, self.config.picture)
        square = F.interpolate(pictures.float(), size=size, mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(said, device=square.device).view(3, 1, 1) for said in (MEAN, STD))
        return (square * 0.5 + 0.5 - mean) / std


class VisionBlock(nn.Module):
    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm_attn, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (Linear(width, width) for _ in range(4))
        self.mlp_in, self.mlp_out = Linear(width, config.mlp), Linear(config.mlp, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_attn(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)) for layer in (self.q, self.k, self.v))
        x = x + self.o(attention(q, k, v))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x))))


def from_open_clip(stored: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Our tensors from those of the original file: query, key and value come apart, what Wan does not use stays behind.

    Raises KeyError for a tensor that is missing.
    """
    def pair(old: str, new: str) -> dict[str, Tensor]:
        return {f"{new}.{part}": stored[f"visual.{old}.{part}"] for part in ("weight", "bias")}

    found = {"class_row": stored["visual.cls_embedding"].flatten(),
             "positions": stored["visual.pos_embedding"].squeeze(0),
             "patch_embed.weight": stored["visual.patch_embedding.weight"]} | pair("pre_norm", "norm_in")
    for i in range(blocks):
        old, new = f"transformer.{i}", f"blocks.{i}"
        for part in ("weight", "bias"):
            for name, tensor in zip("qkv", stored[f"visual.{old}.attn.to_qkv.{part}"].chunk(3), strict=True):
                found[f"{new}.{name}.{part}"] = tensor
        found |= pair(f"{old}.attn.proj", f"{new}.o") | pair(f"{old}.norm1", f"{new}.norm_attn")
        found |= pair(f"{old}.norm2", f"{new}.norm_mlp")
        found |= pair(f"{old}.mlp.0", f"{new}.mlp_in") | pair(f"{old}.mlp.2", f"{new}.mlp_out")
    return found
