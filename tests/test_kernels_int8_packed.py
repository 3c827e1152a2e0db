"""kernels/int8_linear with packed weights, as a CPU runs it, against the reference."""

import pytest
import torch

from kernels.int8_linear import int8_linear, packed, quantize_rows
from model.turbo import has_int8_products

pytestmark = pytest.mark.skipif(not has_int8_products(), reason="needs a CPU with INT8 products (VNNI)")

SHAPES = [(1, 1, 64, 16), (2, 300, 72, 40), (1, 257, 1536, 130)]        # batch, tokens, in, out; a tile and a row


def inputs(batch, tokens, width, out):
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, width)
    x[:, :, 3] *= 30                                    # one outlier channel
    x[0, 0] = 0
    return x, quantize_rows(torch.randn(out, width)), torch.randn(out)


def close(got, want, most):
    assert got.shape == want.shape and (got.double() - want.double()).abs().max() <= most * want.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_packed_layer_is_the_layer(shape, with_bias):
    x, weight, bias = inputs(*shape)
    bias = bias if with_bias else None
    for given in (x, quantize_rows(x)):
        got = packed.linear(given, packed.pack(weight), bias, torch.float32)
        close(got, int8_linear(given, weight, bias, dtype=torch.float32, impl="torch"), 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_feed_forward_is_its_two_layers(shape):
    batch, tokens, width, hidden = shape
    x, weight_in, bias_in = inputs(*shape)
    weight_out, bias_out = quantize_rows(torch.randn(width, hidden)), torch.randn(width)
    gate, residual, values = torch.randn(batch, 1, width), torch.randn(batch, tokens, width), quantize_rows(x)
    middle = int8_linear(values, weight_in, bias_in, gelu=True, dtype=torch.float32, impl="torch")
    want = int8_linear(middle, weight_out, bias_out, gate=gate, residual=residual, impl="torch")
    got = packed.feed_forward(values, packed.pack(weight_in), bias_in, packed.pack(weight_out), bias_out, gate,
                              residual)
    close(got, want, 1e-3)                              # a value at a tie may be rounded to its neighbour


def test_a_row_does_not_depend_on_its_neighbours():
    x, weight, bias = inputs(1, 300, 72, 40)
    whole = packed.linear(x, packed.pack(weight), bias, torch.float32)
    assert torch.equal(packed.linear(x[:, 270:], packed.pack(weight), bias, torch.float32), whole[:, 270:])
