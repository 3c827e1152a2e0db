"""What a GPU would be asked to do: operators counted, and the bytes they read and write, on tensors that hold nothing.

They are on device "meta", which any torch knows; FakeTensor's "cuda" cannot be sliced by a torch built for CPUs alone.
"""

from collections import Counter

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh")        # beside the views
WORK = ("convolution", "mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product", "_safe_softmax", "_softmax")


class Launches(TorchDispatchMode):
    """count and gigabytes: operator -> launches, and what they move. Views and empty memory are no launches."""

    def __init__(self):
        super().__init__()
        self.count, self.gigabytes = Counter(), Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if operator.namespace == "prim" or operator.is_view or name in FREE:
            return result
        if name == "convolution":
            result = as_cudnn_lays_it_out(result, args[0])
        tensors = [each for each in pytree.tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
        self.count[name] += 1
        self.gigabytes[name] += sum(each.numel() * each.itemsize for each in tensors) / 1e9
        if name == "convolution" and args[2] is not None:              # cuDNN adds no bias; torch does, afterwards
            self.count["bias of convolution"] += 1
            self.gigabytes["bias of convolution"] += 2 * result.numel() * result.itemsize / 1e9
        return result

    @property
    def around(self) -> float:
        """Gigabytes of what is neither a convolution nor a product nor attention."""
        return sum(size for name, size in self.gigabytes.items() if not name.startswith(WORK))


def as_cudnn_lays_it_out(result: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Channels adjacent, where those of what it was given are; "meta" forgets it in five dimensions."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}[given.ndim]
    return result.contiguous(memory_format=layout) if given.stride(1) == 1 else result
