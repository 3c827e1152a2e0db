"""Reads one pickle of weights and writes its tensors as safetensors: jobs/sandbox.py runs it, convert.py starts that.

A program of its own, so that a pickle is opened only where there is nothing to steal or to break: its environment has
no credentials, its home is empty, and the kernel shuts it in. weights_only comes first: nothing in the pickle is to
run. Exits with 2 and one line on standard error for what is no table of tensors.
"""

import os
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dailies.model import checkpoint, foreign
from dailies.model.files import CheckpointError, first_line, listed

EXPANSION = 4                                           # tensors of several names may share their memory
FOREIGN = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
           torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e8m0fnu: "F8_E8M0"}
NESTED_UNDER = ("state_dict", "model", "module")        # where some tools put the tensors in a pickle


def pickled_tensors(path: Path) -> Mapping[str, Tensor]:
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
    low = {name: foreign_name for name, value in said.items() if (foreign_name := FOREIGN.get(value.dtype))}
    if low:
        raise CheckpointError(foreign.quantized(path, low))
    unknown = [f"{name} ({value.dtype})" for name, value in said.items()
               if value.dtype not in checkpoint.DTYPE_NAMES or value.layout is not torch.strided]
    if unknown:
        raise CheckpointError(f"{path} must hold plain tensors; these are none: {listed(unknown)}")
    num_bytes, most = sum(value.nbytes for value in said.values()), EXPANSION * path.stat().st_size + 2**20
    if num_bytes > most:                                # a few bytes can be shown as a tensor of any size
        raise CheckpointError(f"{path} unfolds to {num_bytes:,} bytes, more than {EXPANSION} times its own. Fetch it "
                              "again, from its publisher")
    return said


def main(source: str, target: str) -> int:
    """target: the number of a file that is open for writing."""
    try:
        with os.fdopen(int(target), "wb") as file:
            file.writelines(checkpoint.pieces(pickled_tensors(Path(source)), {}))
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
