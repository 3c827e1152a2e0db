"""Kernels as a GPU would get them: compiled for it here, where there is none, as far as the assembler's report.

The interpreter proves what a kernel computes; this proves that Triton takes it, that the matrix instructions of the
architecture are used, that shared memory suffices and that nothing spills from registers.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from itertools import chain, product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# bytes that one program may have
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# what a kernel multiplies: of the first beginning that fits its name
PRODUCTS = {"int8 linear": {"s8"}, "int8 attention, bf16": {"bf16", "s8"}, "sparse attention, bf16": {"bf16"},
            "sparse attention, int8, bf16": {"bf16", "s8"}, "summarise, bf16": {"bf16"}}
LINEAR = dict(x="*i8", x_scales="*fp32", w="*i8", w_scales="*fp32", bias="*bf16", gate="*fp32", residual="*fp32",
              y="*bf16", M="i32", N="i32:16", K="i32:16", tiles_m="i32")


def kernels(arch):
    """Name -> function, dtypes of its arguments (:16 is a multiple of 16), constants, warps, stages, options."""
    import triton

    from dailies.kernels.int8_linear import kernel as linear
    from dailies.kernels.norm import kernel as norm
    unfused = dict(enable_fp_fusion=False)
    for in_blocks, residual in product((False, True), repeat=2):
        name = ("blocks" if in_blocks else "rows") + ", gated" * residual
        tiling = linear.tiling_for(arch, SHARED[arch], in_blocks, residual)
        tiles = {} if not tiling.descriptors else dict(
            x=f"tensordesc<i8[{tiling.rows}, {tiling.depth}]>", w=f"tensordesc<i8[{tiling.columns}, {tiling.depth}]>",
            y=f"tensordesc<bf16[{tiling.rows}, {tiling.columns // tiling.parts}]>")
        yield f"int8 linear, {name}", (linear.int8_linear_kernel, LINEAR | tiles, dict(
            HAS_BIAS=True, GELU=not residual, HAS_GATE=residual, HAS_RESIDUAL=residual, IN_BLOCKS=in_blocks,
            STEPS=1536 // tiling.depth, WHOLE_K=True, BLOCK_M=tiling.rows, BLOCK_N=tiling.columns, BLOCK_K=tiling.depth,
            GROUP_M=linear.GROUP, PARTS=tiling.parts, LOADS_TILES=tiling.descriptors, STORES_TILES=tiling.descriptors),
            tiling.warps, tiling.stages, {"maxnreg": tiling.registers} if tiling.registers else {})
    quantiser = dict(x="*bf16", values="*i8", scales="*fp32", K="i32:16")
    yield "quantise blocks", (linear.quantize_blocks_kernel, quantiser | dict(M="i32"), dict(TILE=128), 8, 3, unfused)
    has = dict(HAS_GAIN=True, HAS_BIAS=True, HAS_SCALE=True, HAS_SHIFT=True)
    joins = dict(HAS_EARLIER=True, HAS_EARLIER_GATE=True, HAS_UPDATE=True, HAS_GATE=True, KEEP=True)
    around = dict(gain="*fp32", bias="*fp32", scale="*fp32", shift="*fp32", stream="*fp32", y="*i8", scales="*fp32",
                  mean_rstd="*fp32", N="i32", D="i32:16")
    block = triton.next_power_of_2(5120)
    rows, warps = norm.rows_and_warps(block)
    yield "quantise rows", (linear.quantize_rows_kernel, quantiser | dict(stride="i32:16"), dict(BLOCK_K=block), 8, 3,
                            unfused)
    yield "norm, int8", (norm.modulated_norm_kernel, around | dict(
        x="*fp32", earlier="*bf16", earlier_gate="*fp32", update="*bf16", gate="*fp32", eps="fp32"),
                         has | joins | dict(OUTPUT="rows", ROWS=rows, BLOCK_D=block), warps, 3, unfused)
    yield "norm, blocks", (norm.quantize_norm_blocks_kernel, around, has | dict(TILE=128), 8, 3, unfused)
    yield "rms, rope", (norm.rms_rope_kernel, dict.fromkeys(("q", "k", "q_out", "k_out"), "*bf16")
                        | dict.fromkeys(("q_gain", "k_gain", "cos", "sin"), "*fp32")
                        | dict.fromkeys(("q_sample", "q_row", "k_sample", "k_row", "PAIRS", "HEAD_PAIRS"), "i32:16")
                        | dict(N="i32", eps="fp32"),
                        dict(ROWS=rows, BLOCK_PAIRS=block // 2), warps, 3, {})
    yield "rms", (norm.rms_norm_kernel, dict(x="*bf16", gain="*fp32", y="*bf16", M="i32", D="i32:16", stride="i32:16",
                                             eps="fp32"), dict(ROWS=rows, BLOCK_D=block), warps, 3, {})
    yield from around_conv()


def around_conv():
    from dailies.kernels.around_conv import kernel as around
    steps = dict.fromkeys(("x_clip", "x_frame", "residual_clip", "residual_frame", "out_clip", "out_frame"), "i64:16")
    for dtype, (channels, block) in product(("bf16", "fp32"), ((96, 128), (384, 512))):
        given = dict.fromkeys(("x", "out", "residual"), f"*{dtype}") | steps | dict(
            gamma="*fp32", bias=f"*{dtype}", PIXELS="i32:16", W="i32", C="i32:16", root="fp32")
        blocks = dict(BLOCK_P=around.VALUES // block, BLOCK_C=block)
        for name, function, constants in (
                ("norm and SiLU", around.norm_silu_kernel, dict(HAS_BIAS=True)),
                ("bias and residual", around.add_bias_kernel, dict(HAS_RESIDUAL=True)),
                ("enlarge", around.enlarge_kernel, dict(HAS_BIAS=True, PAIRS=2))):
            yield f"{name}, {channels} channels in {dtype}", (function, given, constants | blocks, around.WARPS, 3, {})


def attention_kernels(arch):
    """As `kernels`, for 128 channels a head."""
    import torch

    from dailies.kernels.int8_attention import kernel as int8
    from dailies.kernels.sparse_attention import kernel as sparse

    def strides(*tensors):
        return {f"{tensor}{stride}": "i32:16" for tensor in tensors for stride in ("stride_b", "stride_n", "stride_h")}

    quantiser = dict(x="*bf16", mean="*bf16", x_int8="*i8", scale="*fp32", rows="i32", heads="i32", factor="fp32",
                     eps="fp32", **strides(""))
    yield "quantise for attention", (
        int8.quantize_kernel, quantiser, dict(HEAD_DIM=128, BLOCK=64, WITH_MEAN=True), 4, 3, {})
    yield "pool", (sparse.pool_kernel, dict(x="*bf16", means="*fp32", rows="i32", heads="i32", **strides("")),
                   dict(HEAD_DIM=128, BLOCK=128), 4, 3, {})
    roomy = arch in (80, 90, 100)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        stages = int8.num_stages(dtype, roomy)
        given = dict.fromkeys(("v", "out"), f"*{name}") | dict.fromkeys(("queries", "keys", "heads"), "i32")
        scales = dict(q_scale="*fp32", k_scale="*fp32")
        yield f"int8 attention, {name}", (
            int8.int8_attention_kernel, given | scales | dict(q="*i8", k="*i8", **strides("")),
            dict(KEY_BLOCKS=512, HEAD_DIM=128, BLOCK_Q=int8.BLOCK_Q, BLOCK_K=int8.BLOCK_K), 8, stages, {})
        given_to_summary = dict(k=f"*{name}", v=f"*{name}", mixed="*fp32", total="*fp32", keys="i32", heads="i32")
        yield f"summarise, {name}", (
            sparse.summary_kernel, given_to_summary | strides("k_", "v_"),
            dict(HEAD_DIM=128, STRETCH=sparse.STRETCH, TILE=sparse.TILE, TILES=sparse.STRETCH // sparse.TILE), 8,
            stages,
            {})
        linear = dict(mixed=f"*{name}", total="*fp32", bias="*fp32")
        of_hopper = [(True, 64, 128)] if arch == 90 and name == "bf16" else []     # the release's blocks there
        for is_int8, block_q, block_k in ((False, 128, 64), (True, 128, 64), *of_hopper):
            near = scales | dict(near_q="*i8", near_k="*i8") if is_int8 else dict(
                q_scale="*i32", k_scale="*i32", near_q=f"*{name}", near_k=f"*{name}")
            rows, columns, warps = sparse.attend_tile(dtype, block_q, block_k)
            yield f"sparse attention, {'int8, ' * is_int8}{name}, {block_q}x{block_k}", (
                sparse.sparse_attention_kernel, given | near | linear | dict(
                    q=f"*{name}", kept="*i32", to_base_2="fp32", linear_eps="fp32",
                    **strides("q_", "k_", "v_", "phi_")),
                dict(KEEP=51, HEAD_DIM=128, BLOCK_Q=block_q, BLOCK_K=block_k, ROWS=rows, COLUMNS=columns, INT8=is_int8,
                     LINEAR=True), warps, stages, {})


def report(arch):
    """Name -> matrix instructions, bytes of shared memory, bytes spilled, and whether 16 bytes are loaded at once."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    triton.knobs.nvidia.dump_ptxas_log = True
    found = {}
    for name, (function, dtypes, constants, warps, stages, options) in chain(kernels(arch), attention_kernels(arch)):
        names = function.arg_names
        given = [dtypes.get(each, "constexpr") for each in names]
        aligned = [place for place, dtype in enumerate(given) if dtype.startswith("*") or dtype.endswith(":16")]
        signature = {each: dtype.removesuffix(":16") for each, dtype in zip(names, given, strict=True)}
        source = ASTSource(function, signature,
                           constexprs={(names.index(each),): value for each, value in constants.items()},
                           attrs={(place,): [["tt.divisibility", 16]] for place in aligned})
        with redirect_stdout(StringIO()) as said:      # the assembler's report
            built = triton.compile(source, target=GPUTarget("cuda", arch, 32),
                                   options=dict(num_warps=warps, num_stages=stages, **options))
        ptx = built.asm["ptx"]
        found[name] = {"matrix": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.[\w.:]*", ptx))),
                       "shared": built.metadata.shared,
                       "spilled": max(map(int, re.findall(r"(\d+) bytes spill stores", said.getvalue()))),
                       "wide": bool(re.search(r"ld\.global\.v4|cp\.async\.cg.*0x10|cp\.async\.bulk\.tensor", ptx))}
    return found


