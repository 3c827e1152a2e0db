"""dailies bench model NAME: both transformers have the same weights and give the same."""

from dataclasses import replace

import pytest
from wan_tiny import TINY_DIT, WAN_TINY

from dailies.jobs.bench import dit as bench_dit
from dailies.jobs.bench import kernels as bench_kernels
from dailies.jobs.cli import main
from dailies.model.catalog import CATALOG


@pytest.fixture
def quick(monkeypatch):
    like_the_peer = TINY_DIT | dict(width=64, time_features=256, text_dim=4096, text_len=512)
    monkeypatch.setitem(CATALOG, "wan-tiny", replace(WAN_TINY, dit_fields=like_the_peer))
    monkeypatch.setattr(bench_dit, "CPU_GRID", (2, 8, 12))
    monkeypatch.setattr(bench_dit, "REPEATS", 1)
    monkeypatch.setattr(bench_kernels, "SECONDS", 0.0)


def test_a_forward_is_timed_against_diffusers_with_the_same_weights(quick):
    pytest.importorskip("diffusers", reason="needs diffusers, the peer: make test installs it")
    rows = list(bench_dit.rows("wan-tiny"))
    assert len(rows) == len(bench_dit.WAYS)
    for name, figures in rows:
        assert "2 blocks, 48 tokens" in name and figures["ms"] > 0 and figures["diffusers bf16 ms"] > 0
        assert figures["relative difference"] < (1 if "sparse" in name else 0.05), name


def test_where_diffusers_is_not_installed_ours_are_timed_alone(quick, monkeypatch):
    monkeypatch.setattr(bench_dit, "find_spec", lambda name: None)
    rows = list(bench_dit.rows("wan-tiny"))
    assert len(rows) == len(bench_dit.WAYS)
    for name, figures in rows:
        assert figures["ms"] > 0 and figures["diffusers"] == "not timed: it is not installed"
        assert figures["relative difference from ours in bf16"] < (1 if "sparse" in name else 0.05), name


@pytest.mark.parametrize("arguments, said", [
    (["demo", "--random-weights"], "text-to-video transformer of Wan: wan2.1-t2v-1.3b, "),
    (["wan2.1-t2v-1.3b"], "with random weights: dailies bench")])
def test_what_cannot_be_compared_is_refused(arguments, said, capsys):
    assert main(["bench", "model", *arguments]) == 2
    assert said in capsys.readouterr().err
