"""The optimizer's kernel on CPUs against torch's operators over all weights: pieces that cut blocks, dtypes, counts of
steps of each weight; inactive entries are left as they are."""

from __future__ import annotations

import pytest
import torch

from megasparse.config.loader import ConfigError, load_config
from megasparse.cost.cpu_kernels import cpu_kernel, cpu_kernel_obstacles
from megasparse.kernels.optimizer import MAX_WEIGHT_STEPS, Active, AdamWStep, State, adamw_, cpu, reference, square_sum
from megasparse.kernels.optimizer import takes_cpu as kernel_takes_cpu

NUMBERS = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
COUNTS = [(False, 0), (True, 0), (False, 5), (True, 5)]
# Of the matrix: blocks, side of a block; and the piece of it.
PIECES = {
    "a whole matrix": ((6, 8), 16, 0, 6 * 8 * 256),
    "cut within blocks": ((6, 8), 16, 133, 9001),
    "within one row": ((6, 8), 16, 130, 77),
    "one entry": ((6, 8), 16, 131, 1),
    "blocks of 4": ((7, 5), 4, 3, 441),
    "single weights": ((40, 33), 1, 17, 1000),
}


def case(name: str, density: float) -> tuple[Active, int, torch.Tensor]:
    """What is active of a piece, its length, and its active weights."""
    grid, side, start, numel = PIECES[name]
    mask = torch.rand(grid) < density
    weights = mask.repeat_interleave(side, 0).repeat_interleave(side, 1).view(-1)[start : start + numel]
    return Active(mask, side, start), numel, weights


def random_state(active: torch.Tensor, counted: bool, low: torch.dtype | None = None) -> State:
    """0 outside of the active weights, but for the steps, which count on there."""
    numel = active.numel()
    steps = torch.randint(0, 60, (numel,), dtype=torch.int16) if counted else None
    master, first, second = torch.randn(numel), 0.1 * torch.randn(numel), 0.01 * torch.rand(numel)
    model = None if low is None else torch.zeros(numel, dtype=low)
    return State(master * active, first * active, second * active, steps, model)


