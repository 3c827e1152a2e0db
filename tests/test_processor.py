"""What a processor can do is asked in one place, obeyed everywhere, and right on the least one that is supported."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dailies.kernels import cases, processor
from dailies.kernels.int8_linear import int8_linear, quantize_rows
from dailies.kernels.sparse_attention import sparse_attention
from dailies.model.catalog import CATALOG, DEMO
from dailies.model.convolution import convolve
from dailies.model.family import family_of
from dailies.model.layers import Linear
from dailies.model.refitted import decode_fallbacks

ROOT = Path(__file__).parent.parent
# torch's own variable and oneDNN's: what they choose from is what x86-64 with AVX2 alone has
LEAST = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
ASKED = ("has_onednn", "has_bf16_products", "has_bf16_tiles", "has_int8_products", "has_gelu_in_product",
         "has_signed_int8_products", "has_faster_fp32_products", "described")


@pytest.fixture
def pretend(monkeypatch):
    """Another processor: its architecture, what torch makes use of, instructions, and whether torch has oneDNN."""
    def become(machine, capability, *instructions, onednn=True, bf16=True, limit=""):
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
        for name in ("vnni", "avx512_bf16", "amx_tile"):
            monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in instructions)
        ops = type("ops", (), {"_is_mkldnn_bf16_supported": staticmethod(lambda: bf16)} if onednn else {})
        monkeypatch.setattr(torch.ops, "mkldnn", ops)
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        forget()

    def forget():
        for name in ASKED:
            getattr(processor, name).cache_clear()

    yield become
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("machine, int8, bf16", [
    (dict(machine="x86_64", capability="AVX2", bf16=False), False, False),                     # Zen 3, Haswell
    (dict(machine="x86_64", capability="AVX512"), False, False),                               # Skylake
    (dict(machine="x86_64", capability="AVX512", instructions=["vnni"]), True, False),         # Ice Lake
    (dict(machine="x86_64", capability="AVX512", instructions=["vnni", "avx512_bf16"]), True, True),    # Zen 4
    (dict(machine="AMD64", capability="AVX512", instructions=["vnni", "avx512_bf16", "amx_tile"]), True, True),
    (dict(machine="x86_64", capability="AVX512", instructions=["vnni", "avx512_bf16"], onednn=False), False, False),
    (dict(machine="x86_64", capability="AVX512", instructions=["vnni", "avx512_bf16"], limit="AVX2"), False, False),
    (dict(machine="x86_64", capability="AVX512", instructions=["vnni", "avx512_bf16"], limit="avx512_core_vnni"),
     True, False),
    (dict(machine="aarch64", capability="DEFAULT", bf16=False), False, False),                 # Graviton 2
    (dict(machine="aarch64", capability="SVE256"), False, True),                               # Graviton 3
    (dict(machine="arm64", capability="DEFAULT", onednn=False), False, False)])                # a Mac
def test_a_processor_is_known_by_what_torch_and_onednn_may_use(machine, int8, bf16, pretend):
    pretend(machine.pop("machine"), machine.pop("capability"), *machine.pop("instructions", ()), **machine)
    assert (processor.has_int8_products(), processor.has_bf16_products()) == (int8, bf16)
    assert processor.convolves(torch.float32) == processor.has_onednn() and processor.convolves(torch.bfloat16) == bf16
    assert processor.dtype_of("bf16", "cpu") == processor.dtype_of("int8", "cpu") == (torch.bfloat16 if bf16
                                                                                      else torch.float32)
    assert processor.dtype_of("fp32", "cuda") == torch.float32 and processor.dtype_of("int8",
                                                                                      "cuda:0") == torch.bfloat16
    assert bool(processor.instead_of_bf16()) != bf16 and processor.described()
    assert bool(decode_fallbacks(DEMO.runtime(decode_precision="bf16"))) != bf16
    card = CATALOG["wan2.1-t2v-1.3b"]
    notes = family_of(card).fallbacks(card, None, card.runtime("cpu", "bf16"))             # before its weights are here
    assert bool(notes["sample"]) != bf16
    assert decode_fallbacks(DEMO.runtime("cuda", "fp32",
                                         decode_precision="bf16")) == decode_fallbacks(DEMO.runtime()) == ()


def test_where_torch_has_no_onednn_convolutions_are_torchs_own(pretend):
    conv, x = torch.nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    pretend("arm64", "DEFAULT", onednn=False)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(convolve(conv.to(dtype), x.to(dtype)), conv(x.to(dtype)))


@pytest.mark.cpu
@pytest.mark.parametrize("channels", [64, 1000])
def test_products_of_integers_are_exact(channels):
    """With AVX2 alone oneDNN's are not: it adds pairs in 16 bits."""
    a, b = torch.randint(-127, 128, (40, channels)), torch.randint(-127, 128, (channels, 24))
    a[0], b[:, 0] = 127, 127
    operand = processor.int8_operand(b.to(torch.int8))
    got = torch.empty(40, 24, dtype=processor.sum_dtype(operand))
    assert torch.equal(processor.int8_product(a.to(torch.int8), operand, out=got).long(), a @ b)
    assert torch.equal(processor.int8_product(a.to(torch.int8), operand).long(), a @ b)


