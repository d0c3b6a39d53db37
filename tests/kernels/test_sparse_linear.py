"""sparse_linear and sparse_embedding against plain float64 autograd on W * mask, and numerically."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megasparse.kernels.block_sparse import (
    apply_mask_,
    build_index,
    choose,
    sparse_embedding,
    sparse_linear,
)

OUT, IN = 24, 16


def expand(mask: torch.Tensor, block_size: int) -> torch.Tensor:
    return mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)


def case(block_size: int, lead: tuple[int, ...] = (3, 5), dtype: torch.dtype = torch.float64):
    mask = torch.rand(OUT // block_size, IN // block_size) < 0.5
    mask[0, 0], mask[-1, -1] = True, False
    x = torch.randn(*lead, IN, dtype=dtype)
    weight = torch.randn(OUT, IN, dtype=dtype) * expand(mask, block_size)
    bias = torch.randn(OUT, dtype=dtype)
    return x, weight, bias, mask


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("lead", [(), (7,), (3, 5), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("dense_gradient", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_matches_plain_autograd(block_size, lead, dense_gradient, with_bias) -> None:
    x0, weight0, bias0, mask = case(block_size, lead)
    x, weight, bias = leaves(x0, weight0, bias0)
    y = sparse_linear(x, weight, bias if with_bias else None, build_index(mask, block_size), dense_gradient)

    x_ref, weight_ref, bias_ref = leaves(x0, weight0, bias0)
    # With the mask inside the graph plain autograd gives the masked gradient, without it the dense one.
    used = weight_ref if dense_gradient else weight_ref * expand(mask, block_size)
    y_ref = x_ref @ used.t() + (bias_ref if with_bias else 0)
    torch.testing.assert_close(y, y_ref)
    dy = torch.randn_like(y)
    y.backward(dy)
    y_ref.backward(dy)
    torch.testing.assert_close(x.grad, x_ref.grad)
    torch.testing.assert_close(weight.grad, weight_ref.grad)
    if with_bias:
        torch.testing.assert_close(bias.grad, bias_ref.grad)
    inactive = weight.grad[~expand(mask, block_size)]
    assert (inactive != 0).all() if dense_gradient else (inactive == 0).all()


@pytest.mark.parametrize("block_size", [1, 4])
def test_gradcheck(block_size) -> None:
    x, weight, bias, mask = case(block_size, (3,))
    keep = expand(mask, block_size)
    x, weight, bias = leaves(x, weight, bias)
    # The product with the mask keeps finite differences inside the active weights.
    assert torch.autograd.gradcheck(
        lambda x, w, b: sparse_linear(x, w * keep, b, build_index(mask, block_size), False), (x, weight, bias)
    )
    assert torch.autograd.gradcheck(
        lambda x, w, b: sparse_linear(x, w, b, build_index(mask, block_size), True), (x, weight, bias)
    )


def test_bfloat16_against_float64() -> None:
    x0, weight0, bias0, mask = case(8, (2048,), torch.bfloat16)
    x, weight, bias = leaves(x0, weight0, bias0)
    y = sparse_linear(x, weight, bias, build_index(mask, 8), False)
    dy = torch.randn_like(y)
    y.backward(dy)
    x_ref, weight_ref, bias_ref = leaves(x0.double(), weight0.double(), bias0.double())
    y_ref = F.linear(x_ref, weight_ref * expand(mask, 8), bias_ref)
    y_ref.backward(dy.double())
    # Products are accumulated in float32 and rounded to bfloat16 once (relative 2^-8), or twice where the library
    # adds the bias to a rounded product; 2^-6 of the largest value leaves room for cancellation between the two.
    for got, expected in ((y, y_ref), (x.grad, x_ref.grad), (weight.grad, weight_ref.grad), (bias.grad, bias_ref.grad)):
        assert got.dtype == torch.bfloat16
        assert (got.double() - expected).abs().max() <= 2**-6 * expected.abs().max()
    assert (weight.grad[~expand(mask, 8)] == 0).all()
    # One rounding of a float32 sum. Summed in bfloat16, 2,048 terms of order 1 reach partial sums near 45, whose
    # last place is 0.25, and end up wrong by several units.
    torch.testing.assert_close(bias.grad.double(), dy.double().sum(0), rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype) -> None:
    x0, weight0, bias0, mask = case(4, (6,), dtype)
    x, weight, bias = leaves(x0, weight0, bias0)
    sparse_linear(x, weight, bias, build_index(mask, 4), False).sum().backward()
    expected = (torch.ones(OUT, 6, dtype=torch.float64) @ x0.double()) * expand(mask, 4)
    # Six terms of order 1.
    torch.testing.assert_close(weight.grad.double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_saves_only_input_and_weight() -> None:
    """Besides the index, which the layer has anyway."""
    x0, weight0, bias0, mask = case(4)
    x, weight, bias = leaves(x0, weight0, bias0)
    index = build_index(mask, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        sparse_linear(x, weight, bias, index, False)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, weight)}


def test_a_topology_that_changes_before_the_backward_pass_is_noticed() -> None:
    x0, weight0, bias0, mask = case(4)
    x, weight, bias = leaves(x0, weight0, bias0)
    y = sparse_linear(x, weight, bias, build_index(mask, 4), False)
    mask[0, 0] = ~mask[0, 0]
    with pytest.raises(AssertionError, match="topology was changed"):
        y.sum().backward()


def test_only_needed_gradients_are_computed() -> None:
    x, weight, bias, mask = case(4)
    (weight,) = leaves(weight)
    y = sparse_linear(x, weight, bias, build_index(mask, 4), False)
    y.sum().backward()
    assert weight.grad is not None and x.grad is None


@pytest.mark.parametrize("dense_gradient", [False, True])
def test_checkpoint_gives_identical_gradients(dense_gradient) -> None:
    x0, weight0, bias0, mask = case(4, (6,), torch.float32)
    grads = []
    for recompute in (False, True):
        x, weight, bias = leaves(x0, weight0, bias0)

        def run(x, weight=weight, bias=bias):
            return sparse_linear(x, weight, bias, build_index(mask, 4), dense_gradient).tanh()

        y = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        y.square().sum().backward()
        grads.append((x.grad, weight.grad, bias.grad))
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("dense_gradient", [False, True])
def test_embedding_matches_plain_autograd(block_size, dense_gradient) -> None:
    _, weight0, _, mask = case(block_size)
    ids = torch.randint(OUT, (3, 40))  # 120 draws of 24 rows: repeated rows must add up
    (weight,), (weight_ref,) = leaves(weight0), leaves(weight0)
    y = sparse_embedding(ids, weight, build_index(mask, block_size), dense_gradient)
    y_ref = (weight_ref if dense_gradient else weight_ref * expand(mask, block_size))[ids]
    assert torch.equal(y, y_ref)
    dy = torch.randn_like(y)
    # A gradient that is not contiguous, as a slice upstream would give.
    y.backward(dy.transpose(0, 1).contiguous().transpose(0, 1))
    y_ref.backward(dy)
    torch.testing.assert_close(weight.grad, weight_ref.grad)
    if not dense_gradient:
        assert (weight.grad[~expand(mask, block_size)] == 0).all()


def test_no_mask_is_the_plain_layer() -> None:
    x, weight, bias, _ = case(4)
    assert torch.equal(sparse_linear(x, weight, bias, None, False), F.linear(x, weight, bias))
    ids = torch.randint(OUT, (5,))
    assert torch.equal(sparse_embedding(ids, weight, None, False), weight[ids])


@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_apply_mask_clears_inactive_units_in_place(block_size) -> None:
    mask = torch.rand(OUT // block_size, IN // block_size) < 0.5
    keep = expand(mask, block_size)
    for tensor in (torch.randn(OUT, IN), torch.randn(IN, OUT).t(), torch.full((OUT, IN), float("nan"))):
        before = tensor.clone()
        assert apply_mask_(tensor, mask, block_size) is tensor
        assert (tensor[~keep] == 0).all() and not torch.signbit(tensor[~keep]).any()
        torch.testing.assert_close(tensor[keep], before[keep], equal_nan=True, rtol=0, atol=0)


def test_unknown_kernel_names_the_possible_ones() -> None:
    x, weight, bias, mask = case(4)
    for call in (
        lambda: sparse_linear(x, weight, bias, build_index(mask, 4), False, kernel="fst"),
        lambda: sparse_linear(x, weight, bias, None, False, kernel="fst"),
        lambda: choose("fst", "cpu", torch.float32, 4, 8, 0.1),
    ):
        with pytest.raises(ValueError, match="'fst'.*auto, dense, reference"):
            call()
    assert choose("reference", "cpu", torch.float32, 16, 8, 0.1) == "reference"
    # No block-sparse kernel takes blocks of 4.
    assert choose("auto", "cpu", torch.float32, 4, 8, 0.1) == "dense"
