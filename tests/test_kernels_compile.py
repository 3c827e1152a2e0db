"""Kernels as a GPU would get them: compiled for it here, where there is none, as far as the assembler's report.

The interpreter proves what a kernel computes; this proves that Triton takes it, that the matrix instructions of the
architecture are used, that shared memory suffices and that nothing spills from registers.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = {80: 166912, 90: 232448, 120: 101376}         # bytes that one program may have
MATRIX = {80: "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
          90: "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8",
          120: "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"}
LINEAR = dict(x="*i8", x_scales="*fp32", w="*i8", w_scales="*fp32", bias="*bf16", gate="*fp32", residual="*fp32",
              y="*bf16", M="i32", N="i32:16", K="i32:16", tiles_m="i32")


def kernels(arch):
    """Name -> function, dtypes of its arguments (:16 is a multiple of 16), constants, warps, stages, options."""
    import triton

    from kernels.int8_linear import kernel as linear
    from kernels.norm import kernel as norm
    unfused = dict(enable_fp_fusion=False)
    for in_blocks, residual in product((False, True), repeat=2):
        name = ("blocks" if in_blocks else "rows") + ", gated" * residual
        tiling = linear.tiling_for(arch, SHARED[arch], in_blocks, residual)
        tiles = dict(x=f"tensordesc<i8[{tiling.rows}, {tiling.depth}]>", w=f"tensordesc<i8[{tiling.columns}, {tiling.depth}]>",
                     y=f"tensordesc<bf16[{tiling.rows}, {tiling.columns // tiling.parts}]>") if tiling.descriptors else {}
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
    rows, warps = norm.tiling(block)
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
    from kernels.around_conv import kernel as around
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


def report(arch):
    """Name -> matrix instructions, bytes of shared memory, bytes spilled, and whether 16 bytes are loaded at once."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = tools / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    found = {}
    for name, (function, dtypes, constants, warps, stages, options) in kernels(arch):
        names = function.arg_names
        given = [dtypes.get(each, "constexpr") for each in names]
        aligned = [place for place, dtype in enumerate(given) if dtype.startswith("*") or dtype.endswith(":16")]
        signature = {each: dtype.removesuffix(":16") for each, dtype in zip(names, given, strict=True)}
        source = ASTSource(function, signature,
                           constexprs={(names.index(each),): value for each, value in constants.items()},
                           attrs={(place,): [["tt.divisibility", 16]] for place in aligned})
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32),
                               options=dict(num_warps=warps, num_stages=stages, **options))
        ptx = built.asm["ptx"]
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(ptx)
            file.flush()
            name_of_gpu = f"--gpu-name=sm_{arch}{'a' * (arch >= 90)}"
            said = subprocess.run([ptxas, "-v", name_of_gpu, file.name, "-o", os.devnull],
                                  capture_output=True, text=True, check=True).stderr
        found[name] = {"matrix": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)[\w.]*", ptx))),
                       "shared": built.metadata.shared,
                       "spilled": max(map(int, re.findall(r"(\d+) bytes spill stores", said))),
                       "wide": bool(re.search(r"ld\.global\.v4|cp\.async\.cg.*0x10|cp\.async\.bulk\.tensor", ptx))}
    return found


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 120))])
def test_every_kernel_is_what_the_architecture_wants(arch, tmp_path):
    pytest.importorskip("triton", reason="needs Triton: pip install 'dailies[dev]'")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, str(arch)], capture_output=True, text=True, timeout=600,
                          env=env | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    for name, found in json.loads(done.stdout).items():
        assert found["shared"] <= SHARED[arch], (name, found)
        assert found["spilled"] <= 64, (name, found)   # a few bytes, outside the loop, cost nothing
        assert found["wide"], (name, found)
        assert found["matrix"] == ([MATRIX[arch]] if "linear" in name else []), (name, found)


if __name__ == "__main__":
    print(json.dumps(report(int(sys.argv[1]))))
