"""kernels/sparse_attention: the release, float64 formulas, Triton and the CPU against the reference, a compiler."""

import pytest
import torch
import torch.nn.functional as F
from golden import GOLDENS, Golden, error
from test_kernels_int8_attention import CASES, DTYPE, DTYPES, EXACT, attention64, rms

from dailies.kernels import cases
from dailies.kernels.sparse_attention import reference, sparse_attention
from dailies.model import checkpoint

VARIANTS = {"with linear": dict(linear=True), "int8": dict(int8=True),
            "int8 of Hopper, with linear": dict(linear=True, int8=True, block_q=64, block_k=128),
            "the demo's, with linear": dict(linear=True, block_q=16, block_k=16),
            "int8 of the demo's": dict(int8=True, block_q=16, block_k=16)}


def projection(head_dim, device="cpu"):
    return (cases.fill("normal", (head_dim, head_dim), 20, device=device) / head_dim ** 0.5,
            cases.fill("normal", (head_dim,), 21, device=device))


def linear64(q, k, v):
    """The textbook's linear attention in float64, every pair of tokens spelled out, with the release's 1e-5."""
    similarity = torch.einsum("bnhd,bmhd->bhnm", q.double().softmax(-1), k.double().softmax(-1))
    return torch.einsum("bhnm,bmhd->bnhd", similarity / (similarity.sum(-1, keepdim=True) + 1e-5), v.double())


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["sla_a", "sla_b_hd128"])
def test_both_cpu_paths_are_the_release(name, impl):
    golden = Golden(name)
    weights, _ = checkpoint.unpack((GOLDENS / name / "weights.safetensors").read_bytes())
    proj = tuple(weights[f"blocks.0.self_attn.attn_op.local_attn.proj_l.{part}"] for part in ("weight", "bias"))
    q, k, v = (golden.inputs[part] for part in "qkv")
    config = golden.config
    said = dict(keep_ratio=config["topk"], block_q=config["BLKQ"], block_k=config["BLKK"], impl=impl)
    full = [part.float() for part in (q, k, v)]
    assert error(sparse_attention(*full, **said), golden.outputs["o_s"].transpose(1, 2)) < 1e-5
    assert error(sparse_attention(*full, **said, proj=proj), golden.outputs["o"]) < 1e-5
    bound = golden.tolerance["*_bf16"]
    assert error(sparse_attention(q, k, v, **said), golden.outputs["o_s_bf16"].transpose(1, 2)) < bound
    assert error(sparse_attention(q, k, v, **said, proj=proj), golden.outputs["o_bf16"]) < bound
    for block_q, block_k in ((128, 64), (64, 128)):
        said |= dict(block_q=block_q, block_k=block_k, int8=True)
        want = golden.outputs[f"sage.blkq{block_q}_blkk{block_k}.o_s"].transpose(1, 2)
        assert error(sparse_attention(q, k, v.float(), **said), want) < golden.tolerance["sage.*.o_s"]


@pytest.mark.parametrize("name", ["sla_a", "sla_b_hd128"])
def test_means_scores_map_and_linear_branch_are_the_release(name):
    golden = Golden(name)
    q, k, v = (golden.inputs[part].float() for part in "qkv")
    pooled_q = reference.pool_blocks(q, golden.config["BLKQ"])
    pooled_k = reference.pool_blocks(k, golden.config["BLKK"])
    assert error(pooled_q, golden.outputs["pooled_q"]) < 1e-5
    assert error(pooled_k - k.mean(1)[:, :, None], golden.outputs["pooled_k"]) < 1e-5
    kept = reference.kept_blocks(pooled_q, pooled_k, golden.config["topk"])
    sparse_map = F.one_hot(kept.long(), pooled_k.shape[2]).sum(-2)
    assert torch.equal(sparse_map, golden.outputs["sparse_map"].long())
    assert error(reference.linear_attention(q, k, v), golden.outputs["o_l_unprojected"].transpose(1, 2)) < 1e-5


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("case", cases.AWKWARD_ATTENTION, ids=str)
def test_keeping_every_block_is_dense_attention(case, impl, triton_device):
    q, k, v = case.inputs("normal", seed=1, dtype=DTYPE, device=triton_device)
    assert rms(sparse_attention(q, k, v, keep_ratio=1, impl=impl), attention64(q, k, v)) < EXACT


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("case", cases.AWKWARD_ATTENTION, ids=str)
def test_the_linear_branch_is_textbook_linear_attention_over_all_keys(case, impl, triton_device):
    q, k, v = case.inputs("normal", seed=2, dtype=DTYPE, device=triton_device)
    weight, bias = projection(case.head_dim, triton_device)
    said = dict(keep_ratio=0.3, impl=impl)
    branch = sparse_attention(q, k, v, proj=(weight, bias), **said) - sparse_attention(q, k, v, **said)
    assert rms(branch, linear64(q, k, v) @ weight.double().T + bias.double()) < EXACT


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_each_query_block_attends_to_the_block_of_keys_that_answers_it(impl, triton_device):
    """Block i of the 4 of queries points along channel i, as does block 3 - i of the keys, whose values are 3 - i."""
    block = torch.arange(4, device=triton_device).repeat_interleave(64)[:-7]     # of each token; the last is ragged
    q, k = (9 * F.one_hot(channel, 64).to(DTYPE)[None, :, None] for channel in (block, 3 - block))
    v = block.to(DTYPE)[None, :, None, None].expand(k.shape).contiguous()
    got = sparse_attention(q, k, v, keep_ratio=0.25, block_q=64, block_k=64, impl=impl)
    torch.testing.assert_close(got, 3 - v)


