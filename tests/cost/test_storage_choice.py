"""`sparsity.storage: auto`: packed where it pays, with the reason; kept by runs that go on; the same on all ranks."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megasparse.config.loader import load_config, save_config
from megasparse.config.schema import RunConfig
from megasparse.cost import storage_choice
from megasparse.cost.storage_choice import StorageChoice, agree_on_storage, choose_storage
from megasparse.training.plan import make_plan

BASE = [
    "model.num_layers=2",
    "model.hidden_size=256",
    "model.num_attention_heads=4",
    "model.seq_length=64",
    "model.vocab_size=64",
    "train.global_batch_size=8",
    "sparsity.block_size=32",
    "kernels.block_sparse=cpu",
]
LONG, SHORT = "train.steps=100000", "train.steps=700"


def config_of(*words: str) -> RunConfig:
    return load_config([], [*BASE, "sparsity.storage=auto", *words])


def choice(*words: str, world_size: int = 2, saved: Path | None = None) -> StorageChoice:
    return choose_storage(config_of(*words), 64, world_size, "cpu", saved)


def test_long_runs_are_packed_and_short_ones_are_not() -> None:
    packed, dense = choice(LONG), choice(SHORT)
    assert packed.storage == "packed" and "building the engine anew 8 times" in packed.reason
    assert dense.storage == "dense" and dense.reason.endswith("it is taken from 2 times that")


def test_a_run_that_never_changes_its_capacity_pays_nothing() -> None:
    assert choice(SHORT, "sparsity.algorithm=static").storage == "packed"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["sparsity.block_size=1"], "sparsity.block_size: 1, single weights, does not go with sparsity.storage packed"),
        (["train.precision=fp16"], "train.precision: fp16 does not go with"),
        (["parallel.tensor_parallel_size=2"], "sparsity.balance_shards: false"),
        (["model.num_layers=4", "stacking.num_layers=2"], "stacking.num_layers: 2"),
        (["sparsity.algorithm=dense"], "no matrix is sparse"),
        (["sparsity.density=1.0"], "the density is never low enough"),
        (["kernels.block_sparse=dense"], "dense products are faster for layers.0."),
        (["kernels.block_sparse=auto", "kernels.break_even=0.12"], "dense products are faster for layers.0."),
    ],
)
def test_what_speaks_against_it_is_told(words, reason) -> None:
    found = choice(LONG, *words)
    assert found.storage == "dense" and found.reason.startswith(reason)


def test_slow_products_in_few_steps_do_not_matter(monkeypatch) -> None:
    """As warm-up and restoration are: in the ultra-sparse phase kernels win."""
    monkeypatch.setattr(storage_choice, "saves_work", lambda kernel: kernel != "dense")
    words = [LONG, "kernels.block_sparse=auto", "kernels.break_even=0.2", "sparsity.warmup_end=0.02"]
    words += ["sparsity.restoration_start=0.9", "sparsity.restoration_end=0.92"]
    monkeypatch.setattr("megasparse.cost.layer_kernels.LayerKernels.choice", _above(0.2))
    assert choice(*words).storage == "packed"
    monkeypatch.setattr("megasparse.cost.layer_kernels.LayerKernels.choice", _above(0.05))
    assert choice(*words).storage == "dense"


def _above(limit: float):
    return lambda self, name, density: "dense" if density > limit else "cpu"


def test_a_run_that_goes_on_keeps_its_storage(tmp_path) -> None:
    saved = tmp_path / "config.yaml"
    for storage, words in (("packed", SHORT), ("dense", LONG)):
        save_config(StorageChoice(storage, "").applied_to(config_of()), saved)
        found = choice(words, saved=saved)
        assert (found.storage, found.is_kept) == (storage, True)
    # What has become impossible is not kept.
    save_config(StorageChoice("packed", "").applied_to(config_of()), saved)
    assert choice(LONG, "train.precision=fp16", saved=saved).storage == "dense"
    saved.write_text("sparsity: {storage: both}")
    assert choice(LONG, saved=saved).storage == "packed"


def test_the_plan_tells_what_was_taken_and_why() -> None:
    words = [LONG, "data.tokenizer=null"]
    plan = make_plan(config_of(*words), 2, "cpu")
    asked = make_plan(load_config([], [*BASE, *words, "sparsity.storage=packed"]), 2, "cpu")
    assert plan["storage_choice"]["storage"] == "packed" and asked["storage_choice"] is None
    assert plan["methods"] == [
        "sparsity.storage auto takes packed: " + plan["storage_choice"]["reason"],
        *asked["methods"],
    ]
    assert plan["storage"] == asked["storage"] and plan["bytes"] == asked["bytes"]


def test_all_ranks_take_that_of_the_first() -> None:
    configs = {storage: StorageChoice(storage, "").applied_to(config_of()) for storage in ("dense", "packed")}
    for first, own in product(configs, configs):
        mesh = SimpleNamespace(from_first=lambda mine, first=first: torch.tensor([int(first == "packed")]))
        assert agree_on_storage(configs[own], mesh) == configs[first]


def test_micro_batches_of_a_phase_that_never_comes_are_told() -> None:
    words = ["sparsity.algorithm=spdf", "data.tokenizer=null", "train.micro_batch_size_by_phase={restoration: 1}"]
    warnings = make_plan(config_of(*words), 2, "cpu")["warnings"]
    assert "train.micro_batch_size_by_phase.restoration is not used: the run has no such phase" in warnings


def test_bytes_of_phases_add_up_and_fall_with_the_density() -> None:
    words = ["train.steps=4000", "data.tokenizer=null", "train.micro_batch_size_by_phase={ultra_sparse: 1}"]
    found = {}
    for storage in ("dense", "packed"):
        plan = make_plan(load_config([], [*BASE, *words, f"sparsity.storage={storage}"]), 2, "cpu")
        rows, total = plan["bytes"]["phases"], plan["bytes"]["total"]
        assert rows[0]["start_step"] == 0 and rows[-1]["end_step"] == 4000
        assert all(a["end_step"] == b["start_step"] for a, b in zip(rows, rows[1:], strict=False))
        assert {row["phase"]: row["micro_batch_size"] for row in rows}["ultra_sparse"] == 1
        steps = sum((row["end_step"] - row["start_step"]) * row["sent"]["reduced"] for row in rows)
        assert total["reduced"] == pytest.approx(steps)
        assert plan["memory"]["total"] == total["memory"] == max(row["memory"]["total"] for row in rows)
        found[storage] = max((row for row in rows if row["phase"] == "ultra_sparse"), key=lambda row: row["end_step"])
    parameters = [found[storage]["parameters"] for storage in ("dense", "packed")]
    for kind in ("reduced", "gathered"):
        ratio = found["packed"]["sent"][kind] / found["dense"]["sent"][kind]
        assert ratio == pytest.approx(parameters[1] / parameters[0]) and ratio < 0.25
    assert found["packed"]["optimizer"] < 0.25 * found["dense"]["optimizer"]
