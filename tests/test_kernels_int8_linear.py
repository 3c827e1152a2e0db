"""kernels/int8_linear: the published numbers, the reference, Triton and torch._int_mm against float64."""

import pytest
import torch
import torch.nn.functional as F
from golden import GOLDENS, Golden, error

from dailies.kernels import cases
from dailies.kernels.int8_linear import BLOCK, Quantized, dequantize, int8_linear, quantize_blocks, quantize_rows
from dailies.model import checkpoint

SCHEMES = {"rows": quantize_rows, "blocks": quantize_blocks}
PATHS = [("rows", "reference"), ("rows", "cpu"), ("rows", "triton"), ("blocks", "reference"), ("blocks", "triton")]
SMALL, GELU, GATED, ONE = cases.AWKWARD_LAYERS
FILLED = [(case, kind) for case in (SMALL, GELU, GATED) for kind in cases.FILLS] + [(ONE, "normal")]


def layer_inputs(case, kind="normal", dtype=torch.float32, device="cpu"):
    """x, weight and what the epilogue takes; a bias always."""
    shape = (case.batch, case.tokens, case.inputs)
    x = cases.fill(kind, shape, 0, dtype, device)
    weight = cases.fill("normal", (case.outputs, case.inputs), 1, dtype, device)
    given = {"bias": cases.fill("normal", (case.outputs,), 2, dtype, device), "gelu": case.gelu}
    if case.gated:
        given["gate"] = cases.fill("normal", (case.batch, 1, case.outputs), 3, device=device)
        given["residual"] = cases.fill("normal", (case.batch, case.tokens, case.outputs), 4, device=device)
    return x, weight / case.inputs ** 0.5, given


def formula(x, weight, bias, gelu, gate=None, residual=None):
    """In float64: of dequantised operands it is what the integer path must be."""
    y = F.linear(x.double(), weight.double(), bias.double())
    y = F.gelu(y, approximate="tanh") if gelu else y
    y = y if gate is None else gate.double() * y
    return y if residual is None else residual.double() + y


