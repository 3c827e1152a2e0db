"""What turns the transformer of the first stage into that of the second, and back to the last bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dailies.model.ltx2.lora import Lora, add_lora
from dailies.model.offload import HostCopy
from dailies.model.samplers import State, Steps

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


class LaterSteps(Steps):
    """A second stage's steps, counted on behind the first's: who is told of them can begin in either stage."""

    def __init__(self, steps: Steps, before: int):
        """before: steps of the first stage."""
        self.steps, self.before = steps, before
        self.beside: State = ()                         # of the first stage, what the clip takes beside the second's

    @property
    def is_under_way(self) -> bool:
        """A state within the second stage is there to begin at."""
        return self.steps.begun > self.before

    def begin(self, start: State) -> tuple[int, State]:
        if not self.is_under_way:
            return 0, start
        begun, (clips, *beside) = self.steps.begin(start)
        self.beside = tuple(beside)
        return begun - self.before, (clips,)

    def done(self, step: int, state: State) -> None:
        self.steps.done(self.before + step, (*state, *self.beside))


@torch.inference_mode(False)                            # what a weight is made of then may not be set
def _put(weight: Tensor, data: Tensor) -> None:
    weight.data = data
