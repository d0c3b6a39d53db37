"""Cross entropy and its gradient on CPUs against the formula in float64, whole and divided over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse.config.loader import ConfigError, load_config
from megasparse.cost.cpu_kernels import cpu_kernel, cpu_kernel_obstacles
from megasparse.kernels import cross_entropy
from megasparse.kernels.cross_entropy import cpu, cross_entropy_

# Of a gradient, whose entries are 1 or less. float32: the logits less the largest, times log2(e), are rounded in their
# 24th bit, which an exponent of up to 40 makes 40 x 2^-24 of a small share; others: one rounding at the end.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
DTYPES = [pytest.param(dtype, id=str(dtype).partition(".")[2]) for dtype in TOLERANCE]
SHAPES = [(1, 1, 1), (3, 7, 9), (5, 43, 48), (40, 130, 130), (9, 2049, 2176), (2, 50257, 50304)]
"""Tokens, entries, and entries with those that pad them."""
ANY_NUMBER = 77.0


def random_logits(tokens: int, width: int, padded: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits_NW = (4 * torch.randn(tokens, padded)).to(dtype)
    logits_NW[:, width:] = ANY_NUMBER
    return logits_NW, torch.randint(width, (tokens,))


def exact(logits_NW: Tensor, targets_N: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of their sum with 0 in the padding, in float64."""
    scores = logits_NW[:, :width].double().requires_grad_()
    losses = F.cross_entropy(scores, targets_N, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    return losses.detach(), F.pad(gradient, (0, logits_NW.shape[1] - width))


def check(losses: Tensor, logits_NW: Tensor, expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    assert losses.dtype == torch.float32 and logits_NW.dtype == dtype
    # Losses are float32 whatever the logits are: a sum of exponentials of 1.5e-7, and differences of about 20.
    torch.testing.assert_close(losses.double(), expected[0], rtol=2e-6, atol=4e-6)
    torch.testing.assert_close(logits_NW.double(), expected[1], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("kernel", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_gradients(shape, dtype, kernel) -> None:
    (logits_NW, targets_N), width = random_logits(*shape, dtype), shape[1]
    expected, without = exact(logits_NW, targets_N, width), logits_NW.clone()
    losses = cross_entropy_(logits_NW, targets_N, width, True, kernel=kernel)
    check(losses, logits_NW, expected, dtype)
    assert (logits_NW[:, width:] == 0).all()
    assert torch.equal(cross_entropy_(without, targets_N, width, False, kernel=kernel), losses)


@pytest.mark.parametrize("kernel", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(48, 43), (32, 32), (48, 0)], ids=str)
def test_rows_divided_over_two_ranks(widths, dtype, kernel) -> None:
    """What each rank knows of its part is joined, as the ranks do it; one of them may hold padding only."""
    tokens, share = 21, 48
    whole_NW, targets_N = random_logits(tokens, sum(widths), sum(widths), dtype)
    firsts = (0, widths[0])
    parts, local = [], []
    for first, width in zip(firsts, widths, strict=True):
        parts.append(F.pad(whole_NW[:, first : first + width], (0, share - width), value=ANY_NUMBER))
        is_here = (targets_N >= first) & (targets_N < first + width)
        local.append(torch.where(is_here, targets_N - first, -1))
    known: list[tuple[Tensor, ...]] = []

    def keep(*found: Tensor) -> tuple[Tensor, ...]:
        known.append(tuple(x.clone() for x in found))
        return found

    for part, targets, width in zip(parts, local, widths, strict=True):
        cross_entropy_(part.clone(), targets, width, False, joined=keep, kernel=kernel)
    largest, sums, picked = map(torch.stack, zip(*known, strict=True))
    most = largest.amax(0)
    joined = most, (sums * (largest - most).exp()).sum(0), picked.sum(0)
    expected, gradient = exact(whole_NW, targets_N, sum(widths))
    for part, targets, first, width in zip(parts, local, firsts, widths, strict=True):
        losses = cross_entropy_(part, targets, width, True, joined=lambda *_: joined, kernel=kernel)
        wanted = F.pad(gradient[:, first : first + width], (0, share - width))
        check(losses, part, (expected, wanted), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_gaps_between_them(dtype) -> None:
    logits_NW, targets_N = random_logits(6, 50, 50, dtype)
    wide = torch.full((6, 80), ANY_NUMBER, dtype=dtype)
    wide[:, 10:60] = logits_NW
    expected = exact(logits_NW, targets_N, 50)
    check(cross_entropy_(wide[:, 10:60], targets_N, 50, True, kernel="cpu"), wide[:, 10:60], expected, dtype)
    assert (wide[:, :10] == ANY_NUMBER).all() and (wide[:, 60:] == ANY_NUMBER).all()


def test_large_and_equal_logits() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [-1e30, -1e30, -1e30], [0.0, -torch.inf, 0.0]])
    losses = cross_entropy_(logits, torch.tensor([0, 2, 0]), 3, True, kernel="cpu")
    assert losses.tolist() == pytest.approx([0.0, 1.0986123, 0.6931472])
    assert logits[2].tolist() == pytest.approx([-0.5, 0.0, 0.5]) and logits[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 20, 98])
def test_what_is_no_number_stays_none(place, value) -> None:
    logits = torch.randn(2, 99)
    logits[1, place] = value
    losses = cross_entropy_(logits, torch.tensor([3, 4]), 99, True, kernel="cpu")
    assert losses.isnan().tolist() == [False, True]
    assert logits[0].isfinite().all() and logits[1, place].isnan()


def test_results_do_not_depend_on_the_number_of_threads_or_on_other_rows() -> None:
    threads, found = torch.get_num_threads(), []
    logits, targets = random_logits(37, 2011, 2048, torch.float32)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            own = logits.clone()
            found.append((cross_entropy_(own, targets, 2011, True, kernel="cpu"), own))
    finally:
        torch.set_num_threads(threads)
    own = logits[5:9].clone()
    some = cross_entropy_(own, targets[5:9], 2011, True, kernel="cpu"), own
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert all(torch.equal(one[5:9], other) for one, other in zip(found[0], some, strict=True))


def test_what_the_kernel_does_not_know_is_torchs(monkeypatch) -> None:
    logits, targets = random_logits(4, 6, 6, torch.float64)
    cross_entropy_(logits, targets, 6, True)
    with pytest.raises(RuntimeError, match="kernels.loss: cpu cannot be used: dtype torch.float64"):
        cross_entropy_(logits, targets, 6, True, kernel="cpu")
    assert not cross_entropy.takes_cpu("torch", logits.float())
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    assert not cross_entropy.takes_cpu("cpu", logits.float())


def test_where_it_cannot_be_built_the_plan_says_so(monkeypatch) -> None:
    config = load_config([], ["kernels.loss=auto"])
    assert cpu_kernel(config, "loss", "cpu") == "cpu" and cpu_kernel(config, "loss", "cuda") == "torch"
    monkeypatch.setattr(cpu, "no_compiler", lambda: "no C++ compiler found")
    assert cpu_kernel(config, "loss", "cpu", planned=True) == "torch"
    assert cpu_kernel_obstacles(config, "cpu", planned=True) == {"loss": "no C++ compiler found"}
    with pytest.raises(ConfigError, match="kernels.loss: cpu cannot be used here: no C.*; must be auto"):
        cpu_kernel(load_config([], ["kernels.loss=cpu"]), "loss", "cpu", planned=True)
