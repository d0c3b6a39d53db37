"""SpIEL with SM3 in whole runs: against float64 by hand, in every ZeRO stage, and over stops."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import pytest
import torch
from adapter_runs import MODEL, Run, check_entries, check_resumed, run_cases
from engine_runs import Layout
from harness import run_distributed
from initial_runs import write_folder
from traffic import counted

from megasparse.checkpoint.model_folder import ModelFolder
from megasparse.cost.resources import step_bytes
from megasparse.parallel import Mesh

STOPS = (1, 4, 7)
LR, EPSILON, INTERVAL, SELECTION = 0.01, 1e-6, 4, 2


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("spiel") / "base"
    write_folder(folder, [*MODEL, "model.vocab_size=97"])
    settings = ["spiel.density=0.02", f"spiel.interval={INTERVAL}", f"spiel.selection_steps={SELECTION}"]
    settings += [
        "spiel.variant=moment_approximation",
        f"optimizer.lr={LR}",
        f"optimizer.epsilon={EPSILON}",
        "optimizer.gradient_clipping=0.3",
    ]
    return [*settings, "model.vocab_size=97", f"train.init_from={folder}"]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> dict[str, dict]:
    of_torch = [*words, "kernels.optimizer=torch"]
    cases = [("stopped", words, Layout(1, 1, 0, 1)), ("torch", of_torch, Layout(1, 1, 0, 1))]
    return run_distributed(run_cases, 1, cases, tmp_path_factory.mktemp("alone"), STOPS)[0]


def test_nothing_is_kept_of_an_entry(alone, words) -> None:
    check_entries(alone["stopped"], Path(words[-1].partition("=")[2]), 0.02)
    assert alone["stopped"]["bytes"] == 0


def test_it_resumes_bit_for_bit(alone) -> None:
    check_resumed(alone["stopped"], alone["stopped again"])


def test_other_kernels_ranks_and_stages_train_the_same_entries(alone, words, tmp_path) -> None:
    layouts = [Layout(2, 1, stage, 1) for stage in range(4)]
    cases = [(str(layout), words, layout) for layout in layouts]
    half = ("bf16", [*words, "train.precision=bf16"], Layout(2, 1, 1, 1))
    results = run_distributed(run_cases, 2, [*cases, half], tmp_path, STOPS)
    # Eight bits of every number: gradients, and so the entries that come, are others.
    assert results[0].pop("bf16")["curve"] == pytest.approx(alone["stopped"]["curve"], rel=2e-2)
    for layer, numbers in results[0][cases[0][0]]["numbers"].items():
        assert all(torch.equal(numbers, rank[name]["numbers"][layer]) for rank in results for name, *_ in cases)
    for name, result in {**results[0], "torch": alone["torch"]}.items():
        assert result["curve"] == pytest.approx(alone["stopped"]["curve"], rel=1e-4), name
        for layer, numbers in alone["stopped"]["numbers"].items():
            assert torch.equal(numbers, result["numbers"][layer]), (name, layer)
            wanted = alone["stopped"]["values"][layer]
            torch.testing.assert_close(result["values"][layer], wanted, rtol=1e-3, atol=1e-4)


def sent(mesh: Mesh, words: list[str]) -> tuple[float, float]:
    """Bytes of an ordinary step, counted and planned."""
    with counted() as traffic:
        run = Run(mesh, Layout(2, 1, 1, 1), words)
        # The second step of an interval ends with an exchange.
        run.advance(SELECTION)
        before = traffic.bytes_sent
        run.advance(1)
        of_step = traffic.bytes_sent - before
    planned = step_bytes(run.config, run.engine.model, mesh.world_size)
    return of_step, planned["reduced"] + planned["gathered"]


def test_the_plan_counts_what_accumulators_send(words) -> None:
    for measured, planned in run_distributed(sent, 2, words):
        # Norm and loss beside it, some 8 bytes each.
        assert measured == pytest.approx(planned, rel=0.02)


def watched(mesh: Mesh, words: list[str]) -> list[dict]:
    """By step: entries and values of each layer after it, and the gradients that its update was given."""
    run, steps = Run(mesh, Layout(1, 1, 0, 1), words), list[dict]()
    (group,) = (group for group in run.engine.optimizer.param_groups if group["update"] is not None)
    update, given = group["update"], dict[str, torch.Tensor]()

    def record(values: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        assert lr == LR
        given["gradient"] = gradient.clone()
        update(values, gradient, lr)

    group["update"] = record
    for _ in range(run.config.train.steps):
        given.clear()
        run.advance(1)
        sizes, numbers = list(run.method.adapter.sizes().values()), run.method.chosen()
        whole = {"value": run.method.whole(), **given}
        pieces = {kind: dict(zip(numbers, t.split(sizes), strict=True)) for kind, t in whole.items()}
        steps.append({"numbers": numbers, **pieces})
    return steps


def test_a_run_is_that_of_the_formulas(words) -> None:
    """Given its gradients: SM3 by entry in float64, and every exchange by sorting."""
    steps = run_distributed(watched, 1, words)[0]
    source = ModelFolder(Path(words[-1].partition("=")[2]))
    exchanges = 0
    for layer, first in steps[0]["numbers"].items():
        out, width = source.tensor(f"{layer}.weight").shape
        values = dict.fromkeys(first.tolist(), 0.0)
        rows, columns = [0.0] * out, [0.0] * width
        for index, step in enumerate(steps):
            if "gradient" in step:
                old = list(rows), list(columns)
                for number, g in zip(sorted(values), step["gradient"][layer].tolist(), strict=True):
                    i, j = divmod(number, width)
                    bound = min(old[0][i], old[1][j]) + g * g
                    values[number] -= LR * g / (sqrt(bound) + EPSILON)
                    rows[i], columns[j] = max(rows[i], bound), max(columns[j], bound)
            else:
                assert index % INTERVAL == SELECTION - 1
                share = 1.0 if index < INTERVAL else 0.2 * (1 - index / len(steps))
                count = round(share * len(values))
                for number in sorted(values, key=lambda n: abs(values[n]))[:count]:
                    del values[number]
                # Some scores are equal, and an entry that goes may not come back.
                free = set(range(out * width)) - set(steps[index - 1]["numbers"][layer].tolist())
                scores = {n: sqrt(rows[n // width] * columns[n % width]) for n in free}
                come = set(step["numbers"][layer].tolist()) - set(values)
                least = sorted(scores.values(), reverse=True)[count - 1] if count else 0.0
                assert len(come) == count and come <= free and all(scores[n] >= least * (1 - 1e-5) for n in come)
                values |= dict.fromkeys(come, 0.0)
                exchanges += count
            assert sorted(values) == step["numbers"][layer].tolist()
            found = dict(zip(sorted(values), step["value"][layer].tolist(), strict=True))
            assert found == pytest.approx(values, rel=1e-4, abs=1e-6)
    norms = [sqrt(sum(float(g.square().sum()) for g in s["gradient"].values())) for s in steps if "gradient" in s]
    assert exchanges > 0 and max(norms) == pytest.approx(0.3, rel=1e-3)
