"""Grids of few bits, their packed form, and the exact product of int8 weights and activations."""

from __future__ import annotations

import pytest
import torch

from megasparse.kernels.quantized import (
    int8_linear,
    largest_level,
    pack_levels,
    packed_width,
    quantize_tokens,
    quantized,
    unpack_levels,
)


def sparse(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn(rows, columns) * torch.rand(rows, 1).mul(6).exp()
    weight[torch.rand(rows, columns) < 0.6] = 0
    weight[2] = 0
    return weight


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 16), (4, 16), (3, 16), (4, None)])
def test_every_weight_goes_to_the_nearest_level_and_zero_to_zero(bits, group) -> None:
    weight = sparse(9, 48)
    matrix = quantized(weight, bits, group)
    again, width = matrix.dequantized(), group or 48
    step = weight.view(9, -1, width).abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    # Half a step, and the rounding of a division and a product.
    assert ((again - weight).view(9, -1, width).abs() <= step * 0.5 * (1 + 1e-5)).all()
    assert (again[weight == 0] == 0).all() and not again[2].any()
    assert matrix.values.abs().max() == largest_level(bits)
    assert matrix.scales.shape == ((9,) if group is None else (9, 48 // group)) and (matrix.scales > 0).all()


def test_tiny_weights_are_no_division_by_zero() -> None:
    assert not quantized(torch.full((2, 4), 1e-45), 8).values.any()


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("width", [1, 7, 8, 33])
def test_packed_levels_come_back(bits, width) -> None:
    largest = largest_level(bits)
    values = torch.randint(-largest, largest + 1, (300, width), dtype=torch.int8)
    packed = pack_levels(values, bits)
    assert packed.shape == (300, packed_width(width, bits)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_levels(packed, bits, width), values)
    # As the text of the module says it: lowest bits first.
    for row in (0, 299):
        number = sum((int(v) + 2 ** (bits - 1)) << (bits * i) for i, v in enumerate(values[row]))
        assert number == int.from_bytes(bytes(packed[row].tolist()), "little")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [40, 2500])
def test_the_product_is_that_of_whole_numbers(dtype, width) -> None:
    weight, bias = torch.randn(30, width), torch.randn(30)
    x = (torch.randn(3, 5, width) * torch.rand(3, 5, 1).mul(4).exp()).to(dtype)
    x[1, 2] = 0
    matrix = quantized(weight, 8)
    y = int8_linear(x, matrix.values, matrix.scales, bias)
    levels, scales = quantize_tokens(x)
    assert levels.dtype == torch.int8 and int(levels.abs().amax(-1).min()) == 0 and int(levels.abs().max()) == 127
    whole = levels.to(torch.int64) @ matrix.values.to(torch.int64).T
    expected = whole.double() * scales.double() * matrix.scales.double() + bias.double()
    assert y.dtype == dtype
    # Three roundings in float32; one more where the result is bfloat16.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    # And near the product of the numbers that they stand for: half a step of each of `width` inputs.
    exact = x.float() @ weight.T + bias
    assert (y.float() - exact).norm() < 0.02 * exact.norm()
