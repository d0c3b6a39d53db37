"""SquareHead against values worked out by hand and a plain float64 computation; its gradient; its invariances."""

from __future__ import annotations

import pytest
import torch

from megasparse.objectives.square_head import square_head

EPSILON = 2.0**-7


def test_two_layers_by_hand() -> None:
    """One sample of two tokens of two channels. Layer 1: differences 1, 0, 2, 1, mean square 6/4; teacher 1, 2, 0, 1,
    mean square 6/4. Layer 2: differences 0, 1, 0, 0: 1/4; teacher 2, 0, 0, 2: 8/4."""
    teacher = [torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])]
    moves = torch.tensor([[[1.0, 0.0], [2.0, -1.0]]]), torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    student = [state + move for state, move in zip(teacher, moves, strict=True)]
    expected = 1.5 / (1.5 + EPSILON) + 0.25 / (2 + EPSILON)
    assert float(square_head(student, teacher, epsilon=EPSILON)) == pytest.approx(expected, abs=1e-6)
    mean = square_head(student, teacher, epsilon=EPSILON, reduction="mean")
    assert float(mean) == pytest.approx(expected / 2, abs=1e-6)
    # The first token alone: 1/2 of 5/2, and 1/2 of 2.
    first = torch.tensor([[True, False]])
    expected = 0.5 / (2.5 + EPSILON) + 0.5 / (2 + EPSILON)
    assert float(square_head(student, teacher, first, epsilon=EPSILON)) == pytest.approx(expected, abs=1e-6)


def states(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]


def plain(student, teacher, tokens_BT, epsilon: float, ratio_over: str) -> torch.Tensor:
    """In float64, sample by sample with boolean indices."""
    total = torch.zeros((), dtype=torch.float64)
    for s_BTC, t_BTC in zip(student, teacher, strict=True):
        pieces = list(zip(s_BTC.double(), t_BTC.double(), tokens_BT, strict=True))
        if ratio_over == "micro_batch":
            pieces = [(s_BTC.double(), t_BTC.double(), tokens_BT)]
        ratios = [(s[mask] - t[mask]).square().mean() / (t[mask].square().mean() + epsilon) for s, t, mask in pieces]
        total = total + sum(ratios) / len(ratios)
    return total


@pytest.mark.parametrize("ratio_over", ["sample", "micro_batch"])
def test_loss_and_gradient_are_those_of_a_plain_computation(ratio_over) -> None:
    student, teacher = states(0, 13, 7), states(1, 13, 7)
    tokens_BT = torch.rand(3, 13, generator=torch.Generator().manual_seed(2)) < 0.6
    tokens_BT[0] = True
    ours = [state.clone().requires_grad_() for state in student]
    loss = square_head(ours, teacher, tokens_BT, epsilon=EPSILON, ratio_over=ratio_over)
    theirs = [state.double().requires_grad_() for state in student]
    expected = plain(theirs, teacher, tokens_BT, EPSILON, ratio_over)
    # Sums of at most 273 float32 terms of one sign.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (3 * loss).backward()
    (3 * expected).backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=2e-6, atol=1e-9)
        assert not mine.grad[~tokens_BT].any()


def test_bfloat16_states_are_summed_in_float32() -> None:
    student, teacher = states(0, 300, 64, dtype=torch.bfloat16), states(1, 300, 64, dtype=torch.bfloat16)
    tokens = torch.ones(3, 300, dtype=torch.bool)
    loss = square_head(student, teacher, epsilon=EPSILON)
    torch.testing.assert_close(loss.double(), plain(student, teacher, tokens, EPSILON, "sample"), rtol=1e-5, atol=0)


def test_a_student_that_is_its_teacher_has_no_loss() -> None:
    teacher = states(1, 5, 6)
    assert float(square_head(teacher, teacher, epsilon=EPSILON)) == 0
    zeros = [torch.zeros(2, 3, 4)]
    assert float(square_head(zeros, zeros, epsilon=0.0)) == 0


def test_a_student_of_zeros_has_a_ratio_of_nearly_one_a_layer() -> None:
    teacher = states(1, 5, 6)
    loss = square_head([torch.zeros_like(t) for t in teacher], teacher, epsilon=EPSILON)
    sizes = [t.double().square().mean((1, 2)) for t in teacher]
    expected = sum(float((size / (size + EPSILON)).mean()) for size in sizes)
    assert float(loss) == pytest.approx(expected, rel=1e-6) and 3.9 < float(loss) < 4


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e3])
def test_without_epsilon_the_scale_plays_no_part(scale) -> None:
    student, teacher = states(0, 5, 6), states(1, 5, 6)
    one = square_head(student, teacher, epsilon=0.0)
    other = square_head([scale * s for s in student], [scale * t for t in teacher], epsilon=0.0)
    torch.testing.assert_close(other, one, rtol=2e-6, atol=0)
    with_epsilon = square_head([1e-3 * s for s in student], [1e-3 * t for t in teacher], epsilon=EPSILON)
    assert float(with_epsilon) < 0.01 * float(one)


def test_a_sample_without_tokens_counts_as_none() -> None:
    student, teacher = states(0, 5, 6), states(1, 5, 6)
    tokens = torch.ones(3, 5, dtype=torch.bool)
    tokens[1] = False
    loss = square_head(student, teacher, tokens, epsilon=EPSILON)
    others = [[state[[0, 2]] for state in group] for group in (student, teacher)]
    assert float(loss) == pytest.approx(2 / 3 * float(square_head(*others, epsilon=EPSILON)), rel=1e-6)


def test_states_of_inference_mode_will_do() -> None:
    with torch.inference_mode():
        teacher = states(1, 5, 6)
    student = [state.requires_grad_() for state in states(0, 5, 6)]
    square_head(student, teacher, epsilon=EPSILON).backward()
    assert all(state.grad.isfinite().all() and state.grad.any() for state in student)
