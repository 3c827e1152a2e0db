"""Transformers as they run, of any family: loaded from a file, refitted for a precision and an attention (turbo.py)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import nn

from dailies.kernels import processor
from dailies.model import checkpoint, turbo
from dailies.model.card import ModelCard
from dailies.model.checkpoint import StoredTensor
from dailies.model.keys import KeyTable
from dailies.model.runtime import Runtime
from dailies.model.weights import layout_in, stored_at

_Model = TypeVar("_Model", bound=nn.Module)


def dit_from(card: ModelCard, new: Callable[[], _Model], tables: tuple[KeyTable, ...], path: Path,
             on: Runtime, *, resident: int | None = None) -> _Model:
    """A transformer, loaded from this file (or index of shards), refitted, in eval mode.  resident: as turbo.build.

    Raises CheckpointError.
    """
    return turbo.build(new, path, *tables, name=card.name, device=on.device, precision=on.precision,
                       attention=on.attention, sparsity=card.sparsity, resident=resident)


def check_dit(card: ModelCard, new: Callable[[], _Model], tables: tuple[KeyTable, ...], path: Path) -> None:
    """That the transformer can be loaded from this file, in the precision that it has.  Raises CheckpointError."""
    precision = "int8" if turbo.scheme_of(checkpoint.stored_tensors(path)) else "fp32"
    dit_from(card, new, tables, path, card.runtime("meta", precision))


def stored_precision(card: ModelCard, weights: Path) -> str | None:
    """int8 where the layers in the file are.  Raises CheckpointError."""
    return "int8" if turbo.scheme_of(dit_tensors(card, weights)) else None


def fallbacks(card: ModelCard, weights: Path | None, on: Runtime) -> dict[str, tuple[str, ...]]:
    """As Family.fallbacks, of such a transformer and Wan's VAE.  Raises CheckpointError."""
    stored = dit_tensors(card, weights) if weights else {}
    return {"sample": turbo.fallbacks(stored, on.device, on.precision), "decode": decode_fallbacks(on)}


def decode_fallbacks(on: Runtime) -> tuple[str, ...]:
    """Of a VAE that is to decode in bf16 where the rest is fp32: elsewhere the transformer says it."""
    if on.decode_precision != "bf16" or on.precision != "fp32" or not on.device.startswith("cpu"):
        return ()
    return tuple(note.replace("computed", "decoded", 1) for note in processor.instead_of_bf16())


def dit_tensors(card: ModelCard, weights: Path) -> Mapping[str, StoredTensor]:
    """What the file of the (first) transformer says it holds."""
    return checkpoint.stored_tensors(stored_at(weights, layout_in(card, weights).dits[0]))
