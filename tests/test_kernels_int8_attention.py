"""kernels/int8_attention: the release, float64, Triton and torch._int_mm against the reference, a compiler."""

import pytest
import torch
from golden import Golden, error

from dailies.kernels import cases
from dailies.kernels.int8_attention import int8_attention, reference

CASES = [(case, kind) for case in cases.AWKWARD_ATTENTION for kind in cases.FILLS]

# Triton's interpreter has no bf16 product. A device gets bf16 alone: it is what runs there, and fp32, with three
# products for one, takes many times as long to compile.
DTYPES = ([(torch.bfloat16, 8e-3)] if torch.cuda.is_available() else
          [(torch.float32, 1e-5), (torch.float16, 1e-3)])
DTYPE, EXACT = (torch.bfloat16, 8e-3) if torch.cuda.is_available() else (torch.float32, 2e-6)


def attention64(q, k, v):
    """softmax(q k^T / sqrt(d)) v in float64."""
    logits = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v.double())


def rms(got, want):
    """Root mean square of the difference over that of what is wanted."""
    assert got.shape == want.shape
    got, want = got.double().cpu(), want.double().cpu()
    return ((got - want).square().mean() / want.square().mean()).sqrt().item()


def test_the_reference_is_the_release():
    golden = Golden("sage_qk_int8_a")
    q, k, v = (golden.inputs[name].transpose(1, 2) for name in "qkv")
    factor = q.shape[-1] ** -0.5 * reference.LOG2_E
    for name, (values, scale) in {"q": reference.quantize_row_blocks(q, 128, reference.EPS, factor),
                                  "k": reference.quantize_row_blocks(reference.smooth_keys(k), 64,
                                                                     reference.EPS)}.items():
        assert torch.equal(values, golden.outputs[f"{name}_int8"])
        torch.testing.assert_close(scale, golden.outputs[f"{name}_scale"], rtol=1e-5, atol=0)
    for impl in ("reference", "cpu"):
        out = int8_attention(q, k, v.float(), impl=impl).transpose(1, 2)
        assert error(out, golden.outputs["o_float32"]) < 1e-4
        out = int8_attention(q, k, v.half(), impl=impl).transpose(1, 2)
        assert error(out, golden.outputs["o_kernel_fp16"]) < golden.tolerance["o_kernel_fp16"]


@pytest.mark.parametrize("kind", cases.FILLS)
def test_eight_bits_stay_close_to_float64_attention_however_large_the_mean_of_k(kind):
    q, k, v = cases.AWKWARD_ATTENTION[3].inputs(kind, seed=1)
    bound = {"constant rows": 5e-2, "outlier channel": 0.4}.get(kind, 2e-2)      # a channel of 100 leaves others a bit
    assert rms(int8_attention(q, k, v, impl="reference"), attention64(q, k, v)) < bound


def test_a_block_is_rounded_to_half_a_step_and_its_last_rows_have_a_scale_of_their_own():
    x = cases.fill("normal", (2, 129, 3 * 64), seed=2).unflatten(-1, (3, 64))
    x[:, 128] *= 50                                                              # alone in the second block
    values, scale = reference.quantize_row_blocks(x, 128, reference.EPS)
    assert values.shape == (2, 3, 129, 64) and scale.shape == (2, 3, 2)
    amax = torch.stack((x[:, :128].abs().amax((1, 3)), x[:, 128:].abs().amax((1, 3))), dim=-1)
    torch.testing.assert_close(scale, amax / 127)
    step = scale.repeat_interleave(128, -1)[..., :129, None]
    assert ((values * step - x.transpose(1, 2)).abs() <= 0.5001 * step).all()
    assert not reference.quantize_row_blocks(torch.zeros(1, 5, 1, 64), 128, reference.EPS)[0].any()


@pytest.mark.cpu
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)], ids=str)
@pytest.mark.parametrize("case, kind", CASES, ids=str)
def test_int_mm_follows_the_reference(case, kind, dtype, bound):
    q, k, v = case.inputs(kind, seed=3, dtype=dtype)
    assert rms(int8_attention(q, k, v, impl="cpu"), int8_attention(q, k, v, impl="reference")) < bound


