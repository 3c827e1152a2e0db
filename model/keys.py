"""Released tensor names -> our names, one table per release: those of a family are in its folder, those of texts here.

A rule maps the start of a name; `{}` stands for a number and is carried over. The first rule that fits is taken.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class KeyTable:
    name: str                                           # of the table, for messages
    rules: Mapping[str, str]                            # start of a released name -> start of our name
    dropped: Mapping[str, str] = field(default_factory=dict)   # start of a released name -> why it is not loaded
    flat: tuple[str, ...] = ()                          # released names of weights stored as matrices

    def ours(self, released: str) -> str | None:
        """Our name, or None where no rule fits."""
        return rewrite(released, self.rules.items())

    def released(self, ours: str) -> str | None:
        """The name in the release, or None where no rule leads to our name."""
        return rewrite(ours, ((new, old) for old, new in self.rules.items()))

    def unknown(self, released: Iterable[str]) -> list[str]:
        return [name for name in released if not self.drops(name) and self.ours(name) is None]

    def drops(self, released: str) -> bool:
        return rewrite(released, ((old, "") for old in self.dropped)) is not None

    def prefixed(self, prefix: str) -> "KeyTable":
        """The table of the same release, repacked with something in front of every name."""
        return KeyTable(name=self.name, rules={prefix + old: new for old, new in self.rules.items()},
                        dropped={prefix + old: why for old, why in self.dropped.items()},
                        flat=tuple(prefix + name for name in self.flat))


PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.", "net.", "transformer.", "text_encoder.",
            "text_model.", "vae.", "first_stage_model.")


def table_of(stored: Iterable[str], tables: Iterable[KeyTable]) -> KeyTable:
    """The table that knows most of the names; where all have one of the prefixes that tools put before them, with
    it."""
    stored, tables = list(stored), list(tables)
    every = [prefix for prefix in PREFIXES if stored and all(name.startswith(prefix) for name in stored)]
    tables += [table.prefixed(prefix) for prefix in every for table in tables]
    return min(tables, key=lambda table: len(table.unknown(stored)))


def rewrite(name: str, rules: Iterable[tuple[str, str]]) -> str | None:
    for old, new in rules:
        found = re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), name)
        if found:
            return new.format(*found.groups()) + name[found.end():]
    return None


def nested(places: Mapping[str, str], parts: Mapping[str, str]) -> dict[str, str]:
    """The rules of the parts of a module, for each place where such a module stands."""
    return {old + old_part: new + new_part for old, new in places.items() for old_part, new_part in parts.items()}


# transformers builds this model, so our names are its names. The embedding is one tensor of two names; files have
# either or both.
T5 = KeyTable(
    name="T5",
    rules={
        "shared.": "shared.",
        "encoder.embed_tokens.": "shared.",
        "encoder.block.{}.layer.0.": "encoder.block.{}.layer.0.",
        "encoder.block.{}.layer.1.": "encoder.block.{}.layer.1.",
        "encoder.final_layer_norm.": "encoder.final_layer_norm.",
    },
    dropped={
        "decoder.": "the half that writes texts",
        "lm_head.": "of that half",
        "spiece_model": "SentencePiece's model as bytes, put there for ComfyUI; the tokenizer is in its own folder",
    },
)

# every block brings its relative positions; the names are T5's
UMT5 = KeyTable(name="UMT5", rules=T5.rules, dropped=T5.dropped)

UMT5_WAN = KeyTable(
    name="UMT5_WAN",
    rules={
        "token_embedding.": "shared.",
        **nested({"blocks.{}.": "encoder.block.{}."}, {
            "norm1.": "layer.0.layer_norm.",
            "attn.": "layer.0.SelfAttention.",
            "pos_embedding.embedding.": "layer.0.SelfAttention.relative_attention_bias.",
            "norm2.": "layer.1.layer_norm.",
            "ffn.gate.0.": "layer.1.DenseReluDense.wi_0.",      # through GELU
            "ffn.fc1.": "layer.1.DenseReluDense.wi_1.",
            "ffn.fc2.": "layer.1.DenseReluDense.wo.",
        }),
        "norm.": "encoder.final_layer_norm.",
    },
)