def test_a_mean_is_over_the_rows_a_block_has():
    x = cases.fill("normal", (2, 130, 3 * 64), seed=3).unflatten(-1, (3, 64))
    means = reference.pool_blocks(x, 128)
    torch.testing.assert_close(means[:, :, 0], x[:, :128].mean(1))
    torch.testing.assert_close(means[:, :, 1], x[:, 128:].mean(1))


@pytest.mark.parametrize("keep_ratio, kept", [(0.01, 1), (0.49, 1), (0.5, 2), (0.99, 3), (1, 4)])
def test_the_share_is_rounded_down_to_whole_blocks_but_never_to_none(keep_ratio, kept):
    pooled_q, pooled_k = torch.randn(1, 1, 3, 64), torch.randn(1, 1, 4, 64)
    blocks = reference.kept_blocks(pooled_q, pooled_k, keep_ratio)
    assert blocks.shape == (1, 1, 3, kept)
    assert (blocks.diff() > 0).all()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)], ids=str)
@pytest.mark.parametrize("case, kind", CASES, ids=str)
def test_the_cpu_follows_the_reference(case, kind, dtype, bound, variant):
    q, k, v = case.inputs(kind, seed=4, dtype=dtype)
    said = dict(variant, keep_ratio=0.4)
    if said.pop("linear", False):
        said["proj"] = projection(case.head_dim)
    got, want = (sparse_attention(q, k, v, **said, impl=impl) for impl in ("cpu", "reference"))
    assert rms(got, want) < bound


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("case, kind", CASES, ids=str)
def test_triton_follows_the_reference(case, kind, variant, triton_device):
    dtype, bound = DTYPES[-1] if variant.get("int8") else DTYPES[0]
    compare_triton(case, kind, dtype, bound, variant, triton_device)


@pytest.mark.skipif(len(DTYPES) == 1, reason="a device gets one dtype")
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("case", cases.AWKWARD_ATTENTION, ids=str)
def test_triton_follows_the_reference_in_the_other_dtype(case, variant, triton_device):
    dtype, bound = DTYPES[0] if variant.get("int8") else DTYPES[-1]
    compare_triton(case, "normal", dtype, bound, variant, triton_device)


def compare_triton(case, kind, dtype, bound, variant, device):
    """With the reference's choice of blocks: among blocks of zeros any is as good as another."""
    from dailies.kernels.sparse_attention import kernel
    q, k, v = case.inputs(kind, seed=5, dtype=dtype, device=device)
    int8, block_q, block_k = variant.get("int8", False), variant.get("block_q", 128), variant.get("block_k", 64)
    for x, block in ((q, block_q), (k, block_k)):
        torch.testing.assert_close(kernel.pool_blocks(x, block), reference.pool_blocks(x, block), rtol=1e-5, atol=1e-5)
    pooled = reference.pool_blocks(q, block_q), reference.pool_blocks(k, block_k)
    kept = reference.kept_blocks(*pooled, 0.4)
    want, linear = reference.attend_kept_blocks(q, k, v, kept, int8, block_q, block_k), None
    if variant.get("linear"):
        weight, bias = projection(case.head_dim, device)
        want = want + F.linear(reference.linear_attention(q, k, v), weight, bias)
        linear = (*kernel.projected_summary(k, v, weight), bias)
    got = kernel.attend_kept_blocks(q, k, v, kept, linear, int8, block_q, block_k)
    assert got.dtype == dtype
    assert rms(got, want) < bound


