"""Models that take turns on one GPU: their weights stay in host memory too, so that a turn copies in, and nothing
back."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)

CHUNK = 1 << 30                                         # bytes: torch rounds what it pins up to a power of two
ALIGN = 64


class HostCopy:
    """The weights of a model in host memory, for good: while it works on the device too, since they never change.

    Pinned, where the system allows it: then a copy runs at the bus's speed and not at a third of it or less.
    """

    def __init__(self, model: nn.Module):
        weights = [*model.parameters(), *model.buffers()]
        sizes = [-(-weight.nbytes // ALIGN) * ALIGN for weight in weights]
        left, room = sum(sizes), torch.empty(0, dtype=torch.uint8)
        self.pairs: list[tuple[Tensor, Tensor]] = []
        for weight, size in zip(weights, sizes, strict=True):
            if size > len(room):
                room = host_memory(max(size, min(CHUNK, left)), pinned=weight.is_cuda)
            host, room, left = room[:weight.nbytes].view(weight.dtype).view(weight.shape), room[size:], left - size
            self.pairs.append((weight, host.copy_(weight.detach())))

    def bring(self, device: str) -> None:
        """The model is on the device; whoever computes there next waits for the copy, not the caller."""
        self.point(lambda host: host.to(device, non_blocking=True))

    def leave(self) -> None:
        """The model is in host memory, and the device's is free."""
        self.point(lambda host: host)

    @torch.inference_mode(False)                        # what a weight is made of then may not be set
    def point(self, at: Callable[[Tensor], Tensor]) -> None:
        for weight, host in self.pairs:
            weight.data = at(host)


def host_memory(size: int, *, pinned: bool) -> Tensor:
    """Bytes, pinned if that is wanted and possible."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError as error:
        _log.warning("weights that wait in host memory are not pinned, so they move more slowly: %s", error)
        return torch.empty(size, dtype=torch.uint8)


def num_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
