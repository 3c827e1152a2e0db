"""What all kernel folders share: their files, the names of their implementations, and how tests see their memory."""

from pathlib import Path

import pytest
import torch

from dailies import kernels


def test_a_kernel_folder_has_a_contract_a_reference_and_implementations():
    folders = [path.parent for path in Path(kernels.__file__).parent.glob("*/__init__.py")]
    assert len(folders) == 5
    for folder in folders:
        files = {path.name for path in folder.glob("*.py")}
        assert {"__init__.py", "reference.py", "kernel.py"} <= files <= {"__init__.py", *(
            f"{module}.py" for module in kernels.MODULES.values())}, folder


def test_an_implementation_has_one_name_and_suits_where_the_tensor_lies():
    here, there = torch.ones(1), torch.ones(1, device="meta")
    assert kernels.chosen_impl("auto", here) == kernels.chosen_impl("cpu", here) == "cpu"
    assert kernels.chosen_impl("auto", here, on_cpu="reference") == "reference"
    assert kernels.chosen_impl("reference", there) == "reference"
    assert kernels.implementation("norm", "cpu").__name__ == "dailies.kernels.norm.cpu"
    with pytest.raises(ValueError, match="impl must be auto, reference, cpu, triton, .* got torch for one on cpu"):
        kernels.chosen_impl("torch", here)


def test_memory_that_a_kernel_is_given_holds_no_numbers():
    """Else a hole in a result may hold the right numbers of the call before."""
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(5).isnan().all()
    assert torch.empty_like(torch.ones(2, 2, dtype=torch.bfloat16)).isnan().all()
    assert (torch.empty(4, dtype=torch.int8) == 127).all()
