"""kernels/norm: references against float64, Triton against the references, and what a compiler sees."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from golden import error

from dailies.kernels import cases
from dailies.kernels.int8_linear import Quantized, dequantize
from dailies.kernels.norm import Affine, Update, modulated_norm, rms_norm, rms_rope, rms_rope_halves
from dailies.model.layers import RMSNorm, rotary_table, rotate, rotate_halves

PARTS = {"norm alone": (), "affine": ("gain", "bias"), "modulated": ("scale", "shift"), "residual": ("update",),
         "all": ("update", "gate", "gain", "bias", "scale", "shift")}
SMALL, BATCH, RAGGED, ONE = cases.AWKWARD_TOKENS
FILLED = [(case, kind) for case in (SMALL, BATCH, RAGGED) for kind in cases.FILLS] + [(ONE, "normal")]


def norm_inputs(case, kind, parts, dtype=torch.float32, device="cpu"):
    shapes = {"update": (case.batch, case.tokens, case.width), "gain": (case.width,), "bias": (case.width,)}
    given = {part: cases.fill("normal", shapes.get(part, (case.batch, 1, case.width)), seed, device=device)
             for seed, part in enumerate(parts, 1)}
    if "update" in given:
        given["update"] = given["update"].to(dtype)
    return cases.fill(kind, shapes["update"], 0, dtype, device), given


def around(given):
    """As modulated_norm takes it."""
    affine = Affine(**{part: given[part] for part in Affine._fields if part in given})
    return dict(affine=affine, updates=[Update(given["update"], given.get("gate"))] if "update" in given else [])


def formula(x, update=None, gate=None, gain=None, bias=None, scale=None, shift=None):
    """Stream and y in float64."""
    x, update, gate, gain, bias, scale, shift = (part if part is None else part.double().cpu()
                                                 for part in (x, update, gate, gain, bias, scale, shift))
    stream = x if update is None else x + (1 if gate is None else gate) * update
    centred = stream - stream.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    y = y * (1 if gain is None else gain) + (0 if bias is None else bias)
    return stream, y * (1 if scale is None else 1 + scale) + (0 if shift is None else shift)


def assert_close(got, want, bound):
    """Largest difference over the largest value, or over one where all is nothing."""
    got, want = got.double().cpu(), want.double().cpu()
    assert got.shape == want.shape
    assert (got - want).abs().max().item() <= bound * max(want.abs().max().item(), 1)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("kind", cases.FILLS)
def test_torch_norms_follow_the_float64_formula(kind, parts, impl):
    x, given = norm_inputs(RAGGED if impl == "cpu" else BATCH, kind, parts)
    stream, y = modulated_norm(x, **around(given), impl=impl)
    want_stream, want = formula(x, **given)
    assert_close(stream, want_stream, 1e-7)
    assert_close(y, want, 1e-5)


@pytest.mark.parametrize("case, kind, parts", [
    *((case, kind, "all") for case, kind in FILLED),
    *((BATCH, "large mean", parts) for parts in PARTS if parts != "all")], ids=str)
def test_triton_norm_follows_the_float64_formula(case, kind, parts, triton_device):
    x, given = norm_inputs(case, kind, PARTS[parts], device=triton_device)
    stream, y = modulated_norm(x, **around(given), impl="triton")
    want_stream, want = formula(x, **given)
    assert_close(stream, want_stream, 1e-7)
    assert_close(y, want, 1e-5)


def test_a_16_bit_stream_is_normalised_as_it_is_stored(triton_device):
    x, given = norm_inputs(BATCH, "normal", PARTS["all"], torch.float16, triton_device)
    impls = ("reference", "triton", "cpu") if triton_device == "cpu" else ("reference", "triton")
    wanted = [modulated_norm(x, **around(given), output=torch.float32, impl=impl) for impl in impls]
    for stream, y in wanted:
        assert torch.equal(stream.cpu(), wanted[0][0].cpu()) and stream.dtype == torch.float16
        assert_close(y, wanted[0][1], 1e-6)
    del given["update"], given["gate"]
    again = modulated_norm(wanted[0][0], **around(given), output=torch.float32, impl="reference")[1]
    assert_close(wanted[0][1], again, 0)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("scheme", ["rows", "blocks"])
@pytest.mark.parametrize("case, kind", FILLED, ids=str)
def test_a_norm_is_quantised_as_the_reference_does_it(case, kind, scheme, impl, triton_device):
    x, given = norm_inputs(case, kind, PARTS["all"], device=triton_device if impl == "triton" else "cpu")
    stream, got = modulated_norm(x, **around(given), output=scheme, impl=impl)
    want_stream, want = modulated_norm(x, **around(given), output=scheme, impl="reference")
    assert_close(stream, want_stream, 1e-7)
    torch.testing.assert_close(got.scales, want.scales, rtol=1e-5, atol=1e-10)
    difference = (got.values.int() - want.values.int()).abs()
    # halves may be rounded either way
    assert difference.max() <= 1 and difference.sum() <= 1 + difference.numel() // 1000


@pytest.mark.parametrize("scheme, bound", [("rows", 0.5 / 127), ("blocks", 1 / 128)])
def test_a_quantised_norm_is_the_norm_within_half_a_step(scheme, bound):
    """In blocks within one step: their largest positive value is cut from 128 to 127."""
    x, given = norm_inputs(RAGGED, "normal", PARTS["all"])
    y = modulated_norm(x, **around(given), impl="reference")[1]
    quantised = modulated_norm(x, **around(given), output=scheme, impl="reference")[1]
    assert error(dequantize(quantised), y) <= bound * 1.001


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_update_that_is_given_again_and_joins_later_leaves_the_same_stream_and_norms(dtype, impl, triton_device):
    device = triton_device if impl == "triton" else "cpu"
    x, given = norm_inputs(BATCH, "normal", PARTS["all"], dtype, device)
    update, gate = (given.pop(part) for part in ("update", "gate"))
    first, second = Update(update, gate), Update(update.flip(-1).contiguous())
    for output in (None, "rows", "blocks"):
        norm = partial(modulated_norm, affine=around(given)["affine"], output=output, impl=impl)
        stream, y = norm(x, updates=[first])
        both, z = norm(stream, updates=[second])
        same, late_y = norm(x, updates=[first], keep=False)
        late_both, late_z = norm(x, updates=[first, second])
        assert same is x and late_both.dtype == dtype
        assert_close(late_both, both, 1e-6 if dtype == torch.float32 else 1e-3)
        for got, want in ((late_y, y), (late_z, z)):
            if output is None:
                assert_close(got, want, 1e-6 if dtype == torch.float32 else 1e-3)
            else:
                torch.testing.assert_close(got.scales, want.scales, rtol=1e-5, atol=1e-8)
                assert (got.values.int() - want.values.int()).abs().max() <= 1


def test_rows_of_zeros_and_constants_become_zeros():
    x = torch.zeros(1, 3, 64)
    x[0, 1] = 5
    for scheme in ("rows", "blocks"):
        assert not modulated_norm(x, output=scheme)[1].values.any()


def rope_inputs(case, dtype=torch.float32, device="cpu"):
    q, k, _ = cases.fill("normal", (case.batch, case.tokens, 3 * case.width), 0, dtype, device).chunk(3, dim=-1)
    gains = [1 + cases.fill("normal", (case.width,), seed, device=device) for seed in (1, 2)]
    rope = rotary_table((case.tokens, 1, 1), case.width // case.heads, device)
    return q, k, *gains, rope


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("case", cases.AWKWARD_TOKENS, ids=str)
def test_rms_rope_turns_complex_numbers(case, impl, triton_device):
    """The float64 formula: each pair of channels is a complex number, turned by multiplying with cos + i sin."""
    q, k, q_gain, k_gain, rope = rope_inputs(case, device=triton_device if impl == "triton" else "cpu")
    got = rms_rope(q, k, q_gain, k_gain, rope, heads=case.heads, impl=impl)
    for x, gain, y in ((q, q_gain, got[0]), (k, k_gain, got[1])):
        x, gain, cos, sin = (part.double().cpu() for part in (x, gain, *rope))
        x = F.rms_norm(x, x.shape[-1:], gain, eps=1e-6).unflatten(-1, (case.heads, -1, 2))
        want = torch.view_as_real(torch.view_as_complex(x.contiguous()) * torch.complex(cos, sin)).flatten(-2)
        assert_close(y, want, 1e-6)


def test_rms_rope_is_what_the_models_do():
    case = RAGGED
    q, k, q_gain, k_gain, rope = rope_inputs(case)
    got = rms_rope(q, k, q_gain, k_gain, rope, heads=case.heads)
    for x, gain, y in ((q, q_gain, got[0]), (k, k_gain, got[1])):
        norm = RMSNorm(case.width)
        norm.weight.data = gain
        assert_close(y, rotate(norm(x).unflatten(-1, (case.heads, -1)), rope), 1e-6)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("case, kind", FILLED, ids=str)
def test_rms_norm_follows_the_float64_formula(case, kind, impl, triton_device):
    device = triton_device if impl == "triton" else "cpu"
    x = cases.fill(kind, (case.batch, case.tokens, 2 * case.width), 0, device=device)[..., :case.width]     # strided
    gain = 1 + cases.fill("normal", (case.width,), 1, device=device)
    want = F.rms_norm(x.double().cpu(), (case.width,), gain.double().cpu(), eps=1e-6)
    assert_close(rms_norm(x, gain, impl=impl), want, 1e-6)
    half = rms_norm(x.half(), gain, impl=impl)
    assert half.dtype == torch.float16 and half.is_contiguous()
    assert_close(half, F.rms_norm(x.half().double().cpu(), (case.width,), gain.double().cpu(), eps=1e-6), 1e-3)


@pytest.mark.parametrize("rows", [2, 4])
def test_a_program_of_several_rows_says_what_one_of_one_row_says(rows, triton_device, monkeypatch):
    """Ragged: some rows of the last program of a sample are another's, or nobody's."""
    from dailies.kernels.norm import kernel
    x, given = norm_inputs(BATCH, "large mean", PARTS["all"], device=triton_device)
    q, k, q_gain, k_gain, rope = rope_inputs(BATCH, device=triton_device)

    def results():
        yield from modulated_norm(x, **around(given), impl="triton")
        for scheme in ("rows", "blocks"):
            stream, (values, scales) = modulated_norm(x, **around(given), output=scheme, impl="triton")
            yield from (stream, dequantize(Quantized(values, scales)) if scheme == "rows" else scales)
        yield from rms_rope(q, k, q_gain, k_gain, rope, heads=BATCH.heads, impl="triton")
        yield rms_norm(q, q_gain, impl="triton")

    want = list(results())
    monkeypatch.setattr(kernel, "rows_and_warps", lambda block: (rows, 4))
    for got, wanted in zip(results(), want, strict=True):
        assert_close(got, wanted, 1e-6)


def test_norms_compile_in_one_graph(triton_device):
    x, given = norm_inputs(SMALL, "normal", PARTS["all"], device=triton_device)
    q, k, q_gain, k_gain, rope = rope_inputs(SMALL, device=triton_device)

    def link(x, impl):
        stream, y = modulated_norm(x, **around(given), impl=impl)
        _, (values, scales) = modulated_norm(stream, Affine(scale=given["scale"]), output="rows", impl=impl)
        turned = rms_rope(q, k, q_gain, k_gain, rope, heads=1, dtype=torch.float16, impl=impl)
        return stream, y, values, scales, *turned, rms_norm(q, q_gain, impl=impl)

    for impl in ("reference", "cpu", "triton") if triton_device == "cpu" else ("reference", "triton"):
        compiled = torch.compile(link, fullgraph=True, backend="aot_eager")
        for got, want in zip(compiled(x, impl), link(x, impl), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_the_operators_are_what_they_say_to_a_compiler(impl, triton_device):
    device = triton_device if impl == "triton" else "cpu"
    x, given = norm_inputs(SMALL, "normal", PARTS["all"], device=device)
    affine, update = around(given)["affine"], (given["update"], given["gate"])
    for output in ("float16", "rows", "blocks"):
        if impl == "cpu" and output == "blocks":       # there the reference
            continue
        how = 1e-6, output, impl
        torch.library.opcheck(torch.ops.dailies.modulated_norm, (x, update, affine, True, *how))
        for updates, keep in (((x, None, *update), True), ((x, given["gate"], *update), False), (update, False)):
            torch.library.opcheck(torch.ops.dailies.modulated_norm, (x, updates, affine, keep, *how),
                                  test_utils="test_faketensor")
    q, k, q_gain, k_gain, rope = rope_inputs(SMALL, device=device)
    torch.library.opcheck(torch.ops.dailies.rms_rope, (q, k, q_gain, k_gain, *rope, 1, 1e-6, torch.float16, impl))
    torch.library.opcheck(torch.ops.dailies.rms_norm, (q, q_gain, 1e-6, torch.float16, impl))


def test_what_does_not_fit_is_refused_by_name():
    x = torch.zeros(2, 3, 64)
    with pytest.raises(ValueError, match=r"needs scale \[2, 1, 64\].*got \[2, 64\]"):
        modulated_norm(x, Affine(scale=torch.zeros(2, 64)))
    with pytest.raises(ValueError, match="contiguous"):
        modulated_norm(x.transpose(0, 1))
    with pytest.raises(ValueError, match=r"needs second update's gate \[2, 1, 64\].*got \[2, 64\]"):
        modulated_norm(x, updates=[Update(x), Update(x, torch.zeros(2, 64))])
    with pytest.raises(ValueError, match="joins at most two updates; got 3"):
        modulated_norm(x, updates=[Update(x)] * 3)
    with pytest.raises(ValueError, match="impl must be auto, reference, cpu, triton, .* got torch for one on cpu"):
        modulated_norm(x, impl="torch")
    with pytest.raises(ValueError, match=r"needs x .*float64"):
        modulated_norm(x.double())
    with pytest.raises(ValueError, match=r"needs cos \[3, 1, 32\].*got \[3, 1, 16\]"):
        rms_rope(x, x, torch.ones(64), torch.ones(64), (torch.zeros(3, 1, 16),) * 2, heads=1)
    with pytest.raises(ValueError, match=r"needs gain \[64\].*got \[32\]"):
        rms_norm(x, torch.ones(32))


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.RENDERED_TOKENS, ids=str)
def test_norms_of_rendered_shapes_in_bf16(case):
    x, given = norm_inputs(case, "large mean", PARTS["all"], torch.bfloat16, "cuda")
    got, want = (modulated_norm(x, **around(given), impl=impl) for impl in ("triton", "reference"))
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1.6e-2, atol=1e-2)       # two units of bf16
    got, want = (modulated_norm(x, **around(given), output="rows", impl=impl)[1] for impl in ("triton", "reference"))
    torch.testing.assert_close(got.scales, want.scales, rtol=1e-5, atol=1e-10)
    assert (got.values.int() - want.values.int()).abs().max() <= 1
    q, k, q_gain, k_gain, rope = rope_inputs(case, torch.bfloat16, "cuda")
    both = (rms_rope(q, k, q_gain, k_gain, rope, heads=case.heads, impl=impl) for impl in ("triton", "reference"))
    for got, want in zip(*both, strict=True):
        torch.testing.assert_close(got, want, rtol=1.6e-2, atol=1e-2)
    got, want = (rms_norm(q, q_gain, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(got, want, rtol=1.6e-2, atol=1e-2)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("output", [None, "rows"])
def test_a_norm_that_leaves_the_mean_is_the_rms_norm(output, impl, triton_device):
    device = triton_device if impl == "triton" else "cpu"
    for parts in PARTS.values():
        x, given = norm_inputs(BATCH, "large mean", parts, device=device)
        stream, y = modulated_norm(x, **around(given), output=output, centred=False, impl=impl)
        want_stream, _ = formula(x, **given)
        scaled = want_stream / (want_stream.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        given = {part: value.double().cpu() for part, value in given.items()}
        want = scaled * given.get("gain", 1) + given.get("bias", 0)
        want = want * (1 + given.get("scale", 0)) + given.get("shift", 0)
        assert_close(stream, want_stream, 1e-7)
        assert_close(dequantize(y) if output else y, want, 0.5 / 127 * 1.01 if output else 1e-5)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_halves_of_a_head_are_turned_by_the_heads_own_angles(dtype, bound, impl, triton_device):
    device, heads, half = triton_device if impl == "triton" else "cpu", 3, 10
    torch.manual_seed(1)
    x, gain, angles = torch.randn(2, 37, heads * 2 * half), torch.randn(heads * 2 * half), torch.randn(37, heads, half)
    norm = RMSNorm(heads * 2 * half)
    norm.weight.data = gain
    want = rotate_halves(norm(x.to(dtype).float()).unflatten(-1, (heads, -1)), (angles.cos(), angles.sin()))
    given = [tensor.to(device) for tensor in (x.to(dtype), gain, angles.cos(), angles.sin())]
    got = rms_rope_halves(given[0], given[1], (given[2], given[3]), heads=heads, impl=impl)
    assert got.dtype == dtype
    assert_close(got, want, bound)
    with pytest.raises(ValueError, match="rms_rope_halves needs cos"):
        rms_rope_halves(given[0], given[1], (given[2][:5], given[3]), heads=heads, impl=impl)