PACKED = """
import torch
from dailies.kernels.int8_linear import pack, packed_linear, quantize_rows
x, weight, bias = torch.randn(2, 300, 256), quantize_rows(torch.randn(48, 256)), torch.randn(48)
got, (values, scales) = packed_linear(x, pack(weight, bias), torch.float32), quantize_rows(x)
sums = values.double() @ weight.values.double().T
torch.testing.assert_close(got, (sums * scales.double()[..., None] * weight.scales.double() + bias).float())
"""


@pytest.mark.skipif(not processor.has_int8_products(), reason="this processor has no INT8 products")
@pytest.mark.parametrize("limit", ["", "AVX512_CORE_VNNI"])
def test_packed_int8_layers_are_right_and_by_no_loop_of_onednns_reference(limit):
    """With VNNI and without AMX it has nothing else for two signed operands."""
    done = subprocess.run([sys.executable, "-c", PACKED], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"ONEDNN_VERBOSE": "1", "ONEDNN_MAX_CPU_ISA": limit})
    assert done.returncode == 0, done.stderr
    assert "matmul" in done.stdout and "ref_int8" not in done.stdout, done.stdout


@pytest.mark.cpu
def test_int8_layers_and_attention_are_their_references():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 70, 1500), quantize_rows(torch.randn(48, 1500)), torch.randn(48)
    got, want = (int8_linear(x, weight, bias, gelu=True, impl=impl) for impl in ("cpu", "reference"))
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    case = cases.Attention(queries=200, keys=200, heads=2, head_dim=64)
    q, k, v = case.inputs("normal", seed=3)
    got, want = (sparse_attention(q, k, v, keep_ratio=0.5, int8=True, impl=impl) for impl in ("cpu", "reference"))
    assert (got - want).norm() < 1e-4 * want.norm()


@pytest.mark.cpu
@pytest.mark.parametrize("conv, shape", [(torch.nn.Conv2d(3, 8, 3), (1, 3, 9, 9)),
                                         (torch.nn.Conv3d(3, 8, 3), (1, 3, 4, 9, 9))], ids=("2d", "3d"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_convolution_of_any_dtype_is_made(conv, shape, dtype):
    x = torch.randn(shape).to(dtype)
    got, want = convolve(conv.to(dtype), x), conv.double()(x.double())
    assert got.dtype == dtype and (got - want).norm() < (1e-5 if dtype == torch.float32 else 0.02) * want.norm()


@pytest.mark.parametrize("machine, vendor, faster", [
    ("x86_64", "AuthenticAMD", True), ("x86_64", "GenuineIntel", False), ("x86_64", "", False), ("aarch64", "", False)])
def test_onednn_makes_fp32_products_where_mkl_holds_back(machine, vendor, faster, pretend, monkeypatch):
    monkeypatch.setattr(processor, "cpuinfo", lambda field: vendor if field == "vendor_id" else "")
    pretend(machine, "AVX2")
    assert processor.has_faster_fp32_products() == faster
    pretend(machine, "AVX2", onednn=False)
    assert not processor.has_faster_fp32_products()


@pytest.mark.cpu
@pytest.mark.parametrize("by_onednn", [True, False])
@pytest.mark.parametrize("shape", [(48,), (0, 48), (1, 48), (2, 70, 48), (2, 3, 5, 48)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_right_whoever_multiplies(by_onednn, shape, bias, monkeypatch):
    if by_onednn and not processor.has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(processor, "has_faster_fp32_products", lambda: by_onednn)
    layer, x = Linear(48, 20, bias=bias), torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), layer.double()(x.double()).float(), rtol=1e-5, atol=1e-5)
    assert layer.float()(x).sum().requires_grad         # to be learnt, and to be compiled, is torch's own affair
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.skipif(not processor.is_x86() or not processor.has_avx512(),
                    reason="is the least processor already, or no x86-64")
def test_what_depends_on_the_processor_is_right_on_the_least_one_too():
    """The tests that are marked so, in a process that takes this machine for one with AVX2 alone."""
    files = sorted(path for path in Path(__file__).parent.glob("test_*.py") if "mark.cpu" in path.read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | LEAST, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout and "failed" not in done.stdout


@pytest.mark.cpu
@pytest.mark.skipif({name: os.environ.get(name) for name in LEAST} != LEAST, reason="of the process that pretends")
def test_a_process_that_pretends_is_the_least_processor():
    assert not processor.has_bf16_products() and not processor.has_int8_products()
    assert "AVX2" in processor.described() and processor.dtype_of("int8", "cpu") == torch.float32