def matrix_instruction(arch, number):
    """As a pattern.  To INT8, Triton gives sm_100 the instruction that all have, and not its own."""
    if arch == 90:
        shape = {"s8": "m64n(64|128)k32", "bf16": "m64n(64|128)k16"}[number]
        return rf"wgmma\.mma_async\.sync\.aligned\.{shape}\.\w+\.{number}\.{number}$"
    if arch == 100 and number == "bf16":
        return r"tcgen05\.mma\.cta_group::1\.kind::f16$"
    return {"s8": r"mma\.sync\.aligned\.m16n8k32\.row\.col\.satfinite\.s32\.s8\.s8\.s32$",
            "bf16": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32$"}[number]


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    """Architecture -> its report to come; as many at once as there are processors."""
    pytest.importorskip("triton", reason="needs Triton: make test installs it")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}

    def run(arch):
        return subprocess.run([sys.executable, __file__, str(arch)], capture_output=True, text=True, timeout=900,
                              env=env)

    asked = [item.callspec.params["arch"] for item in request.session.items
             if item.path == Path(__file__) and not item.get_closest_marker("skip")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {arch: pool.submit(run, arch) for arch in asked}
        pool.shutdown(cancel_futures=True)


# Hopper, and the one with the least shared memory; the others take the suite a minute more
@pytest.mark.parametrize("arch", [90, 86, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 89, 100, 120))])
def test_every_kernel_is_what_the_architecture_wants(arch, reports):
    done = reports[arch].result()
    assert done.returncode == 0, done.stderr[-3000:]
    for name, found in json.loads(done.stdout).items():
        assert found["shared"] <= SHARED[arch], (name, found)
        assert found["wide"], (name, found)
        if ", fp32" in name:                           # to compare with: three products of tf32 are short of registers
            continue
        assert found["spilled"] <= 64, (name, found)   # a few bytes, outside the loop, cost nothing
        products = next((numbers for begins, numbers in PRODUCTS.items() if name.startswith(begins)), ())
        wanted = [matrix_instruction(arch, number) for number in products]
        assert all(any(re.match(each, one) for one in found["matrix"]) for each in wanted), (name, found)
        assert all(any(re.match(each, one) for each in wanted) for one in found["matrix"]), (name, found)


if __name__ == "__main__":
    print(json.dumps(report(int(sys.argv[1]))))
