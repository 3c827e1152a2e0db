"""Tensors in, tensors out; knows no model.  A folder is a few operators that belong together, and reads in this order:

    __init__.py    the contract: shapes, dtypes, what is raised; and which implementation runs
    reference.py   plain torch, to be believed, not to be fast
    cpu.py         what a CPU runs instead, where that is another thing
    kernel.py      Triton, imported only where it runs
"""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "cpu", "triton"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MODULES = {"reference": "reference", "cpu": "cpu", "triton": "kernel"}


def chosen_impl(impl: Impl, x: Tensor, *, on_cpu: str = "cpu") -> str:
    """The implementation for x; "auto" is Triton's on a GPU, the CPU's elsewhere.  on_cpu: the one that is the CPU's.

    Raises ValueError for a name that is none, and for the CPU's where x is on a GPU.
    """
    if impl == "auto":
        impl = "triton" if x.is_cuda else "cpu"
    if impl not in MODULES or impl == "cpu" and x.is_cuda:
        raise ValueError(f"impl must be auto, {', '.join(MODULES)}, and cpu only for tensors on a CPU; "
                         f"got {impl} for one on {x.device}")
    return on_cpu if impl == "cpu" else impl


@cache
def implementation(folder: str, impl: str) -> ModuleType:
    """The module of a folder that computes so."""
    return import_module(f"{__name__}.{folder}.{MODULES[impl]}")
