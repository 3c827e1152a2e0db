"""Gemma 3, as LTX-2 reads a prompt by it: not the last hidden state but all of them.

Letters  n tokens of a text  D width  L hidden states, one more than layers
Source   Gemma 3 (its technical report and published configs); LTX-2, ltx-core 1.2, for what is made of it

A prompt is padded on the left to `length` tokens in the releases. Nothing attends to padding and no row of it is used,
so it is not computed; it only moves the positions of the text's own tokens to the end of that length.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.model.files import CheckpointError
from dailies.model.keys import KeyTable
from dailies.model.layers import Linear, rotate_halves

# Of a config: the names of its sizes, and the largest that there could be; the 12B has 48 layers and 262,208 pieces.
LARGEST_GEMMA = dict(vocab_size=2**21, hidden_size=2**16, intermediate_size=2**18, num_hidden_layers=256,
                     num_attention_heads=1024, num_key_value_heads=1024)
# what the published configs leave out
COMMON = dict(vocab_size=262_208, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096, rms_norm_eps=1e-6,
              rope_theta=1e6, rope_local_base_freq=1e4)
PATTERN = 6                                             # every sixth layer attends to all, where a config does not say
WRITES = "of the half that writes texts"
SEES = "of the part that sees pictures"


def gemma_table(before: str, *others: str) -> KeyTable:
    return KeyTable(name="GEMMA3", rules={f"{before}layers.{{}}.": "layers.{}.", f"{before}embed_tokens.":
                                          "embed_tokens.", f"{before}norm.": "norm."},
                    dropped={f"{other}{part}.": why for other in ("", *others) for part, why in (
                        ("lm_head", WRITES), ("vision_tower", SEES), ("vision_model", SEES),
                        ("multi_modal_projector", SEES), ("audio_projector", "of the part that hears"))})


# as Gemma 3 is published, as transformers saves it now, and as one file with all there is of it
GEMMA_TABLES = (gemma_table("language_model.model.", "language_model."), gemma_table("model.language_model.", "model."),
                gemma_table("model.", "model."))


@dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    vocabulary: int
    width: int
    hidden: int                                         # of the feed-forward layers
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    query_scale: float                                  # of the logits: 1 / sqrt(query_pre_attn_scalar)
    window: int
    everywhere: tuple[bool, ...]                        # by layer: it attends to all before, and not to a window
    thetas: tuple[float, float]                         # of rotary positions: within a window, everywhere
    stretch: tuple[float, float]                        # positions are divided by it
    eps: float = 1e-6


def gemma_config(said: Mapping[str, Any], where: str) -> GemmaConfig:
    """Of a config.json as transformers has it, now or before its version 5.  Raises CheckpointError."""
    try:
        kind = said.get("model_type")
        if kind not in ("gemma3", "gemma3_text"):
            raise ValueError(f"model_type is {str(kind)[:40]!r}, and gemma3 is needed")
        fields = {**COMMON, **(said["text_config"] if kind == "gemma3" else said)}
        for name, most in (LARGEST_GEMMA | dict(head_dim=2**12, sliding_window=2**24)).items():
            if type(fields[name]) is not int or not 1 <= fields[name] <= most:
                raise ValueError(f"{name} must be a whole number from 1 to {most:,}; got {str(fields[name])[:40]}")
        if fields["num_attention_heads"] % fields["num_key_value_heads"] or fields["head_dim"] % 2:
            raise ValueError("its heads of queries must be a multiple of those of keys, and head_dim even")
        if fields.get("attention_bias") or fields.get("attn_logit_softcapping") or fields.get(
                "hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            raise ValueError("attention_bias, attn_logit_softcapping and another activation than gelu_pytorch_tanh "
                             "are of other models")
        thetas, stretch = zip(*rotary_of(fields), strict=True)
        return GemmaConfig(
            vocabulary=fields["vocab_size"], width=fields["hidden_size"], hidden=fields["intermediate_size"],
            layers=fields["num_hidden_layers"], heads=fields["num_attention_heads"],
            key_heads=fields["num_key_value_heads"], head_dim=fields["head_dim"],
            query_scale=above_zero(fields, "query_pre_attn_scalar") ** -0.5, window=fields["sliding_window"],
            everywhere=everywhere_of(fields), thetas=thetas, stretch=stretch, eps=above_zero(fields, "rms_norm_eps"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{where} is not the config of a Gemma 3: {why[:300]}. Is it the folder of "
                              "google/gemma-3-12b-it, or of its QAT weights?") from error


def above_zero(fields: Mapping[str, Any], name: str) -> float:
    number = fields[name]
    if type(number) not in (int, float) or not math.isfinite(number) or not 0 < number < 1e12:
        raise ValueError(f"{name} must be a number above 0; got {str(number)[:40]}")
    return float(number)


def rotary_of(fields: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Theta and stretch of layers with a window, and of those without."""
    if "rope_parameters" in fields:
        kinds = [fields["rope_parameters"][kind] for kind in ("sliding_attention", "full_attention")]
    else:
        kinds = [{"rope_theta": fields["rope_local_base_freq"]},
                 {"rope_theta": fields["rope_theta"], **(fields.get("rope_scaling") or {})}]
    found = []
    for kind in kinds:
        named = kind.get("rope_type", kind.get("type", "default"))
        if named not in ("default", "linear"):
            raise ValueError(f"its rotary positions are {str(named)[:40]!r}; linear ones are known")
        found.append((above_zero(kind, "rope_theta"), above_zero(kind, "factor") if named == "linear" else 1.0))
    return found


