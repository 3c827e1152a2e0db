"""What a forward on a GPU moves through memory beside its products and its attention: traced without a GPU, bounded.

python tests/test_bytes_of_a_forward.py        prints the table, with the share of each operator

A trace runs the model on tensors without data that say they are on a GPU, and adds up what each operator reads and
writes. Norms, rotary positions, GELU, joins and casts move bytes and compute nothing to speak of: their time is their
bytes. Products and attention are left out; so is what int8_linear quantises, which has a column of its own.
"""

import sys
from collections import Counter
from dataclasses import dataclass, replace
from math import prod

import pytest
import torch
from parts import new_dit
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dailies.model import turbo
from dailies.model.catalog import CATALOG
from dailies.model.layers import compute_in
from dailies.model.shapes import VideoShape

PRODUCTS = ("linear", "conv3d", "_addmm_activation", "int8_linear")
ATTENTION = ("int8_attention", "sparse_attention", "scaled_dot_product_attention")
ON_THE_HOST = ("_local_scalar_dense", "lift_fresh", "nonzero", "is_nonzero")        # make or ask for values there


@dataclass(frozen=True, kw_only=True)
class Case:
    """A forward of one clip, and the most GB that it may move."""

    model: str
    shape: VideoShape
    precision: str
    attention: str
    most_gb: float
    most_quantised_gb: float = 0.0

    def __str__(self) -> str:
        return f"{self.model} {self.shape.height}p {self.shape.frames}f {self.precision} {self.attention}"


P480, P720, P720_LONG = (VideoShape(frames=frames, height=height, width=width)
                         for frames, height, width in ((81, 480, 832), (81, 720, 1280), (121, 720, 1280)))
CASES = [Case(model="turbo-wan2.1-t2v-1.3b-480p", shape=P480, precision="int8", attention="sparse", most_gb=60,
              most_quantised_gb=36),
         Case(model="wan2.1-t2v-14b", shape=P720, precision="int8", attention="sparse", most_gb=620,
              most_quantised_gb=219),
         Case(model="wan2.1-t2v-1.3b", shape=P480, precision="bf16", attention="dense", most_gb=75),
         Case(model="linum-v2-720p", shape=P720_LONG, precision="bf16", attention="dense", most_gb=360)]


class Traffic(TorchDispatchMode):
    """Bytes in and out of every operator that is run, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.moved, self.calls, self.quantised = Counter(), Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        given, made = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
                       for tree in ((args, kwargs), result))
        if name == "int8_linear" and given[0].is_floating_point():
            self.quantised += given[0].numel() * (given[0].itemsize + 1)
        places = {id(tensor.untyped_storage()) for tensor in given}
        is_view = not func._schema.is_mutable and all(id(tensor.untyped_storage()) in places for tensor in made)
        if not is_view:
            self.calls[name] += 1
            self.moved[name] += sum(map(bytes_of, (*given, *made)))
        return result

    def beside(self) -> Counter:
        """Of what is neither product nor attention."""
        return Counter({name: moved for name, moved in self.moved.items() if name not in PRODUCTS + ATTENTION})


def bytes_of(tensor: Tensor) -> int:
    """What is there once, however often it is read."""
    return tensor.itemsize * prod(size for size, step in zip(tensor.shape, tensor.stride(), strict=True) if step)


def traced(case: Case) -> Traffic:
    """A forward as the sampler calls it: of one clip, its text's keys and values made before."""
    card = CATALOG[case.model]
    config, grid = card.dit_config, card.grid.of(case.shape)
    with torch.device("meta"):
        dit = new_dit(card)
        if case.precision != "fp32" or case.attention != "dense":
            turbo.refit(dit, case.attention, replace(card.sparsity, tuned=case.attention == "sparse"))
        for place, layer in turbo.linears_of_blocks(dit) if case.precision == "int8" else ():
            dit.set_submodule(place, turbo.Int8Linear(layer.in_features, layer.out_features, scheme="rows", bias=True))
        compute_in(dit, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), torch.inference_mode():
        for module in dit.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: torch.empty(tensor.shape, dtype=tensor.dtype)
                                for name, tensor in tensors.items() if tensor is not None})
        patch.setattr(FakeTensor, "is_cuda", True)
        patch.setattr(FakeTensor, "is_cpu", False)
        text = torch.empty(20, config.text_dim)
        context = (dit.embed if hasattr(dit, "embed") else dit.embed_text)([text])
        with Traffic() as traffic:
            dit(torch.empty(1, *grid), torch.empty(1), context)
    return traffic


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_neither_product_nor_attention_moves_few_bytes_and_nothing_is_made_on_the_host(case):
    traffic = traced(case)
    assert sum(traffic.beside().values()) <= case.most_gb * 1e9
    assert traffic.quantised <= case.most_quantised_gb * 1e9
    assert not set(ON_THE_HOST) & set(traffic.calls)    # a CUDA graph could not be recorded


def main() -> None:
    print("forward | GB beside products and attention | of which | quantised by int8_linear | operators")
    for case in CASES:
        traffic = traced(case)
        beside = traffic.beside()
        largest = ", ".join(f"{name} {moved / 1e9:.1f} ({traffic.calls[name]} x)"
                            for name, moved in beside.most_common(6))
        print(f"{case} | {sum(beside.values()) / 1e9:.1f} | {largest} | {traffic.quantised / 1e9:.1f} | "
              f"{sum(traffic.calls.values())}")


if __name__ == "__main__":
    sys.exit(main())
