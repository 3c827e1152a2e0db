"""dailies bench kernels: every line of it, at tiny size and without waiting for good times."""

import math

import pytest
import torch

from jobs import bench_kernels
from kernels import cases

TOKENS = cases.Tokens(tokens=5, width=64, heads=1)
LAYERS = cases.layers_of_block(40, 64, 96)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bench_kernels, "SECONDS", 0)
    monkeypatch.setattr(bench_kernels, "roof", lambda kind, device: 1e12)


@torch.inference_mode()
def test_every_line_compares_and_has_its_figures(quick):
    lines = [*bench_kernels.norms(TOKENS, "cpu"), *bench_kernels.packed_layers(*LAYERS),
             *(line for layer in LAYERS for line in bench_kernels.layers(layer, "cpu"))]
    assert len(lines) == 8 and len({name for name, _ in lines}) == 8
    for _, figures in lines:
        assert "dailies, ms" in figures and any(name.startswith("of torch") for name in figures)
        assert all(math.isfinite(figure) and figure > 0 for figure in figures.values())


def test_a_rival_with_other_results_is_an_error(quick):
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="wrong differs by 1, more than 0.01"):
        bench_kernels.against("x", "cpu", 1, "bytes", {"dailies": lambda: x, "wrong": lambda: 2 * x})