def everywhere_of(fields: Mapping[str, Any]) -> tuple[bool, ...]:
    layers = fields["num_hidden_layers"]
    if "layer_types" in fields:
        kinds = fields["layer_types"]
        if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {"full_attention",
                                                                                     "sliding_attention"}:
            raise ValueError(f"layer_types must be {layers} of full_attention and sliding_attention")
        return tuple(kind == "full_attention" for kind in kinds)
    pattern = fields.get("sliding_window_pattern", PATTERN)
    if type(pattern) is not int or pattern < 1:
        raise ValueError(f"sliding_window_pattern must be a whole number above 0; got {str(pattern)[:40]}")
    return tuple((layer + 1) % pattern == 0 for layer in range(layers))


class Gemma3(nn.Module):
    """The decoder without what writes. The residual stream is fp32, whatever the layers compute in."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(GemmaLayer(config) for _ in config.everywhere)
        self.norm = GemmaNorm(config.width, config.eps)

    def forward(self, ids: list[int], length: int) -> Tensor:
        """Hidden states [n, D, L] fp32 of a text's tokens, which end at place `length` - 1: the embedding, then what
        each layer leaves; the last is normed.

        Raises ValueError for no token, or more than `length`.
        """
        if not 1 <= len(ids) <= length:
            raise ValueError(f"a text must have 1 to {length} tokens; got {len(ids)}")
        table, device = self.embed_tokens.weight, self.norm.weight.device
        scale = torch.tensor(self.config.width ** 0.5).to(table.dtype).float()         # rounded as the table is
        x = table[torch.tensor(ids, device=table.device)].to(device).float() * scale.to(device)
        places = torch.arange(length - len(ids), length, device=device)
        tables = [gemma_rotary(places, self.config, kind) for kind in (0, 1)]
        distance = places[:, None] - places
        masks = [(distance >= 0) & (distance < self.config.window), distance >= 0]
        states = [x]
        for layer, everywhere in zip(self.layers, self.config.everywhere, strict=True):
            x = layer(x, tables[everywhere], masks[everywhere])
            states.append(x)
        states[-1] = self.norm(x)
        return torch.stack(states, dim=-1)


def gemma_rotary(places: Tensor, config: GemmaConfig, kind: int) -> tuple[Tensor, Tensor]:
    """cos and sin [n, head_dim / 2] fp32; of layers with a window (0), or without (1)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=places.device) / config.head_dim
    angles = places.float()[:, None] * (1.0 / config.thetas[kind] ** exponents / config.stretch[kind])
    return angles.cos(), angles.sin()


class GemmaNorm(nn.Module):
    """x / rms(x) * (1 + weight), fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight, self.eps)


class GemmaLayer(nn.Module):
    def __init__(self, config: GemmaConfig):
        super().__init__()
        width = config.width
        self.self_attn = GemmaAttention(config)
        self.mlp = nn.ModuleDict({"gate_proj": Linear(width, config.hidden, bias=False),
                                  "up_proj": Linear(width, config.hidden, bias=False),
                                  "down_proj": Linear(config.hidden, width, bias=False)})
        self.input_layernorm, self.post_attention_layernorm, self.pre_feedforward_layernorm, \
            self.post_feedforward_layernorm = (GemmaNorm(width, config.eps) for _ in range(4))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """x [n, D] fp32.  mask [n, n]: true where a token attends to another."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, mask))
        h = self.pre_feedforward_layernorm(x)
        h = F.gelu(self.mlp["gate_proj"](h), approximate="tanh") * self.mlp["up_proj"](h)
        return x + self.post_feedforward_layernorm(self.mlp["down_proj"](h))


class GemmaAttention(nn.Module):
    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        queries, keys = (heads * config.head_dim for heads in (config.heads, config.key_heads))
        self.q_proj = Linear(config.width, queries, bias=False)
        self.k_proj, self.v_proj = (Linear(config.width, keys, bias=False) for _ in range(2))
        self.o_proj = Linear(queries, config.width, bias=False)
        self.q_norm, self.k_norm = (GemmaNorm(config.head_dim, config.eps) for _ in range(2))

    def forward(self, h: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """h [n, D] -> [n, D]."""
        q, k, v = (layer(h).unflatten(-1, (-1, self.config.head_dim)).transpose(0, 1)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotate_halves(norm(x), rope).to(v.dtype) for x, norm in ((q, self.q_norm), (k, self.k_norm)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.config.query_scale, enable_gqa=True)
        return self.o_proj(y.transpose(0, 1).flatten(1))
