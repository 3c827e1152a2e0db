"""dailies bench kernels: every line of it, at tiny size and without waiting for good times."""

import math

import pytest
import torch

from dailies.jobs.bench import kernels as bench_kernels
from dailies.kernels import cases

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
    assert len(lines) == 9 and len({name for name, _ in lines}) == 9
    for _, figures in lines:
        assert "dailies, ms" in figures and any(name.startswith("of torch") for name in figures)
        assert all(math.isfinite(figure) and figure > 0 for figure in figures.values())


def fails(*_, **__):
    raise ValueError("no such shape")


def test_a_rival_with_other_results_or_none_costs_that_rival(quick):
    x = torch.ones(3)
    name, figures = bench_kernels.against("x", "cpu", 1, "bytes", {
        "dailies": lambda: x, "wrong": lambda: 2 * x, "lost": lambda: x * math.nan, "right": lambda: x, "none": fails})
    assert figures.keys() == {"dailies, ms", "right, ms", "of right", "roof (bytes)", "wrong", "lost", "none"}
    assert figures["wrong"] == "differs by 1, more than 0.01" and figures["lost"] == "differs by nan, more than 0.01"
    assert figures["none"] == "failed: ValueError: no such shape"


def test_what_fails_of_ours_costs_a_line_and_not_the_bench(quick, monkeypatch):
    monkeypatch.setattr(cases, "CPU_TOKENS", TOKENS)
    monkeypatch.setattr(cases, "CPU_LAYERS", LAYERS)
    monkeypatch.setattr(cases, "CPU_ATTENTION", cases.Attention(queries=70, keys=70, heads=1, head_dim=64))
    monkeypatch.setattr(bench_kernels, "rms_rope", fails)
    monkeypatch.setattr(bench_kernels, "packed_layers", lambda *_: (fails() for _ in range(1)))
    lines = dict(bench_kernels.rows())
    failed = [name for name, figures in lines.items() if figures.get("failed") == "ValueError: no such shape"]
    assert failed == ["RMS norm, rotary of q and k 1x5x64", "int8 layers, packed"]
    assert len(lines) == 4 + 3 + 1 + 5 and all("dailies, ms" in lines[name] for name in lines if name not in failed)
