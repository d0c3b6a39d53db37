"""Sparse Matrix Tuning: what it trains and what it leaves, in every ZeRO stage and over stops, against plain code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_runs import MODEL, RUN, adaptation, run_cases
from engine_runs import Layout, make_batches, run_config
from harness import run_distributed
from initial_runs import write_folder

from megasparse.checkpoint.model_folder import ModelFolder, load_weights, pad_rows
from megasparse.models.build import build_model

SMT = ["smt.density=0.1", "smt.block_size=16", "smt.warmup_steps=4"]
KEPT = "smt.restore_base_after_warmup=false"
STOPS = (2, 4, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smt")
    write_folder(folder / "base", [*MODEL, "model.vocab_size=97"])
    return folder


@pytest.fixture(scope="module")
def words(folder) -> list[str]:
    return [*SMT, "model.vocab_size=97", f"train.init_from={folder / 'base'}"]


@pytest.fixture(scope="module")
def alone(folder, words) -> dict[str, dict]:
    cases = [
        ("stopped", words, Layout(1, 1, 0, 1)),
        ("kept", [*words, KEPT], Layout(1, 1, 0, 2)),
        ("stopped bf16", [*words, KEPT, "train.precision=bf16"], Layout(1, 1, 1, 1)),
    ]
    return run_distributed(run_cases, 1, cases, folder / "alone", STOPS)[0]


def plain_warmup(words: list[str], steps: int) -> tuple[list[float], dict, dict]:
    """Losses, sums of gradients and weights of full fine-tuning of the matrices, with torch alone."""
    config = run_config([*RUN, *words])
    plain = config.model_copy(update={"smt": type(config.smt)()})
    model = build_model(plain, 97)
    load_weights(model, ModelFolder(Path(config.train.init_from)))
    matrices = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and (".attention." in name or ".mlp." in name)
    }
    settings = config.optimizer
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(
        matrices.values(), lr=settings.lr, betas=betas, eps=settings.epsilon, weight_decay=settings.weight_decay
    )
    losses, sums = [], {name: torch.zeros_like(weight) for name, weight in matrices.items()}
    for batch in make_batches(config)[:steps]:
        logits = model(batch[:, :-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, list(matrices.values()))
        for (name, weight), gradient in zip(matrices.items(), gradients, strict=True):
            weight.grad = gradient
            sums[name] += gradient
        torch.nn.utils.clip_grad_norm_(matrices.values(), settings.gradient_clipping)
        optimizer.step()
    return losses, sums, {name: weight.detach() for name, weight in matrices.items()}


def test_the_warmup_is_full_fine_tuning_and_the_blocks_are_those_of_largest_gradients(alone, words) -> None:
    losses, sums, weights = plain_warmup([*words, "optimizer.warmup_steps=0"], 4)
    assert run_config([*RUN, *words]).optimizer.warmup_steps == 0, "the plain run has no warm-up of the rate"
    for name in ("stopped", "kept"):
        assert alone[name]["curve"][:4] == pytest.approx(losses, rel=1e-5)
    for name, base in alone["kept"]["base"].items():
        torch.testing.assert_close(base, weights[f"{name}.weight"], rtol=1e-4, atol=1e-5)
    for kind in (".attention.", ".mlp."):
        scores, places = [], []
        for name, total in sums.items():
            for row in range(0, total.shape[0], 16) if kind in name else ():
                for column in range(0, total.shape[1], 16):
                    scores.append(float(total[row : row + 16, column : column + 16].abs().mean()))
                    places.append((name.removesuffix(".weight"), row // 16 * -(-total.shape[1] // 16) + column // 16))
        count = round(0.1 * sum(total.numel() for name, total in sums.items() if kind in name) / 256)
        best = {places[at] for at in torch.tensor(scores).topk(count).indices.tolist()}
        found = {(name, n) for name, ns in alone["stopped"]["numbers"].items() if kind in name for n in ns.tolist()}
        assert found == best and len(found) == count


def test_all_but_the_chosen_blocks_stays_bit_for_bit(alone, folder) -> None:
    source, result = ModelFolder(folder / "base"), alone["stopped"]
    trained, moved = adaptation(result), 0
    for name in source.names:
        before, after = source.tensor(name), result["weights"][name]
        if before.dim() == 2:
            before = pad_rows(before, after.shape[0])
        layer = name.removesuffix(".weight")
        if layer not in result["numbers"]:
            assert torch.equal(before, after), name
            continue
        assert torch.equal(trained.merged(layer, before), after), "the model computes with what is exported"
        moved += int((before != after).sum())
    inside = sum(values.count_nonzero() for values in result["values"].values())
    assert 0.9 * inside < moved <= inside, "a step may be too small to be seen"
    assert result["curve"][-1] < result["curve"][4], "it learns after the base has come back"


def test_optimizer_and_gradient_are_as_small_as_what_is_trained(alone) -> None:
    """Moments, a step count and a gradient: 14 bytes an entry, where full fine-tuning has 12 for every weight. At 1 %
    that is 1.17 %."""
    result = alone["stopped"]
    trained = sum(values.numel() for values in result["values"].values())
    assert result["trained"] == trained, "no other parameter is left, so that none has a gradient"
    assert result["bytes"] == trained * (4 + 4 + 2)
    assert 0.01 * (4 + 4 + 2 + 4) / (4 + 4 + 4) < 0.02


def test_a_base_that_is_kept_goes_on_from_the_warmup(alone) -> None:
    kept, restored = alone["kept"]["curve"], alone["stopped"]["curve"]
    # Batches differ by less than what the warm-up gains.
    assert kept[4] < kept[0] - 0.2 and restored[4] == pytest.approx(restored[0], abs=0.1)
    assert not alone["stopped"]["base"]


@pytest.mark.parametrize("name", ["stopped", "stopped bf16"])
def test_it_resumes_bit_for_bit_within_and_after_the_warmup(alone, name) -> None:
    straight, again = alone[name], alone[f"{name} again"]
    assert again["curve"] == straight["curve"]
    for kind in ("numbers", "values", "base", "weights"):
        assert set(again[kind]) == set(straight[kind])
        assert all(torch.equal(tensor, straight[kind][key]) for key, tensor in again[kind].items()), kind


def test_it_is_the_same_in_every_zero_stage(alone, folder, words) -> None:
    layouts = [Layout(2, 1, 0, 1), Layout(2, 1, 1, 2), Layout(2, 1, 2, 1), Layout(2, 1, 3, 2)]
    cases = [("stopped" if layout.zero == 3 else str(layout), words, layout) for layout in layouts]
    recomputed = ("recomputed", [*words, "train.activation_recomputation=true"], Layout(2, 1, 3, 1))
    found = run_distributed(run_cases, 2, [*cases, recomputed], folder / "pair", STOPS)[0]
    for name, result in found.items():
        assert result["curve"] == pytest.approx(alone["stopped"]["curve"], rel=2e-5), name
        for layer, numbers in alone["stopped"]["numbers"].items():
            assert torch.equal(numbers, result["numbers"][layer]), (name, layer)
            wanted = alone["stopped"]["values"][layer]
            torch.testing.assert_close(result["values"][layer], wanted, rtol=1e-3, atol=2e-5)
    assert found["stopped again"]["curve"] == found["stopped"]["curve"]
