"""Contradictions between sections and with the world size, and sentences on settings given in vain."""

from __future__ import annotations

import pytest

from megasparse.config.checks import check_run, unused_settings
from megasparse.config.loader import ConfigError, load_config, save_config

GOOD = ["model.vocab_size=64"]


def test_a_good_run_passes() -> None:
    check_run(load_config([], GOOD), world_size=4)


@pytest.mark.parametrize(
    ("world_size", "overrides", "parts"),
    [
        (3, [], ["train.global_batch_size: 32", "train.micro_batch_size 4 x 3", "multiples of 12"]),
        (1, ["train.micro_batch_size=5"], ["train.global_batch_size: 32", "5 x 1", "multiples of 5"]),
        (16, [], ["train.global_batch_size: 32", "multiples of 64"]),
        (
            4,
            ["train.micro_batch_size_by_phase={ultra_sparse: 3}"],
            ["train.micro_batch_size_by_phase.ultra_sparse: 3 does not divide the 8 samples", "[1, 2, 4, 8]"],
        ),
        (0, [], ["world size 0"]),
        (1, ["deepspeed.zero_stage=0"], ["deepspeed.zero_stage: 0", "train.precision bf16", "must be one of 1"]),
        (
            1,
            ["deepspeed.zero_stage=0", "train.precision=fp32", "deepspeed.offload_optimizer=cpu"],
            ["deepspeed.offload_optimizer: cpu", "at stage 0 it must be none"],
        ),
        (
            1,
            ["deepspeed.gradient_accumulation_dtype=fp32", "train.precision=bf16", "deepspeed.zero_stage=1"],
            ["deepspeed.gradient_accumulation_dtype: fp32", "zero_stage 2 or 3", "it must be precision"],
        ),
        (3, ["parallel.tensor_parallel_size=2"], ["parallel.tensor_parallel_size: 2", "world size 3", "[1, 3]"]),
        (
            8,
            ["parallel.tensor_parallel_size=8"],
            ["parallel.tensor_parallel_size: 8 does not divide model.num_attention_heads 12", "[1, 2, 3, 4, 6, 12]"],
        ),
        (
            4,
            ["parallel.tensor_parallel_size=4", "model.num_key_value_heads=2"],
            ["parallel.tensor_parallel_size: 4 does not divide model.num_key_value_heads 2", "[1, 2]"],
        ),
        (
            4,
            ["parallel.tensor_parallel_size=4", "model.ffn_hidden_size=1002"],
            ["parallel.tensor_parallel_size: 4 does not divide model.ffn_hidden_size 1002", "[1, 2, 3, 6]"],
        ),
        (
            4,
            ["parallel.tensor_parallel_size=4", "parallel.sequence_parallel=true", "model.seq_length=90"],
            ["parallel.tensor_parallel_size: 4 does not divide model.seq_length 90", "[1, 2, 3, 6]"],
        ),
        (1, ["data.tokenizer=sentencepiece"], ["data.tokenizer_path: needed by data.tokenizer sentencepiece"]),
        (1, ["model.vocab_size=null"], ["model.vocab_size: unset"]),
        (1, ["optimizer.warmup_steps=1001"], ["optimizer.warmup_steps: 1001", "1000", "must be 0 to 1000"]),
        (
            1,
            ["attention.overrides=[{layers: [12], pattern: local}]"],
            ["attention.overrides.0.layers: 12", "must be 0 to 11"],
        ),
        (
            1,
            ["attention.overrides=[{pattern: local}, {heads: [0, 40], pattern: local}]"],
            ["attention.overrides.1.heads: 40", "must be 0 to 11"],
        ),
        (
            1,
            ["attention.overrides=[{every: 4, first: 12, pattern: local}]"],
            ["attention.overrides.0.first: 12 does not exist", "must be 0 to 11"],
        ),
        (
            1,
            ["attention.overrides=[{heads: 0.01, pattern: local}]"],
            ["attention.overrides.0.heads: 0.01 of 12 heads is none", "at least 1 head"],
        ),
        (
            1,
            ["attention.stride_offsets=[0, 1, 2]"],
            ["attention.stride_offsets: 3 offsets for 12 query heads", "none, spread, or a list of 12"],
        ),
        (1, ["stacking.num_layers=5"], ["stacking.num_layers: 5 must be below model.num_layers 12", "1, 2, 3, 4, 6"]),
        (1, ["stacking.num_layers=12"], ["stacking.num_layers: 12 must be below", "must be one of 1, 2, 3, 4, 6"]),
        (1, ["stacking.num_layers=1", "model.num_layers=1"], ["stacking.num_layers: 1", "must be unset"]),
        (
            1,
            ["stacking.num_layers=4", "stacking.until=0.04", "train.steps=10"],
            ["stacking.until: 0.04 of train.steps 10 is step 0", "at least one step"],
        ),
        (1, ["stacking.num_layers=4", "stacking.until=0.97", "train.steps=10"], ["stacking.until: 0.97", "step 10"]),
        (
            1,
            ["stacking.num_layers=4", "attention.overrides=[{layers: [1, 5], pattern: local}]"],
            ["attention.overrides.0: says something else of layer 9 than of layer 1", "every: 4"],
        ),
    ],
)
def test_contradictions_name_field_value_and_possible_values(world_size, overrides, parts) -> None:
    config = load_config([], [*GOOD, *overrides])
    with pytest.raises(ConfigError) as caught:
        check_run(config, world_size)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["sparsity.algorithm=dense", "sparsity.density=0.2"],
            "not used by sparsity.algorithm dense: sparsity.density",
        ),
        (
            ["sparsity.algorithm=set", "sparsity.warmup_end=0.2", "sparsity.restoration_end=0.9"],
            "not used by sparsity.algorithm set: sparsity.restoration_end, sparsity.warmup_end",
        ),
        (
            ["sparsity.algorithm=gradual", "sparsity.restoration_shape=cubic"],
            "not used by sparsity.algorithm gradual: sparsity.restoration_shape",
        ),
        (
            ["sparsity.points=[[0,1],[1,0.5]]", "sparsity.warmup_end=0.2", "sparsity.density=0.3"],
            "sparsity.points replaces sparsity.density, sparsity.warmup_end",
        ),
        (
            ["sparsity.algorithm=static", "sparsity.growth=random", "sparsity.drop_anneal=none"],
            "not used by sparsity.algorithm static: sparsity.drop_anneal, sparsity.growth",
        ),
        (
            ["sparsity.growth=random", "sparsity.growth_ratio=2"],
            "sparsity.growth_ratio is used by sparsity.growth mixed",
        ),
        (
            ["sparsity.algorithm=set", "sparsity.growth_ratio=2"],
            "sparsity.growth_ratio is used by sparsity.growth mixed",
        ),
        (["sparsity.drop_score_lambda=2"], "sparsity.drop_score_lambda is used by sparsity.drop_score"),
        (["sparsity.shape_steps=2"], "sparsity.shape_steps is used by the shape `steps` only"),
        (
            ["attention.windows=[{start: 0, end: 1, pattern: local}]", "attention.phases={dense: local}"],
            "attention.windows replaces attention.phases",
        ),
        (
            ["attention.stride_offsets=spread", "attention.phases={ultra_sparse: local}"],
            "attention.stride_offsets is used by the patterns strided, sparse and fixed only",
        ),
        (
            ["attention.dense_fallback=true", "kernels.hybrid_attention=tiled"],
            "attention.dense_fallback true is used with kernels.hybrid_attention auto only",
        ),
        (
            ["train.compile=blocks", "kernels.elementwise=cpu"],
            "kernels.elementwise cpu is not used with train.compile blocks",
        ),
        (["data.valid=[{path: a}]", "data.valid_fraction=0.1"], "data.valid replaces data.valid_fraction"),
        (["data.reset_positions=true"], "data.reset_positions is used with data.document_masking true only"),
        (
            ["data.document_masking=true", "data.reset_positions=true", "model.position_embedding=rope"],
            "data.reset_positions changes nothing under model.position_embedding rope",
        ),
        (["optimizer.decay_fraction=0.1"], "optimizer.decay_fraction is used by optimizer.schedule wsd only"),
        (
            ["optimizer.schedule=wsd", "optimizer.decay_fraction=0.1", "optimizer.decay_start=dense"],
            "optimizer.decay_start dense replaces optimizer.decay_fraction",
        ),
        (
            ["optimizer.schedule=constant", "optimizer.decay_start=dense"],
            "optimizer.decay_start is not used by optimizer.schedule constant",
        ),
        (
            ["sparsity.algorithm=dense", "optimizer.decay_start=dense"],
            "optimizer.decay_start dense changes nothing in a run that is dense from its beginning",
        ),
        (["sparsity.init_density_power=0.5"], "sparsity.init_density_power changes nothing in a run that begins dense"),
        (
            ["sparsity.init_density_power=0.5", "train.init_from=folder", "sparsity.algorithm=static"],
            "sparsity.init_density_power is not used with train.init_from",
        ),
        (["stacking.until=0.2"], "stacking.until is used with stacking.num_layers only"),
        (["distillation.epsilon=0"], "used with distillation.teacher only: distillation.epsilon"),
        (["task.kind=classification", "task.limit=3"], "used with task.path only: task.kind, task.limit"),
        (
            ["task.path=x.jsonl", "task.kind=classification", "task.max_tokens=9"],
            "task.max_tokens is used by task.kind answer only",
        ),
        (["distillation.teacher=x", "distillation.temperature=2"], "distillation.temperature is used with"),
        (
            ["distillation.teacher=x", "distillation.hidden_weight=0", "distillation.tokens=all"],
            "used with distillation.hidden_weight above 0 only: distillation.tokens",
        ),
        (["sparsity.capacity_change_cost=2"], "sparsity.capacity_change_cost is used by sparsity.storage packed"),
        (["data.valid=[{path: a, weight: 9}, {path: b}]"], "data.valid.weight is not used"),
        (["sparsity.fold_low_rank=true"], "sparsity.fold_low_rank is used with sparsity.low_rank above 0 only"),
        (["model.rope_theta=5000"], "model.rope_theta is used by model.position_embedding rope only"),
    ],
)
def test_settings_given_in_vain_are_named(overrides, sentence) -> None:
    assert any(found.startswith(sentence) for found in unused_settings(load_config([], overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["sparsity.algorithm=dense"],
        ["sparsity.warmup_end=0.2", "sparsity.growth_ratio=2", "sparsity.density=0.2"],
        ["sparsity.growth=random", "sparsity.growth_ratio=2", "sparsity.groups=[{pattern: a, growth: mixed}]"],
        ["sparsity.drop_score_lambda=2", "sparsity.groups=[{pattern: a, drop_score: magnitude_gradient}]"],
        ["sparsity.algorithm=spdf", "sparsity.restoration_start=0.5"],
        ["sparsity.warmup_shape=steps", "sparsity.shape_steps=3"],
        ["optimizer.schedule=wsd", "optimizer.decay_fraction=0.1"],
        ["optimizer.schedule=wsd", "optimizer.decay_start=dense"],
        ["sparsity.points=[[0,0.2],[0.8,1]]", "sparsity.init_density_power=0.5"],
        ["data.document_masking=true", "data.reset_positions=true"],
        ["stacking.num_layers=4", "stacking.until=0.2"],
    ],
)
def test_settings_with_an_effect_are_not_named(overrides) -> None:
    assert unused_settings(load_config([], overrides)) == []


def test_a_saved_configuration_names_nothing_in_vain(tmp_path) -> None:
    """A saved file spells out every field; what equals its default was not meant by anybody."""
    config = load_config([], ["sparsity.algorithm=set", "train.steps=50"])
    save_config(config, tmp_path / "config.yaml")
    assert unused_settings(load_config([tmp_path / "config.yaml"])) == unused_settings(config) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.activation=relu2", "activation_sparsity.pattern=2:4"],
            "sparsity.low_rank: 4 does not go with activation_sparsity.pattern 2:4; must be 0",
        ),
        (
            ["sparsity.fold_low_rank=true", "sparsity.head=true", "model.tie_embeddings=true"],
            "sparsity.fold_low_rank: true does not go with a sparse head that is tied",
        ),
    ],
)
def test_low_rank_branches_are_refused_where_they_would_change_what_is_computed(words, message) -> None:
    given = ["model.vocab_size=64", "sparsity.low_rank=4"]
    with pytest.raises(ConfigError, match=message):
        check_run(load_config([], [*given, *words]), 1)
    for without in ("sparsity.low_rank=0", "sparsity.algorithm=dense"):
        check_run(load_config([], [*given, *words, without]), 1)
