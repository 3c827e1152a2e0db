"""kernels/norm as it runs on a CPU, a few rows at a time: it follows the formula and the references over all cases."""

import pytest
import torch
from test_kernels_norm import BATCH, FILLED, PARTS, around, assert_close, formula, norm_inputs, rope_inputs

from dailies.kernels import cases
from dailies.kernels.norm import modulated_norm, rms_norm, rms_rope


@pytest.mark.parametrize("case, kind, parts", [
    *((case, kind, "all") for case, kind in FILLED),
    *((BATCH, "large mean", parts) for parts in PARTS if parts != "all")], ids=str)
def test_the_norm_in_pieces_follows_the_float64_formula(case, kind, parts):
    x, given = norm_inputs(case, kind, PARTS[parts])
    stream, y = modulated_norm(x, **around(given), impl="cpu")
    want_stream, want = formula(x, **given)
    assert_close(stream, want_stream, 1e-6)
    assert_close(y, want, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stream_in_low_precision_is_rounded_once_as_in_the_reference(dtype):
    x, given = norm_inputs(BATCH, "normal", PARTS["all"], dtype)
    (stream, y), (want_stream, want) = (modulated_norm(x, **around(given), impl=impl) for impl in ("cpu", "reference"))
    assert stream.dtype == y.dtype == dtype
    assert_close(stream, want_stream, 0)
    assert_close(y, want, torch.finfo(dtype).eps)


@pytest.mark.parametrize("scheme", ["rows", "blocks"])
def test_int8_values_are_the_references_but_for_ties(scheme):
    x, given = norm_inputs(BATCH, "normal", PARTS["all"])
    (_, got), (_, want) = (modulated_norm(x, **around(given), output=scheme, impl=impl)
                           for impl in ("cpu", "reference"))
    assert_close(got.scales, want.scales, 1e-6)
    difference = (got.values.int() - want.values.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


@pytest.mark.parametrize("case", cases.AWKWARD_TOKENS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_rope_in_pieces_follows_the_reference_and_leaves_its_input(case, dtype):
    q, k, q_gain, k_gain, rope = rope_inputs(case)
    q, k = q.to(dtype), k.to(dtype)
    before = q.clone()
    got = rms_rope(q, k, q_gain, k_gain, rope, heads=case.heads, impl="cpu")
    for ours, want in zip(got, rms_rope(q, k, q_gain, k_gain, rope, heads=case.heads, impl="reference"), strict=True):
        assert ours.dtype == dtype
        assert_close(ours, want, 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert torch.equal(q, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_in_pieces_follows_the_formula(dtype):
    x, gain = cases.fill("large mean", (2, 67, 48), 1, dtype), torch.randn(48)
    want = x.double() / x.double().square().mean(-1, keepdim=True).add(1e-6).sqrt() * gain.double()
    got = rms_norm(x, gain, impl="cpu")
    assert got.dtype == dtype
    assert_close(got, want, torch.finfo(dtype).eps * 4)