@pytest.mark.parametrize("dtype, bound", DTYPES, ids=str)
@pytest.mark.parametrize("case, kind", CASES, ids=str)
def test_triton_follows_the_reference(case, kind, dtype, bound, triton_device):
    q, k, v = case.inputs(kind, seed=4, dtype=dtype, device=triton_device)
    assert rms(int8_attention(q, k, v, impl="triton"), int8_attention(q, k, v, impl="reference")) < bound


@pytest.mark.parametrize("kind", cases.FILLS)
def test_triton_rounds_to_the_reference_s_integers(kind, triton_device):
    from dailies.kernels.int8_attention import kernel
    _, k, _ = cases.AWKWARD_ATTENTION[2].inputs(kind, seed=5, device=triton_device)
    mean = kernel.key_mean(k)
    torch.testing.assert_close(k - mean[:, None], reference.smooth_keys(k))
    values, scale = (part.cpu() for part in kernel.quantize_row_blocks(k, 64, reference.EPS, mean=mean))
    # of the same mean, on the CPU: a GPU's torch divides by a number as it multiplies by its inverse
    want_values, want_scale = reference.quantize_row_blocks((k - mean[:, None]).cpu(), 64, reference.EPS)
    assert torch.equal(values, want_values)
    torch.testing.assert_close(scale, want_scale)


def test_parts_of_a_fused_projection_are_taken_as_they_lie(triton_device):
    fused = cases.fill("normal", (2, 70, 3 * 2 * 64), seed=6, dtype=DTYPE, device=triton_device)
    q, k, v = fused.unflatten(-1, (3, 2, 64)).unbind(2)
    for impl in ("reference", "cpu", "triton") if triton_device == "cpu" else ("triton",):
        got = int8_attention(q, k, v, impl=impl)
        assert got.is_contiguous()
        assert torch.equal(got, int8_attention(q.contiguous(), k.contiguous(), v.contiguous(), impl=impl))


def test_a_clip_does_not_depend_on_its_batch():
    q, k, v = cases.AWKWARD_ATTENTION[2].inputs("normal", seed=7)
    together = int8_attention(q, k, v)
    assert torch.equal(together[1:], int8_attention(q[1:], k[1:], v[1:]))


def test_one_graph_holds_it_and_the_op_is_what_it_declares():
    q, k, v = cases.AWKWARD_ATTENTION[1].inputs("normal", seed=8)

    def layer(q, k, v):
        return int8_attention(q * 2, k, v).flatten(2) + 1
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v), layer(q, k, v))
    torch.library.opcheck(torch.ops.dailies.int8_attention.default, (q, k, v, "cpu"))


@pytest.mark.parametrize("change, said", [
    (lambda q, k, v: (q[0], k[0], v[0]), r"needs q \[B, N, heads, head_dim\]"),
    (lambda q, k, v: (q, k, v[:, :-1]), "needs q"),
    (lambda q, k, v: (q, k[:, :0], v[:, :0]), "at least one query and one key; got 5 and 0"),
    (lambda q, k, v: (q[..., :48], k[..., :48], v[..., :48]), "head_dim must be one of"),
    (lambda q, k, v: (q.half(), k, v), "share a dtype"),
    (lambda q, k, v: (q, k, v.int()), "share a dtype"),
    (lambda q, k, v: (q.transpose(1, 3).contiguous().transpose(1, 3), k, v), "stride 1"),
])
def test_tensors_that_do_not_fit_are_turned_away(change, said):
    with pytest.raises(ValueError, match=said):
        int8_attention(*change(*cases.AWKWARD_ATTENTION[0].inputs("normal", seed=9)))


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.RENDERED_ATTENTION, ids=str)
def test_triton_at_the_size_that_is_rendered(case):
    q, k, v = case.inputs("normal", seed=10, dtype=torch.bfloat16, device="cuda")
    got = int8_attention(q, k, v)
    assert torch.equal(got, int8_attention(q, k, v))                             # the same every time
    last = case.queries // 128 * 128                   # the ragged block, and the first: no more fit the reference
    for rows in (slice(0, 128), slice(last, None)):
        assert rms(got[:, rows], int8_attention(q[:, rows], k, v, impl="reference")) < 8e-3
