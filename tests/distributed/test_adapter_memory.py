"""Bytes of gradients and optimizer state of tuned matrices, against full fine-tuning, and what plans say of them."""

from __future__ import annotations

import pytest
from adapter_runs import MODEL, Run
from engine_runs import Layout, make_batches, run_config
from harness import run_distributed
from initial_runs import write_folder

from megasparse.methods.adapter import AdapterTuning
from megasparse.methods.callback import Step
from megasparse.methods.spiel_variants import AccumulatedGradients, MomentApproximation
from megasparse.parallel import Mesh
from megasparse.training.plan import plan_run

WIDTHS = [*MODEL, "model.hidden_size=128", "model.ffn_hidden_size=256", "model.vocab_size=97"]
SPIEL = ["spiel.density=0.01", "spiel.interval=5", "spiel.selection_steps=2"]
CASES = {
    "full": [],
    "smt": ["smt.density=0.01", "smt.block_size=16", "smt.warmup_steps=2"],
    "accumulated_gradients": SPIEL,
    "moment_approximation": [*SPIEL, "spiel.variant=moment_approximation"],
}
STEPS = 4


def bytes_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def held_bytes(run: Run) -> dict[str, int]:
    """After a backward pass, of the attention and MLP matrices, or of all that is trained in their place."""
    parameters = dict(run.engine.model.named_parameters())
    if len(parameters) > 1:
        parameters = {n: p for n, p in parameters.items() if p.dim() == 2 and (".attention." in n or ".mlp." in n)}
    states = [state for p in parameters.values() for state in run.engine.optimizer.state[p].values()]
    found = {
        "gradients": bytes_of(parameter.grad for parameter in parameters.values()),
        # Steps of a whole parameter are one number.
        "optimizer": bytes_of(state for state in states if state.dim()),
        "weights": sum(parameter.numel() for parameter in parameters.values()),
        "candidates": 0,
        "tuned_entries": 0,
    }
    for method in run.methods:
        if isinstance(method, MomentApproximation):
            found["optimizer"] += bytes_of([*method.rows.values(), *method.columns.values()])
        if isinstance(method, AccumulatedGradients):
            every = [t for c in method.candidates.values() for t in (c.places, c.sums, c.squares)]
            places = {t.data_ptr() for t in every}
            # Those of the step under way may yet be skipped.
            every += [t for pair in method.of_step.values() for t in pair if t.data_ptr() not in places]
            found["candidates"] = bytes_of(every)
        if isinstance(method, AdapterTuning):
            every = [t for layer in method.layers.values() for t in (layer.numbers, layer.base)]
            found["tuned_entries"] = bytes_of(every)
    return found


def measure(mesh: Mesh, cases: dict[str, list[str]]) -> dict[str, list[dict[str, int]]]:
    """In an ordinary step, and for SpIEL in the second one that collects candidates too."""
    found = {}
    for name, words in cases.items():
        run, rows = Run(mesh, Layout(1, 1, 0, 1), words), []
        for index in (STEPS, STEPS + 2):
            run.advance(index - run.index)
            for method in run.methods:
                method.begin_step(Step(index))
            batch = make_batches(run.config)[index][: run.config.train.micro_batch_size]
            run.engine.backward(run.engine.forward(batch[:, :-1], batch[:, 1:]))
            rows.append(held_bytes(run))
            run.engine.step(1e-3)
            run.index += 1
        found[name] = rows
    return found


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("memory") / "base"
    write_folder(folder, WIDTHS)
    return [*WIDTHS, f"train.init_from={folder}"]


@pytest.fixture(scope="module")
def found(words) -> dict[str, list[dict[str, int]]]:
    return run_distributed(measure, 1, {name: [*words, *more] for name, more in CASES.items()})[0]


@pytest.mark.parametrize("name", [name for name in CASES if name != "full"])
def test_state_and_gradients_are_below_two_percent_of_full_fine_tuning(found, name) -> None:
    full, ordinary = found["full"][0], found[name][0]
    assert full["gradients"] + full["optimizer"] == 12 * full["weights"]
    # SMT chooses whole blocks, of attention and MLP matrices each.
    assert ordinary["weights"] == pytest.approx(0.01 * full["weights"], rel=0.05)
    assert ordinary["candidates"] == 0
    share = (ordinary["gradients"] + ordinary["optimizer"]) / (full["gradients"] + full["optimizer"])
    assert share <= 0.02
    if name == "moment_approximation":
        assert share < (found["smt"][0]["gradients"] + found["smt"][0]["optimizer"]) / (12 * full["weights"])


def test_candidates_add_sixteen_bytes_an_entry_while_they_are_collected(found) -> None:
    """Above two percent then, at stage 0 in float32: 14 + 16 bytes an entry against 12."""
    full, row = found["full"][0], found["accumulated_gradients"][1]
    assert row["candidates"] == 16 * row["weights"]
    share = (row["gradients"] + row["optimizer"] + row["candidates"]) / (12 * full["weights"])
    assert share == pytest.approx(0.025, rel=0.02)


@pytest.mark.parametrize("name", [name for name in CASES if name != "full"])
def test_the_plan_says_what_is_held(found, words, name) -> None:
    config = run_config([*words, *CASES[name]], Layout(1, 1, 0, 1))
    memory, rows = plan_run(config, config.model.vocab_size, 1, "cpu")["memory"], found[name]
    for kind in ("gradients", "optimizer", "tuned_entries"):
        assert all(row[kind] == memory[kind] for row in rows), kind
    assert memory.get("candidates", 0) == max(row["candidates"] for row in rows)
