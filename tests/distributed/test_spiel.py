"""SpIEL: a fixed number of entries, exchanged alike in every ZeRO stage and over stops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_runs import MODEL, Run, check_entries, check_resumed, run_cases
from engine_runs import Layout, make_batches
from harness import run_distributed
from initial_runs import write_folder

from megasparse.methods.callback import Step
from megasparse.parallel import Mesh

STOPS = (1, 4, 7)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("spiel") / "base"
    write_folder(folder, [*MODEL, "model.vocab_size=97"])
    settings = ["spiel.density=0.02", "spiel.interval=4", "spiel.selection_steps=2", "optimizer.lr=0.01"]
    return [*settings, "model.vocab_size=97", f"train.init_from={folder}"]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> dict[str, dict]:
    cases = [("stopped", words, Layout(1, 1, 0, 1))]
    return run_distributed(run_cases, 1, cases, tmp_path_factory.mktemp("alone"), STOPS)[0]


def test_as_many_entries_as_asked_for_are_trained_and_no_other(alone, words) -> None:
    check_entries(alone["stopped"], Path(words[-1].partition("=")[2]), 0.02)
    assert alone["stopped"]["bytes"] == alone["stopped"]["trained"] * (4 + 4 + 2)


def test_it_resumes_bit_for_bit_within_a_selection_too(alone) -> None:
    check_resumed(alone["stopped"], alone["stopped again"])


def test_ranks_and_stages_exchange_the_same_entries(alone, words, tmp_path) -> None:
    # Candidates come from the first micro-batch of all ranks: the whole batch, as of one rank alone.
    layouts = [Layout(2, 1, 1, 1), Layout(2, 1, 2, 1), Layout(2, 1, 3, 1)]
    cases = [(str(layout), words, layout) for layout in layouts]
    for name, result in run_distributed(run_cases, 2, cases, tmp_path, STOPS)[0].items():
        assert result["curve"] == pytest.approx(alone["stopped"]["curve"], rel=1e-4), name
        for layer, numbers in alone["stopped"]["numbers"].items():
            assert torch.equal(numbers, result["numbers"][layer]), (name, layer)
            wanted = alone["stopped"]["values"][layer]
            torch.testing.assert_close(result["values"][layer], wanted, rtol=1e-3, atol=1e-4)


def moments(mesh: Mesh, words: list[str], layouts: list[Layout]) -> list[dict[str, torch.Tensor]]:
    """Of the entries right after the first exchange; all samples are alike, so that micro-batches have one gradient."""
    found = []
    for layout in layouts:
        run = Run(mesh, layout, [*words, "optimizer.lr=1e-9", "optimizer.gradient_clipping=0"])
        batch = make_batches(run.config)[0][:1].repeat(run.config.train.global_batch_size, 1)
        for run.index in range(2):
            run.step(batch)
        found.append({kind: run.method.whole(kind) for kind in ("exp_avg", "exp_avg_sq")})
    return found


def test_new_entries_have_the_moments_of_the_gradients_of_steps_however_they_are_accumulated(words, tmp_path) -> None:
    layouts = [Layout(1, 1, 0, 1), Layout(1, 1, 0, 2), Layout(1, 1, 1, 4)]
    whole, *divided = run_distributed(moments, 1, words, layouts)[0]
    assert all(bool(values.any()) for values in whole.values())
    for other in divided:
        for kind, wanted in whole.items():
            torch.testing.assert_close(other[kind], wanted, rtol=1e-4, atol=1e-12)


def with_faults(mesh: Mesh, words: list[str], faults: dict[int, float]) -> dict[int, list]:
    """What each step records; gradients of some are multiplied, and skipped where they are above 1e6 or not finite."""
    run, found = Run(mesh, Layout(1, 1, 0, 2), words), {}
    for batch in make_batches(run.config)[:9]:
        step, engine, size = Step(run.index), run.engine, run.config.train.micro_batch_size
        for method in run.methods:
            method.begin_step(step)
        for start in range(0, len(batch), size):
            loss = engine.forward(batch[start : start + size, :-1], batch[start : start + size, 1:])
            loss.register_hook(lambda gradient: gradient * faults.get(run.index, 1.0))
            engine.backward(loss)
        step.skip_update = not engine.gradient_norm() < 1e6
        for method in () if step.skip_update else run.methods:
            method.after_backward(step)
        engine.step(run.config.optimizer.lr, skip_update=step.skip_update)
        found[run.index] = step.records.get("spiel", [])
        sums = [candidates.sums for candidates in run.method.candidates.values()]
        assert all(float(tensor.abs().max()) < 1e6 for tensor in sums), "nothing is kept of a skipped step"
        run.index += 1
    return found


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e30])
def test_a_skipped_step_gives_no_candidates(factor, words) -> None:
    # Interval 4, of which two steps collect: the first of the second one, and the second of the third one.
    (found,) = run_distributed(with_faults, 1, words, {4: factor})
    assert [step for step, records in found.items() if records] == [1, 5]
    (found,) = run_distributed(with_faults, 1, words, {5: factor})
    assert [step for step, records in found.items() if records] == [1]