def clone(state: State) -> State:
    return State(*(None if x is None else x.clone() for x in vars(state).values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("by_weight", "warmup"), COUNTS)
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("name", PIECES)
def test_steps_against_torch(name, density, by_weight, warmup, dtype) -> None:
    active, numel, weights = case(name, density)
    ours = random_state(weights, by_weight or warmup > 0, low=torch.bfloat16)
    theirs = clone(ours)
    for step in (30, 31, 32):
        numbers = AdamWStep(step, **NUMBERS, gradient_scale=0.37, by_weight=by_weight, regrowth_warmup_steps=warmup)
        gradient = (torch.randn(numel) * weights).to(dtype)
        adamw_(ours, gradient, numbers, active)
        reference.adamw_(theirs, gradient, numbers)
    # Three steps of some roundings each, of moments below 1 and of weights below 8. Where 1 - beta^count is small it is
    # itself rounded: at 1 - 0.9 by 6e-7 of it.
    for kind, size in (("master", 4e-6), ("exp_avg", 4e-7), ("exp_avg_sq", 4e-7)):
        found, expected = getattr(ours, kind), getattr(theirs, kind)
        torch.testing.assert_close(found, expected, rtol=0, atol=size)
        assert not found[~weights].any()
    assert torch.equal(ours.low, ours.master.bfloat16())
    if ours.weight_steps is not None:
        assert torch.equal(ours.weight_steps[weights], theirs.weight_steps[weights])


def test_a_step_is_that_of_torchs_adamw() -> None:
    weight = torch.nn.Parameter(torch.randn(5000))
    ours = State(weight.detach().clone(), torch.zeros(5000), torch.zeros(5000))
    optimizer = torch.optim.AdamW([weight], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    for step in range(1, 11):
        weight.grad = torch.randn(5000)
        optimizer.step()
        adamw_(ours, weight.grad, AdamWStep(step, **NUMBERS))
    torch.testing.assert_close(ours.master, weight.detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("side", [4, 16, 64])
def test_what_is_inactive_is_neither_read_nor_written(side) -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    weights = mask.repeat_interleave(side, 0).repeat_interleave(side, 1).view(-1)
    state = random_state(torch.ones_like(weights), True, torch.float32)
    gradient = torch.randn(weights.numel()).masked_fill(~weights, torch.nan)
    before = clone(state)
    adamw_(state, gradient, AdamWStep(7, **NUMBERS, by_weight=True), Active(mask, side, 0))
    for found, old in zip(vars(state).values(), vars(before).values(), strict=True):
        assert torch.equal(found[~weights], old[~weights])
        assert (found[weights] != old[weights]).all()
    # Sums of up to 4,096 squares in float32.
    expected = float(gradient[weights].double().square().sum())
    assert square_sum(gradient, Active(mask, side, 0)) == pytest.approx(expected, rel=1e-5)


def test_pieces_of_any_length_give_the_bits_of_the_whole() -> None:
    """ZeRO cuts matrices anywhere."""
    active, numel, weights = case("a whole matrix", 0.3)
    state, gradient = random_state(weights, True), torch.randn(numel) * weights
    numbers, parts = AdamWStep(9, **NUMBERS, by_weight=True, regrowth_warmup_steps=9), clone(state)
    adamw_(state, gradient, numbers, active)
    cuts = sorted({0, numel, *torch.randint(0, numel, (40,)).tolist()})
    for start, end in zip(cuts, cuts[1:], strict=False):
        piece = Active(active.mask, active.block_size, start)
        adamw_(parts.narrow(start, end - start), gradient[start:end], numbers, piece)
    for kind in ("master", "exp_avg", "exp_avg_sq", "weight_steps"):
        assert torch.equal(getattr(state, kind)[weights], getattr(parts, kind)[weights]), kind


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    threads, found = torch.get_num_threads(), []
    mask = torch.rand(40, 12) < 0.3
    weights = mask.repeat_interleave(16, 0).repeat_interleave(16, 1).view(-1)
    active, state, gradient = Active(mask, 16, 0), random_state(weights, True), torch.randn(weights.numel()) * weights
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            own = clone(state)
            adamw_(own, gradient, AdamWStep(9, **NUMBERS, by_weight=True), active)
            sums = [square_sum(gradient, active), square_sum(gradient), square_sum(gradient.bfloat16())]
            found.append([own.master, own.exp_avg, own.exp_avg_sq, own.weight_steps, torch.tensor(sums)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PIECES)
def test_square_sums(name, dtype) -> None:
    active, numel, weights = case(name, 0.4)
    gradient = (torch.randn(numel) * weights).to(dtype)
    expected = float(gradient.double().square().sum())
    assert square_sum(gradient, active) == pytest.approx(expected, rel=1e-5)
    assert square_sum(gradient) == pytest.approx(expected, rel=1e-5)
    if weights.any():
        for value in (torch.nan, torch.inf):
            gradient[int(weights.nonzero()[0])] = value
            assert not torch.tensor(square_sum(gradient, active)).isfinite()


def test_counts_of_steps_stop_at_their_largest_value() -> None:
    state = random_state(torch.ones(40, dtype=torch.bool), True)
    state.weight_steps.fill_(MAX_WEIGHT_STEPS - 1)
    for step in (MAX_WEIGHT_STEPS, MAX_WEIGHT_STEPS + 1, MAX_WEIGHT_STEPS + 2):
        adamw_(state, torch.ones(40), AdamWStep(step, **NUMBERS, by_weight=True, regrowth_warmup_steps=3))
        assert state.weight_steps.tolist() == [MAX_WEIGHT_STEPS] * 40
    assert state.master.isfinite().all()


def test_where_it_cannot_be_built_the_plan_says_so(monkeypatch) -> None:
    config = load_config([], ["kernels.optimizer=auto"])
    assert cpu_kernel(config, "optimizer", "cpu") == "cpu" and cpu_kernel(config, "optimizer", "cuda") == "torch"
    assert cpu_kernel_obstacles(config, "cpu") == cpu_kernel_obstacles(config, "cuda") == {}
    assert not kernel_takes_cpu("torch", "cpu") and not kernel_takes_cpu("auto", "cuda")
    with pytest.raises(RuntimeError, match="kernels.optimizer: cpu cannot be used: it runs on cpu, not on cuda"):
        kernel_takes_cpu("cpu", "cuda")
    monkeypatch.setattr(cpu, "no_compiler", lambda: "no C++ compiler found")
    assert cpu_kernel(config, "optimizer", "cpu", planned=True) == "torch"
    assert cpu_kernel_obstacles(config, "cpu", planned=True)["optimizer"] == "no C++ compiler found"
    forced = load_config([], ["kernels.optimizer=cpu"])
    with pytest.raises(ConfigError, match="kernels.optimizer: cpu cannot be used here: no C.*; must be auto"):
        cpu_kernel(forced, "optimizer", "cpu", planned=True)
