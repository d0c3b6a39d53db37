"""Every field of the configuration either may change when a run goes on, or is refused by name with both values."""

from __future__ import annotations

import re

import pytest

from megasparse.config.loader import ConfigError, describe_fields, load_config
from megasparse.config.resuming import FIXED, FREE, announced_changes, check_resume

FIELDS = [name for name, *_ in describe_fields()]
OTHER = {
    "run.seed": "1",
    "data.train": "[{path: x}]",
    "data.valid_fraction": "0.1",
    "model.num_layers": "3",
    "model.hidden_size": "96",
    "model.num_attention_heads": "6",
    "model.num_key_value_heads": "4",
    "model.attention_head_dim": "32",
    "model.ffn_hidden_size": "64",
    "model.seq_length": "512",
    "model.vocab_size": "100",
    "model.vocab_size_multiple": "32",
    "model.position_embedding": "rope",
    "model.rope_theta": "5",
    "model.rope_scaling": "{type: linear, factor: 2}",
    "model.normalization": "rmsnorm",
    "model.normalization_epsilon": "1e-6",
    "model.normalization_position": "post",
    "model.residual_weight": "admin",
    "model.activation": "swiglu",
    "model.bias": "false",
    "model.qkv_bias": "false",
    "model.tie_embeddings": "false",
    "model.init_std": "0.1",
    "train.init_from": "elsewhere",
    "stacking.num_layers": "3",
    "spiel.density": "0.01",
    "spiel.variant": "moment_approximation",
    "spiel.interval": "30",
    "spiel.selection_steps": "3",
    "smt.density": "0.01",
    "smt.block_size": "16",
    "smt.allocation": "matrix",
    "smt.score": "norm",
    "smt.warmup_steps": "7",
    "smt.restore_base_after_warmup": "false",
    "switching.clusters": "16",
    "switching.shards": "2",
    "tensor_train.rank": "4",
    "tensor_train.cores": "3",
    "layer_tying.mode": "dynamic",
    "layer_tying.sources": "[0, 0]",
    "layer_tying.hidden_size": "64",
    "sparsity.algorithm": "dense",
    "sparsity.block_size": "32",
    "sparsity.head": "true",
    "sparsity.low_rank": "2",
    "sparsity.init_density_power": "0.5",
    "sparsity.groups": "[{pattern: layers.*, dense: true}]",
    "sparsity.lr_density_power": "auto",
    "second_order.fisher_block": "8",
    "sparsity.per_weight_step_counts": "true",
    "sparsity.regrowth_warmup_steps": "3",
}
"""A value of every field of `FIXED` that is not its default."""


def test_every_field_stands_in_one_part_of_the_table() -> None:
    free = [f"{section}.{name}" for section, names in FREE.items() for name in names.split()]
    assert sorted([*free, *FIXED]) == sorted(FIELDS)


@pytest.mark.parametrize("field", FIXED)
def test_what_may_not_change_is_refused_by_name_with_both_values(field: str) -> None:
    before, after = load_config([]), load_config([], [f"{field}={OTHER[field]}"])
    check_resume(after, after)
    section, name = field.split(".")
    old = [] if field == "sparsity.groups" else getattr(getattr(before, section), name)
    with pytest.raises(
        ConfigError, match=rf"^{re.escape(field)}: .*, but the run .* has {re.escape(str(old))}; must be"
    ):
        check_resume(before, after)


def test_all_of_them_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        check_resume(load_config([]), load_config([], ["model.num_layers=3", "run.seed=1"]))
    assert [line.split(":")[0] for line in str(raised.value).splitlines()] == ["run.seed", "model.num_layers"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], ["optimizer.lr=1e-3", "train.steps=2000", "sparsity.density=0.3", "deepspeed.zero_stage=3"]),
        (["sparsity.algorithm=static"], ["sparsity.algorithm=rigl"]),
        (["sparsity.per_weight_step_counts=true"], []),
        (["sparsity.per_weight_step_counts=true"], ["sparsity.regrowth_warmup_steps=4"]),
        (["train.init_from=elsewhere"], []),
        (
            ["sparsity.groups=[{pattern: head, density: 0.5}]"],
            ["sparsity.groups=[{pattern: head, density: 0.25, growth: random}]"],
        ),
    ],
)
def test_what_may_change(before: list[str], after: list[str]) -> None:
    check_resume(load_config([], before), load_config([], after))


BORN_SPARSE = ["sparsity.points=[[0,0.2],[0.8,1]]", "sparsity.lr_density_power=auto"]


@pytest.mark.parametrize(
    ("before", "after", "rule"),
    [
        (BORN_SPARSE, ["sparsity.points=[[0,1],[0.1,0.2],[0.8,1]]"], "1.0, with lr_density_cap null"),
        ([*BORN_SPARSE, "train.init_from=elsewhere"], ["train.init_from=null"], "0.5, with lr_density_cap 4.0"),
    ],
)
def test_the_origin_of_the_masks_is_not_forgotten(before: list[str], after: list[str], rule: str) -> None:
    with pytest.raises(ConfigError, match=rf"sparsity.lr_density_power: auto, .* must be {rule}"):
        check_resume(load_config([], before), load_config([], [*before, *after]))
    check_resume(load_config([], before), load_config([], [*before, "sparsity.update_interval=7"]))


BLEND = ["data.train=[{path: web, weight: 3}, {path: code}]", "data.valid_fraction=0.1"]


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (["data.train=[{path: a}, {path: b}]"], r"data.train: sources of weights \[1.0, 1.0\], but .* \[3.0, 1.0\];"),
        (["data.train=[{path: web}]"], r"data.train: sources of weights \[1.0\], but .* \[3.0, 1.0\];"),
        (["data.valid_fraction=0"], "data.valid_fraction: 0.0, but the run to go on with has 0.1;"),
    ],
)
def test_another_order_of_the_samples_is_no_continuation(after: list[str], told: str) -> None:
    before, now = load_config([], BLEND), load_config([], [*BLEND, *after])
    with pytest.raises(ConfigError, match=f"^{told} must be .*, or data.allow_changed=true, with which some samples"):
        check_resume(before, now)
    allowed = load_config([], [*BLEND, *after, "data.allow_changed=true"])
    check_resume(before, allowed)
    assert announced_changes(before, allowed)[-1].startswith(f"the order of the samples, by {told.split(':')[0]}: ")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (BLEND, ["data.train=[{path: moved/web, weight: 0.75}, {path: moved/code, weight: 0.25}]"]),
        (["data.train=[{path: web}]"], ["data.train=[{path: web, weight: 2}]"]),
        ([*BLEND, "data.valid=[{path: test}]"], ["data.valid_fraction=0.3"]),
    ],
)
def test_what_leaves_the_order_of_the_samples_may_change(before: list[str], after: list[str]) -> None:
    check_resume(load_config([], before), load_config([], [*before, *after]))