def published(name):
    """The golden and, where the case multiplies, its weight as the released code quantised it."""
    golden = Golden(name)
    weights, _ = checkpoint.unpack((GOLDENS / name / "weights.safetensors").read_bytes())
    return golden, weights


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", ["w8a8_a", "w8a8_b_quant_only"])
def test_blocks_are_quantised_as_in_the_release(name, impl, triton_device):
    golden, _ = published(name)
    device = triton_device if impl == "triton" else "cpu"
    for part in ("x", "weight"):
        tensor = golden.inputs[part]                   # bf16; the interpreter has none, and fp32 holds the same values
        got = quantize_blocks(tensor.float().reshape(-1, tensor.shape[-1]).to(device), impl=impl)
        difference = (got.values.cpu().int() - golden.outputs[f"{part}_int8"].int()).abs()
        assert difference.max() <= 1 and difference.float().mean() <= 1e-3
        torch.testing.assert_close(got.scales.cpu(), golden.outputs[f"{part}_scale"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_layer_in_blocks_is_the_released_one(impl, triton_device):
    """There rows lie end to end; and the bias is added after a rounding, here before: a unit of each may differ."""
    golden, weights = published("w8a8_a")
    device = triton_device if impl == "triton" else "cpu"
    name = next(key.removesuffix("int8_weight") for key in weights if key.endswith("int8_weight"))
    weight = Quantized(weights[f"{name}int8_weight"].to(device), weights[f"{name}scale"].to(device))
    rows = golden.inputs["x"].float().reshape(-1, golden.config["K"]).to(device)
    want = {key: golden.outputs[key].reshape(len(rows), -1) for key in ("y_float32", "y", "y_bias")}
    assert error(int8_linear(rows, weight, dtype=torch.float32, impl=impl).cpu(), want["y_float32"]) < 1e-5
    y = int8_linear(rows, weight, dtype=torch.bfloat16, impl="reference" if device == "cpu" else impl).cpu()
    y_bias = int8_linear(rows, weight, weights[f"{name}bias"].to(device), dtype=torch.bfloat16,
                         impl="reference" if device == "cpu" else impl).cpu()
    assert ((y.float() - want["y"].float()).abs() <= unit(want["y"])).all()
    assert ((y_bias.float() - want["y_bias"].float()).abs() <= unit(want["y"]) + unit(want["y_bias"])).all()


def unit(x):
    """The distance of bf16 numbers at x."""
    return torch.finfo(torch.bfloat16).eps * 2.0 ** torch.floor(torch.log2(x.float().abs().clamp_min(1e-30)))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_largest_value_of_a_block_is_127_and_the_smallest_minus_128(impl, triton_device):
    x = torch.zeros(130, 256, device=triton_device if impl == "triton" else "cpu")
    x[:128, 0], x[1, 1], x[2, 2] = -1, 1, 0.5
    values, scales = (part.cpu() for part in quantize_blocks(x, impl=impl))
    assert (values[0, 0], values[1, 1], values[2, 2]) == (-128, 127, 64)
    assert not values[:, 128:].any() and not values[128:].any()
    assert torch.equal(scales, torch.tensor([[1, 1e-8], [1e-8, 1e-8]]) / 128)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("kind", cases.FILLS)
def test_a_quantised_row_is_within_half_a_step(kind, impl, triton_device):
    x = cases.fill(kind, (2, 9, 200), 0, device=triton_device if impl == "triton" else "cpu")
    quantised = quantize_rows(x, impl=impl)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((dequantize(quantised) - x).abs() <= 0.5001 * step).all()
    assert torch.equal(quantised.scales.cpu(), x.cpu().abs().amax(-1).clamp_min(1e-8) / 127)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("quantize", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("case, kind", FILLED, ids=str)
def test_all_quantise_as_the_reference_does(case, kind, quantize, impl, triton_device):
    x, *_ = layer_inputs(case, kind, torch.float16, triton_device if impl == "triton" else "cpu")
    # on the CPU: a GPU's torch divides by a number as it multiplies by its inverse
    got, want = quantize(x, impl=impl), quantize(x.cpu(), impl="reference")
    assert torch.equal(got.values.cpu(), want.values) and torch.equal(got.scales.cpu(), want.scales)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")    # GELU far below zero: 1 / inf is its limit
@pytest.mark.parametrize("scheme, impl", PATHS)
@pytest.mark.parametrize("case, kind", FILLED, ids=str)
def test_a_layer_is_the_float64_product_of_what_was_quantised(case, kind, scheme, impl, triton_device):
    x, weight, given = layer_inputs(case, kind, device=triton_device if impl == "triton" else "cpu")
    quantize = SCHEMES[scheme]
    quantised, weight = quantize(x), quantize(weight)
    want = formula(dequantize(quantised), dequantize(weight), **given)
    assert error(int8_linear(quantised, weight, **given, dtype=torch.float32, impl=impl), want) < 2e-6


@pytest.mark.parametrize("scheme, impl", PATHS)
def test_a_layer_quantises_what_is_not_quantised(scheme, impl, triton_device):
    x, weight, given = layer_inputs(GATED, device=triton_device if impl == "triton" else "cpu")
    weight = SCHEMES[scheme](weight)
    want = int8_linear(SCHEMES[scheme](x), weight, **given, impl=impl)
    assert torch.equal(int8_linear(x, weight, **given, impl=impl), want)


@pytest.mark.parametrize("scheme, impl", PATHS)
def test_a_layer_is_near_the_one_in_full_precision(scheme, impl, triton_device):
    """Specification's simulation: 1.1 % in rows and 1.3 % in blocks for Gaussian numbers."""
    case = cases.Layer(tokens=129, inputs=384, outputs=130)
    x, weight, given = layer_inputs(case, device=triton_device if impl == "triton" else "cpu")
    got, want = int8_linear(x, SCHEMES[scheme](weight), **given, impl=impl), formula(x, weight, **given)
    assert ((got - want).norm() / (want - given["bias"]).norm()) < 0.02


@pytest.mark.parametrize("scheme, impl", PATHS)
def test_a_sample_does_not_depend_on_its_batch(scheme, impl, triton_device):
    x, weight, given = layer_inputs(GATED, device=triton_device if impl == "triton" else "cpu")
    weight = SCHEMES[scheme](weight)
    alone = [int8_linear(x[i:i + 1], weight, given["bias"], gate=given["gate"][i:i + 1],
                         residual=given["residual"][i:i + 1], impl=impl) for i in range(len(x))]
    assert torch.equal(int8_linear(x, weight, **given, impl=impl), torch.cat(alone))


@pytest.mark.parametrize("scheme, impl", PATHS)
def test_layers_compile_in_one_graph(scheme, impl, triton_device):
    x, weight, given = layer_inputs(SMALL, device=triton_device if impl == "triton" else "cpu")

    def layer(x):
        quantised = SCHEMES[scheme](weight)
        return int8_linear(SCHEMES[scheme](x), quantised, **given, impl=impl), int8_linear(x, quantised, impl=impl)

    for got, want in zip(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x), strict=True):
        assert torch.equal(got, want) and got.dtype == want.dtype


@pytest.mark.parametrize("scheme, impl", PATHS[:3] + PATHS[-1:])
def test_the_operators_are_what_they_say_to_a_compiler(scheme, impl, triton_device):
    x, weight, given = layer_inputs(SMALL, device=triton_device if impl == "triton" else "cpu")
    torch.library.opcheck(getattr(torch.ops.dailies, f"quantize_{scheme}"), (x, impl))
    residual = x.new_ones(*x.shape[:-1], len(weight))
    torch.library.opcheck(torch.ops.dailies.int8_linear, (
        x, None, *SCHEMES[scheme](weight), given["bias"], True, None, residual, torch.float16, impl))


def test_what_does_not_fit_is_refused_by_name():
    x, weight, given = layer_inputs(GATED)
    rows, blocks = quantize_rows(weight), quantize_blocks(weight)
    with pytest.raises(ValueError, match="got int_mm for one on cpu"):
        int8_linear(x, rows, impl="int_mm")
    with pytest.raises(ValueError, match=r"needs x \(2, 130, 200\) for x \[2, 130, 199\]"):
        int8_linear(x[..., 1:], rows)
    with pytest.raises(ValueError, match=r"needs x.scales \(2, 2, 2\).*got \[2, 130\]"):
        int8_linear(quantize_rows(x), blocks)
    with pytest.raises(ValueError, match=r"needs gate \(2, 1, 136\).*got \[2, 136\]"):
        int8_linear(x, rows, gate=given["gate"][:, 0])
    with pytest.raises(ValueError, match=r"needs weight.scales \(136,\).*got \[200\]"):
        int8_linear(x, Quantized(rows.values, torch.ones(200)))
    with pytest.raises(ValueError, match="got torch.int8. What is quantised already"):
        int8_linear(rows.values, rows)
    with pytest.raises(ValueError, match=r"needs \[M, K\] or \[B, M, K\]; got \[200\]"):
        quantize_blocks(weight[0])


@pytest.mark.gpu
@pytest.mark.parametrize("scheme, impl", [("rows", "triton"), ("blocks", "triton")])
@pytest.mark.parametrize("case", cases.RENDERED_LAYERS, ids=str)
def test_layers_of_rendered_shapes_in_bf16(case, scheme, impl):
    x, weight, given = layer_inputs(case, "outlier channel", torch.bfloat16, "cuda")
    quantised, weight = SCHEMES[scheme](x), SCHEMES[scheme](weight)
    got = int8_linear(quantised, weight, **given, impl=impl)
    assert torch.equal(got, int8_linear(quantised, weight, **given, impl=impl))
    ends = torch.cat((torch.arange(128), torch.arange(case.tokens - 130, case.tokens))).cuda()
    given["residual"] = given["residual"][:, ends] if case.gated else None
    want = formula(dequantize(quantised)[:, ends], dequantize(weight), given.pop("bias"), **given)
    assert error(got[:, ends], want) < 8e-3            # one rounding to bf16


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", SCHEMES.values(), ids=SCHEMES)
def test_addresses_beyond_2_31_are_right(quantize):
    """2.3e9 elements: the last rows are what they are alone."""
    x = torch.zeros(1, 170 * 1024, 13824, dtype=torch.bfloat16, device="cuda")
    tail = x[:, -BLOCK:] = cases.fill("normal", (1, BLOCK, 13824), 0, torch.bfloat16, "cuda")
    weight = quantize(cases.fill("normal", (128, 13824), 1, device="cuda"))
    quantised, alone = quantize(x), quantize(tail)
    assert torch.equal(quantised.values[:, -BLOCK:], alone.values)
    assert torch.equal(int8_linear(quantised, weight)[:, -BLOCK:], int8_linear(alone, weight))