def test_parts_of_a_fused_projection_are_taken_as_they_lie(triton_device):
    fused = cases.fill("normal", (2, 130, 3 * 2 * 64), seed=6, dtype=DTYPE, device=triton_device)
    q, k, v = fused.unflatten(-1, (3, 2, 64)).unbind(2)
    for impl in ("reference", "cpu", "triton") if triton_device == "cpu" else ("triton",):
        said = dict(keep_ratio=0.5, proj=projection(64, triton_device), impl=impl)
        got = sparse_attention(q, k, v, **said)
        assert got.is_contiguous()
        torch.testing.assert_close(got, sparse_attention(q.contiguous(), k.contiguous(), v.contiguous(), **said))


def test_a_clip_does_not_depend_on_its_batch():
    q, k, v = cases.AWKWARD_ATTENTION[2].inputs("normal", seed=7)
    said = dict(keep_ratio=0.5, proj=projection(128))
    assert torch.equal(sparse_attention(q, k, v, **said)[1:], sparse_attention(q[1:], k[1:], v[1:], **said))


def test_one_graph_holds_it_and_the_op_is_what_it_declares():
    q, k, v = cases.AWKWARD_ATTENTION[1].inputs("normal", seed=8)
    weight, bias = projection(64)

    def layer(q, k, v, weight, bias):
        return sparse_attention(q * 2, k, v, keep_ratio=0.5, proj=(weight, bias)).flatten(2) + 1
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, weight, bias), layer(q, k, v, weight, bias))
    op = torch.ops.dailies.sparse_attention.default
    torch.library.opcheck(op, (q, k, v, weight, bias, 0.5, False, 128, 64, "cpu"))
    torch.library.opcheck(op, (q, k, v, None, None, 0.5, True, 64, 128, "cpu"), test_utils="test_faketensor")


@pytest.mark.parametrize("change, said", [
    (dict(keep_ratio=0), "above 0 and at most 1; got 0"),
    (dict(keep_ratio=1.5), "above 0 and at most 1; got 1.5"),
    (dict(keep_ratio=0.5, block_k=48), "must be 16, 32, 64 or 128 rows; got 128 and 48"),
    (dict(keep_ratio=0.5, proj=projection(128)), "proj must be a weight"),
])
def test_what_does_not_fit_is_turned_away(change, said):
    with pytest.raises(ValueError, match=said):
        sparse_attention(*cases.AWKWARD_ATTENTION[0].inputs("normal", seed=9), **change)


@pytest.mark.gpu
@pytest.mark.parametrize("case, variant", [
    *((cases.RENDERED_ATTENTION[0], variant) for variant in VARIANTS.values()),
    *((cases.RENDERED_ATTENTION[1], VARIANTS[name]) for name in ("with linear", "int8"))], ids=str)
def test_triton_at_the_size_that_is_rendered(case, variant):
    from dailies.kernels.sparse_attention import kernel
    q, k, v = case.inputs("normal", seed=10, dtype=torch.bfloat16, device="cuda")
    int8, block_q, block_k = variant.get("int8", False), variant.get("block_q", 128), variant.get("block_k", 64)
    proj = projection(case.head_dim, "cuda") if variant.get("linear") else None
    said = dict(keep_ratio=0.1, proj=proj, int8=int8, block_q=block_q, block_k=block_k)
    got = sparse_attention(q, k, v, **said)
    assert torch.equal(got, sparse_attention(q, k, v, **said))                   # the same every time
    pooled = kernel.pool_blocks(q, block_q), kernel.pool_blocks(k, block_k)
    kept = reference.kept_blocks(*pooled, 0.1)
    last = kept.shape[2] - 1                           # the ragged block, and the first: no more fit the reference
    for block in (0, last):
        rows = slice(block * block_q, (block + 1) * block_q)
        want = reference.attend_kept_blocks(q[:, rows], k, v, kept[:, :, block:block + 1], int8, block_q, block_k)
        if proj:
            want = want + F.linear(reference.linear_attention(q[:, rows], k, v), *proj)
        assert rms(got[:, rows], want) < 8e-3
