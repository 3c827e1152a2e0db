"""tests/candidates: the program that times them, what nothing may import, and every candidate against a reference."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_house import ROOT, imported, modules
from test_kernels_sparse_attention import projection, rms

from dailies.kernels import cases
from dailies.kernels.int8_attention import reference as dense
from dailies.kernels.sparse_attention import reference

WAYS = {"one at a time": {}, "ahead": dict(ahead=True), "wide": dict(wide=2), "unrolled": dict(unroll=2),
        "descriptors": dict(descriptors=True), "unrolled, descriptors": dict(descriptors=True, unroll=2),
        "overlapped": dict(overlap=True), "overlapped, wide": dict(overlap=True, wide=2),
        "overlapped, descriptors": dict(descriptors=True, overlap=True), "shared": dict(share=2, overlap=True)}
RAGGED = [*cases.AWKWARD_ATTENTION, cases.Attention(batch=2, queries=150, keys=300, heads=2, head_dim=64)]
BOUND = {torch.float32: 1e-5, torch.float16: 1e-3}


def test_the_candidates_are_listed_and_nothing_that_is_shipped_imports_them(triton_device):
    from tests.candidates.lists import everything
    for tiny in (False, True):
        names = [(each.case.name, each.name) for each in everything(tiny=tiny)]
        assert len(set(names)) == len(names)
        assert {case.split(":")[0] for case, _ in names} == {"attention", "conv"}
        assert {case for case, name in names if name == "today"} == {case for case, _ in names if "alone" not in case}
    assert not [path for path in modules() for name, _ in imported(path) if name.split(".")[0] == "tests"]


def program(*args):
    done = subprocess.run([sys.executable, "-m", "tests.candidates", *map(str, args)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_the_program_finds_every_candidate_right(tmp_path, triton_device):
    program("--tiny", "--budget", 3600, "--out", tmp_path / "lines")
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert len(lines) > 50
    assert not [line for line in lines if not line.get("right")]


@pytest.mark.slow
@pytest.mark.parametrize("only", ["linear branch overlap tma s5", "residual shared rows 2x64 w4 s3"])
def test_candidates_compile_for_sm_90(only, tmp_path, triton_device, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    program("--only", only, "--compile", 0, 1, tmp_path)
    assert (tmp_path / "0").exists() and list((tmp_path / "cache").rglob("*.cubin"))


# ---------------------------------------------------------------- attention

@pytest.mark.slow
@pytest.mark.parametrize("int8, dtype, linear", [(False, torch.float32, False), (True, torch.float16, True)], ids=str)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_every_way_through_the_kept_blocks_gives_the_reference(case, way, int8, dtype, linear, triton_device):
    from dailies.kernels.sparse_attention import kernel
    from tests.candidates import attention
    q, k, v = case.inputs("large mean", seed=5, dtype=dtype, device=triton_device)
    kept = reference.kept_blocks(reference.pool_blocks(q, 128), reference.pool_blocks(k, 64), 0.5)
    want, branch = reference.attend_kept_blocks(q, k, v, kept, int8, 128, 64), None
    if linear:
        weight, bias = projection(case.head_dim, triton_device)
        branch = (*kernel.projected_summary(k, v, weight), bias)
        want = want + F.linear(reference.linear_attention(q, k, v), weight, bias)
    got = attention.attend(q, k, v, kept, branch, int8, 128, 64, attention.Tiling(**way))
    assert got.dtype == dtype
    assert rms(got, want) < BOUND[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_every_way_through_all_blocks_gives_the_reference(case, way, triton_device):
    from tests.candidates import attention
    q, k, v = case.inputs("large mean", seed=6, dtype=torch.float16, device=triton_device)
    assert rms(attention.int8_attention(q, k, v, attention.Tiling(**way)), dense.int8_attention(q, k, v)) < 1e-3


@pytest.mark.slow
def test_the_rows_of_a_block_may_lie_in_a_wider_matrix(triton_device):
    from tests.candidates import attention
    both = cases.fill("normal", (1, 130, 3 * 2 * 64), seed=7, dtype=torch.float16, device=triton_device)
    q, k, v = both.unflatten(-1, (3, 2, 64)).unbind(2)
    kept = reference.kept_blocks(reference.pool_blocks(q, 128), reference.pool_blocks(k, 64), 0.7)
    got = attention.attend(q, k, v, kept, None, False, 128, 64, attention.Tiling(descriptors=True))
    assert attention.lies_in_rows(k) and rms(got, reference.attend_kept_blocks(q, k, v, kept, False, 128, 64)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("keep_ratio", [0.05, 0.1, 0.5, 1])
@pytest.mark.parametrize("blocks", [1, 7, 300])
def test_the_chosen_blocks_are_those_with_the_largest_scores(blocks, keep_ratio, triton_device):
    from tests.candidates import attention
    pooled_q, pooled_k = (cases.fill("normal", (2, 2, count, 16), seed, device=triton_device)
                          for count, seed in ((3, 8), (blocks, 9)))
    got, want = (choose(pooled_q, pooled_k, keep_ratio) for choose in (attention.kept_blocks, reference.kept_blocks))
    assert got.dtype == torch.int32 and torch.equal(got, want)


@pytest.mark.slow
def test_of_equal_scores_the_first_blocks_are_chosen(triton_device):
    from tests.candidates import attention
    pooled_q, pooled_k = torch.ones(1, 1, 2, 16, device=triton_device), torch.ones(1, 1, 10, 16, device=triton_device)
    pooled_k[0, 0, 8:] = 2
    assert attention.kept_blocks(pooled_q, pooled_k, 0.5).tolist() == [[[[0, 1, 2, 8, 9]] * 2]]


# ---------------------------------------------------------------- convolutions

# channels in and out, taps, clips, frames, rows, columns: more than one tile of 2 x 64 pixels, and less; channels that
# are no power of two, that DEPTH does not divide, and that the copy engine cannot address; channels out in two
# products, in more parts than one, and fewer than a product makes
CONVS = [(96, 96, (2, 3, 3), 1, 1, 3, 69), (24, 3, (3, 3, 3), 2, 2, 3, 7), (6, 20, (3, 3, 3), 1, 2, 3, 5),
         (32, 192, (1, 3, 3), 1, 3, 4, 4), (40, 48, (2, 1, 3), 1, 1, 3, 65), (64, 384, (3, 1, 1), 1, 1, 1, 1)]
UNITS = {torch.float32: 2e-6, torch.float16: 2 ** -11}


def inside(shape, dtype, device):
    """A clip of NaN between frames and rows that are NaN, and the room that it lies in."""
    batch, channels, frames, height, width = shape
    room = torch.full((batch, channels, frames + 3, height + 2, width), torch.nan, dtype=dtype, device=device)
    room = room.contiguous(memory_format=torch.channels_last_3d)
    return room, room[:, :, 2:-1, 1:-1]


def conv_inputs(case, dtype, device):
    """Window, weight, bias, residual; and out, all NaN, with the room that it lies in."""
    channels, outputs, kernel, batch, frames, height, width = case
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(outputs, channels, *kernel, generator=draw).to(device, dtype) / 8
    bias = torch.randn(outputs, generator=draw).to(device)
    made = (batch, outputs, frames, height, width)
    window, residual = (inside(shape, dtype, device)[1].copy_(torch.randn(shape, generator=draw))
                        for shape in ((batch, channels, frames + kernel[0] - 1, height, width), made))
    return window, weight.contiguous(memory_format=torch.channels_last_3d), bias, residual, *inside(made, dtype, device)


def formula(window, weight, bias=None, residual=None):
    y = F.conv3d(*(None if x is None else x.double().cpu() for x in (window, weight, bias)),
                 padding=(0, weight.shape[3] // 2, weight.shape[4] // 2))
    return y if residual is None else y + residual.double().cpu()


def assert_made(room, out, want):
    """want lies in out within a rounding, and nothing beside it: what was NaN there still is."""
    torch.testing.assert_close(out.double().cpu(), want, rtol=1.01 * UNITS[out.dtype], atol=2e-5)
    outside = torch.ones_like(room, dtype=torch.bool)
    outside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(False)
    assert room[outside].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_a_window_is_convolved_as_torch_does_it_in_float64(case, dtype, triton_device):
    from tests.candidates.causal_conv import Tiling, causal_conv
    window, weight, bias, residual, room, out = conv_inputs(case, dtype, triton_device)
    assert causal_conv(window, weight, bias, residual, out, Tiling()) is out
    assert_made(room, out, formula(window, weight, bias, residual))
    assert_made(room, causal_conv(window, weight, None, None, out.fill_(torch.nan), Tiling()), formula(window, weight))


@pytest.mark.slow
@pytest.mark.parametrize("tiling", [dict(rows=1, columns=128, rest=0), dict(rows=4, first=32, rest=16),
                                    dict(first=128, rest=0, depth=64, group=1), dict(descriptors=False),
                                    dict(rows=1, descriptors=False, first=32, rest=0, depth=16, group=3)], ids=str)
def test_the_tiles_decide_nothing(tiling, triton_device):
    from tests.candidates.causal_conv import Tiling, causal_conv
    window, weight, bias, residual, room, out = conv_inputs(CONVS[4], torch.float16, triton_device)
    causal_conv(window, weight, bias, residual, out, replace(Tiling(), **tiling))
    assert_made(room, out, formula(window, weight, bias, residual))


@pytest.mark.slow
def test_the_residual_may_be_written_over_and_weights_lie_anyhow(triton_device):
    from tests.candidates.causal_conv import Tiling, causal_conv
    window, weight, bias, residual, _, out = conv_inputs(CONVS[2], torch.float32, triton_device)
    want = causal_conv(window, weight, bias, residual, out, Tiling()).clone()
    assert torch.equal(causal_conv(window, weight.contiguous(), bias, residual, residual, Tiling()), want)


@pytest.mark.slow
def test_nan_stays_where_the_taps_see_it(triton_device):
    from tests.candidates.causal_conv import Tiling, causal_conv
    window, weight, bias, _, _, out = conv_inputs((16, 16, (3, 3, 3), 1, 2, 7, 7), torch.float32, triton_device)
    window[0, 5, 1, 3, 3] = torch.nan
    seen = causal_conv(window, weight, bias, None, out, Tiling()).isnan().cpu()
    assert seen[:, :, :2, 2:5, 2:5].all() and seen.sum() == 2 * 9 * 16
