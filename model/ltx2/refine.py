"""What turns the transformer of the first stage into that of the second, and back to the last bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dailies.model.ltx2.lora import Lora, add_lora
from dailies.model.offload import HostCopy

_CHANGED = ("weight", "weight_scale")                   # of a layer, by a LoRA


class SecondStage:
    """A LoRA that is in the weights while the second stage is made, and in none before and after.

    What the layers were is kept and put back, not reckoned back, which would leave other bits. On a GPU it is kept in
    host memory: the weights are there once, and a clip waits for them to come back, a second or so for 38 GB.
    """

    def __init__(self, dit: nn.Module, lora: Lora, device: str):
        """Raises CheckpointError for a LoRA of another model."""
        lora.check(dit)
        self.lora = lora
        self.layers = {place: module for place, module in dit.named_modules() if place in lora.pairs}
        self.kept = HostCopy(nn.ModuleList(self.layers.values())) if device.startswith("cuda") else None
        self.device = device

    @contextmanager
    def __call__(self) -> Iterator[None]:
        plain = {place: {name: getattr(layer, name) for name in _CHANGED if hasattr(layer, name)}
                 for place, layer in self.layers.items()}
        host = {id(weight): copy for weight, copy in self.kept.pairs} if self.kept else {}
        try:
            for place, layer in self.layers.items():
                add_lora(layer, place, self.lora)
                for weight in plain[place].values():
                    if id(weight) in host:
                        _put(weight, host[id(weight)])
            yield
        finally:
            for place, layer in self.layers.items():
                for name, weight in plain[place].items():
                    setattr(layer, name, weight)
                    if id(weight) in host:
                        _put(weight, host[id(weight)].to(self.device, non_blocking=True))


@torch.inference_mode(False)                            # what a weight is made of then may not be set
def _put(weight: Tensor, data: Tensor) -> None:
    weight.data = data
