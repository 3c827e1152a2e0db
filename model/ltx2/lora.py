"""LoRAs of LTX-2: a product of two thin matrices that is added to a weight, as the release adds it.

Letters  R rank, O and I outputs and inputs of a layer
Source   LTX-2, ltx-core 1.2: W + strength * B A; without an alpha
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dailies.model import checkpoint
from dailies.model.eight_bits import Fp8Linear, fp8_of
from dailies.model.files import CheckpointError, listed

LORA_PREFIX = "diffusion_model."
_ENDS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """By the layer's name in our transformer, which is the release's: A [R, I] and B [O, R], as stored, on the CPU."""

    where: str                                          # model and file, for messages
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    strength: float = 1.0

    def check(self, model: nn.Module) -> None:
        """Raises CheckpointError where a layer that it changes is not in the model, or of another size."""
        layers = dict(model.named_modules())
        misfits = []
        for place, (a, b) in self.pairs.items():
            layer = layers.get(place)
            sizes = [getattr(layer, name, None) for name in ("out_features", "in_features")]
            if sizes != [len(b), a.shape[1]]:
                said = f"{sizes[0]} x {sizes[1]} there" if sizes[0] else "not there"
                misfits.append(f"{place} ({len(b)} x {a.shape[1]}, {said})")
        if misfits:
            raise CheckpointError(f"{self.where}: {len(misfits)} of its {len(self.pairs)} layers are not the model's: "
                                  f"{listed(misfits)}. Is it a LoRA of another model, such as LTX-2 19B for 2.3?")


def read_lora(path: Path, strength: float, name: str) -> Lora:
    """name: of the model, for messages.  Raises CheckpointError for a file that is no LoRA of LTX-2."""
    where = f"{name}: {path}"
    stored = checkpoint.stored_tensors(path)
    odd = [key for key in stored if not key.startswith(LORA_PREFIX) or not key.endswith(_ENDS)]
    if odd or not stored:
        raise CheckpointError(f"{where} must hold nothing but {LORA_PREFIX}LAYER.lora_A.weight and .lora_B.weight; "
                              f"it has {listed(odd) or 'nothing'}. Is it a LoRA of LTX-2?")
    tensors = {key: tensor.clone() for key, tensor in checkpoint.views(stored)}
    for key, tensor in tensors.items():
        if not checkpoint.is_finite(tensor):
            raise checkpoint.not_finite(key, where)
    pairs = {}
    for key in sorted(tensors):
        place = key.removeprefix(LORA_PREFIX).removesuffix(_ENDS[0]).removesuffix(_ENDS[1])
        a, b = (tensors.get(f"{LORA_PREFIX}{place}{end}") for end in _ENDS)
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise CheckpointError(f"{where}: {place} must have matrices lora_A [R, I] and lora_B [O, R]; it has "
                                  f"{[None if x is None else list(x.shape) for x in (a, b)]}. Fetch it again")
        pairs[place] = (a, b)
    return Lora(where=where, pairs=pairs, strength=strength)


def add_lora(layer: nn.Module, place: str, lora: Lora) -> None:
    """Change the layer of that name, in place. Check the LoRA first; the layer is not in INT8."""
    for name, value in with_lora(layer, place, lora).items():
        setattr(layer, name, nn.Parameter(value, requires_grad=False) if name in layer._parameters else value)


def with_lora(layer: nn.Module, place: str, lora: Lora) -> dict[str, Tensor]:
    """What of the layer the LoRA changes, changed.

    In the weight's own dtype: the product is rounded to it, and so is the sum. A layer in FP8 is given a new scale.
    """
    a, b = lora.pairs[place]
    narrow, weight = isinstance(layer, Fp8Linear), layer.weight
    dtype = torch.bfloat16 if narrow else weight.dtype
    delta = (b.to(weight.device, dtype) * lora.strength) @ a.to(weight.device, dtype)
    if narrow:
        return dict(zip(("weight", "weight_scale"), fp8_of(layer.widened() + delta), strict=True))
    return {"weight": weight + delta}
