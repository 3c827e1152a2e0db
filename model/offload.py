"""Weights that stay in host memory, so that a turn on the GPU copies in, and nothing back: of models of which one runs
at a time, or of the layers of one that is larger than its GPU."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)

CHUNK = 1 << 30                                         # bytes: torch rounds what it pins up to a power of two
ALIGN = 64


class HostCopy:
    """The weights of a model in host memory, for good: while it works on the device too, since they never change.

    Pinned, where the system allows it: then a copy runs at the bus's speed and not at a third of it or less.
    """

    def __init__(self, model: nn.Module, *, pinned: bool | None = None):
        """pinned: None: where the model is on a GPU. A model on the CPU lets its own memory go."""
        weights = [*model.parameters(), *model.buffers()]
        sizes = [-(-weight.nbytes // ALIGN) * ALIGN for weight in weights]
        left, room = sum(sizes), torch.empty(0, dtype=torch.uint8)
        self.pairs: list[tuple[Tensor, Tensor]] = []
        for weight, size in zip(weights, sizes, strict=True):
            if size > len(room):
                room = host_memory(max(size, min(CHUNK, left)), pinned=weight.is_cuda if pinned is None else pinned)
            host, room, left = room[:weight.nbytes].view(weight.dtype).view(weight.shape), room[size:], left - size
            self.pairs.append((weight, host.copy_(weight.detach())))
            if weight.is_cpu:
                repoint(weight, host)

    def bring(self, device: str) -> None:
        """The model is on the device; whoever computes there next waits for the copy, not the caller."""
        self.point(lambda host: host.to(device, non_blocking=True))

    def leave(self) -> None:
        """The model is in host memory, and the device's is free."""
        self.point(lambda host: host)

    @torch.inference_mode(False)                        # or what is made could be no weight
    def point(self, at: Callable[[Tensor], Tensor]) -> None:
        for weight, host in self.pairs:
            repoint(weight, at(host))


@torch.inference_mode(False)                            # what a weight is made of then may not be set
def repoint(weight: Tensor, data: Tensor) -> None:
    weight.data = data


class LayersInTurn:
    """Layers whose weights stay in host memory: on the device are those of the one that computes, and of the next.

    The next one's are copied while this one computes, with the same bits as if they had stayed. A forward that was
    broken off leaves nothing that disturbs the next.
    """

    def __init__(self, layers: Sequence[nn.Module], device: str):
        """layers: in the order in which they compute, one after the other; their weights are on the CPU."""
        self.layers, self.device, on_gpu = list(layers), device, device.startswith("cuda")
        self.changed: Callable[[int], None] | None = None
        pairs = HostCopy(nn.ModuleList(layers), pinned=on_gpu).pairs
        place_of = {id(weight): place for place, layer in enumerate(layers)
                    for weight in (*layer.parameters(), *layer.buffers())}
        self.pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
        for weight, host in pairs:
            self.pairs[place_of[id(weight)]].append((weight, host))
        self.copying = torch.cuda.Stream(device) if on_gpu else None
        self.left: torch.cuda.Event | None = None       # when the memory of what left last is free
        self.there: dict[int, torch.cuda.Event | None] = {}     # layers on the device, and when their copy is done
        for place, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, place=place: self.begin(place))
            layer.register_forward_hook(lambda *_, place=place: self.leave(place))

    def change(self, changed: Callable[[int], None] | None) -> None:
        """From now on this is called of a layer whose weights have come, and may `repoint` them until the layer
        leaves.  None: no longer."""
        self.leave_all()
        self.changed = changed

    def begin(self, place: int) -> None:
        """Its weights are there; the next one's are on their way."""
        if place not in self.there:
            self.leave_all()
        for wanted in (place, (place + 1) % len(self.pairs)):
            if wanted not in self.there:
                self.there[wanted] = self.bring(wanted)
        if (copied := self.there[place]) is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)

    @torch.inference_mode(False)                        # or what is made could be no weight
    def bring(self, place: int) -> torch.cuda.Event | None:
        with torch.cuda.stream(self.copying) if self.copying else nullcontext():
            if self.copying and self.left:              # its memory is the copying stream's again
                self.copying.wait_event(self.left)
            for weight, host in self.pairs[place]:
                repoint(weight, torch.empty_like(host, device=self.device).copy_(host, non_blocking=True))
            if self.changed is not None:
                self.changed(place)
            return self.copying.record_event() if self.copying else None

    def leave_all(self) -> None:
        for place in list(self.there):
            self.leave(place)

    def leave(self, place: int) -> None:
        if self.copying:
            self.left = torch.cuda.current_stream(self.device).record_event()
        for weight, host in self.pairs[place]:
            repoint(weight, host)
        del self.there[place]


def settled_on_host(settle: Callable[[str, nn.Module], nn.Module], layers: str,
                    resident: int) -> Callable[[str, nn.Module], nn.Module]:
    """`settle` of checkpoint.load, behind which the weights of layers from the resident ones on are in host memory: the
    model need not fit on the device while it is loaded.  layers: the name of their list.
    """
    def settled(place: str, module: nn.Module) -> nn.Module:
        module, before = settle(place, module), f"{layers}."
        if place.startswith(before) and int(place.removeprefix(before).partition(".")[0]) >= resident:
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None:
                        repoint(tensor, tensor.cpu())
        return module
    return settled


def host_memory(size: int, *, pinned: bool) -> Tensor:
    """Bytes, pinned if that is wanted and possible."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError as error:
        _log.warning("weights that wait in host memory are not pinned, so they move more slowly: %s", error)
        return torch.empty(size, dtype=torch.uint8)


def num_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
