"""What a GPU would be asked to do: operators counted, the bytes they read and write, and the memory they take.

Tensors hold nothing: they are on device "meta", which any torch knows. FakeTensor's "cuda" cannot be sliced by a torch
that was built for CPUs alone.
"""

import weakref
from collections import Counter

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh")        # beside the views
WORK = ("convolution", "mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product", "_safe_softmax", "_softmax")


class Launches(TorchDispatchMode):
    """count and gigabytes: operator -> launches, and what they move. Views and empty memory are no launches.

    peak: most bytes at a time, of what is made in here.
    """

    def __init__(self):
        super().__init__()
        self.count, self.gigabytes = Counter(), Counter()
        self.held, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if name == "convolution":
            result = as_cudnn_lays_it_out(result, args[0])
        self.hold(result)
        if operator.namespace == "prim" or operator.is_view or name in FREE:
            return result
        tensors = [each for each in pytree.tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
        self.count[name] += 1
        self.gigabytes[name] += sum(each.numel() * each.itemsize for each in tensors) / 1e9
        if name == "convolution" and args[2] is not None:              # cuDNN adds no bias; torch does, afterwards
            self.count["bias of convolution"] += 1
            self.gigabytes["bias of convolution"] += 2 * result.numel() * result.itemsize / 1e9
        return result

    def hold(self, result):
        for each in pytree.tree_leaves(result):
            if isinstance(each, torch.Tensor) and (memory := each.untyped_storage())._cdata not in self.held:
                self.held.add(memory._cdata)
                self.now += memory.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(memory, self.let_go, memory._cdata, memory.nbytes())

    def let_go(self, memory, size):
        self.held.remove(memory)
        self.now -= size

    @property
    def around(self) -> float:
        """Gigabytes of what is neither a convolution nor a product nor attention."""
        return sum(size for name, size in self.gigabytes.items() if not name.startswith(WORK))


def as_cudnn_lays_it_out(result: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Channels adjacent, where those of what it was given are; "meta" forgets it in five dimensions."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}[given.ndim]
    return result.contiguous(memory_format=layout) if given.stride(1) == 1 else result
