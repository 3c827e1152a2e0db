"""Reads one pickle of weights and writes its tensors as safetensors: python -m jobs.unpickle SOURCE TARGET

A program of its own, so that a pickle is opened only where there is nothing to steal or to break: convert.py starts it
with an environment without credentials and an empty home. weights_only comes first: nothing in the pickle is to run.
Exits with 2 and one line on standard error for what is no table of tensors.
"""

import pickle
import resource
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from model import checkpoint
from model.weights import CheckpointError, first_line, listed

NESTED_UNDER = ("state_dict", "model", "module")        # where some tools put the tensors in a pickle


def tensors_of(path: Path) -> Mapping[str, Tensor]:
    """Raises CheckpointError."""
    try:
        said = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError, IndexError, TypeError,
            AttributeError, RecursionError, MemoryError) as error:
        why = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise CheckpointError(f"{path} cannot be read as tensors and nothing else, and what else it holds could run "
                              f"code ({why}). Fetch it again, from its publisher") from error
    for name in NESTED_UNDER:
        if isinstance(said, Mapping) and isinstance(said.get(name), Mapping):
            said = said[name]
    if not isinstance(said, Mapping) or not said:
        raise CheckpointError(f"{path} must hold a table of tensors; it holds {type(said).__name__}")
    strange = [str(name) for name, value in said.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(f"{path} must hold tensors alone; these are none: {listed(strange)}")
    unknown = [f"{name} ({value.dtype})" for name, value in said.items()
               if value.dtype not in checkpoint.DTYPE_NAMES or value.layout is not torch.strided]
    if unknown:
        raise CheckpointError(f"{path} must hold plain tensors; these are none: {listed(unknown)}")
    return said


def main(source: str, target: str) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        checkpoint.save(Path(target), tensors_of(Path(source)))
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
