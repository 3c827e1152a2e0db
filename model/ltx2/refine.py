"""What turns the transformer of the first stage into that of the second, and back to the last bit."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from dailies.model.ltx2.lora import Lora, add_lora, with_lora
from dailies.model.ltx2.transformer import LtxTransformer
from dailies.model.offload import HostCopy, repoint
from dailies.model.samplers import State, Steps

_CHANGED = ("weight", "weight_scale")                   # of a layer, by a LoRA


class SecondStage:
    """A LoRA that is in the weights while the second stage is made, and in none before and after.

    What the layers were is kept and put back, not reckoned back, which would leave other bits. On a GPU it is kept in
    host memory: the weights are there once, and a clip waits for them to come back, a second or so for 38 GB. To blocks
    whose weights come from host memory in turn it is added each time that they come.
    """

    def __init__(self, dit: LtxTransformer, lora: Lora, device: str):
        """Raises CheckpointError for a LoRA of another model."""
        lora.check(dit)
        self.lora, self.in_turn = lora, dit.in_turn
        self.layers = {place: module for place, module in dit.named_modules() if place in lora.pairs}
        names = {id(module): place for place, module in self.layers.items()}
        self.coming = [[names[id(module)] for module in layer.modules() if id(module) in names]     # by block in turn
                       for layer in (self.in_turn.layers if self.in_turn else ())]
        self.changed = {place: self.layers.pop(place) for places in self.coming for place in places}
        self.kept = HostCopy(nn.ModuleList(self.layers.values())) if device.startswith("cuda") else None
        self.device = device

    @contextmanager
    def __call__(self) -> Iterator[None]:
        plain = {place: {name: getattr(layer, name) for name in _CHANGED if hasattr(layer, name)}
                 for place, layer in self.layers.items()}
        host = {id(weight): copy for weight, copy in self.kept.pairs} if self.kept else {}
        try:
            if self.in_turn is not None:
                self.in_turn.change(self.change)
            for place, layer in self.layers.items():
                add_lora(layer, place, self.lora)
                for weight in plain[place].values():
                    if id(weight) in host:
                        repoint(weight, host[id(weight)])
            yield
        finally:
            if self.in_turn is not None:
                self.in_turn.change(None)
            for place, layer in self.layers.items():
                for name, weight in plain[place].items():
                    setattr(layer, name, weight)
                    if id(weight) in host:
                        repoint(weight, host[id(weight)].to(self.device, non_blocking=True))

    def change(self, block: int) -> None:
        """Of those in turn, whose weights have come."""
        for place in self.coming[block]:
            for name, value in with_lora(self.changed[place], place, self.lora).items():
                repoint(getattr(self.changed[place], name), value)


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
