"""The dictionary for DeepSpeed: derived numbers, expert keys passed on, derived keys refused."""

from __future__ import annotations

import pytest

from megasparse.config.deepspeed import DERIVED_KEYS, deepspeed_dict
from megasparse.config.loader import ConfigError, check_config

TRAIN = {"global_batch_size": 48, "micro_batch_size": 4}


def test_numbers_follow_from_the_configuration() -> None:
    config = check_config({"train": TRAIN, "optimizer": {"gradient_clipping": 0.5}, "deepspeed": {"zero_stage": 1}})
    derived = deepspeed_dict(config, data_parallel_size=3)
    assert derived["train_batch_size"] == 48
    assert derived["train_micro_batch_size_per_gpu"] == 4
    assert derived["gradient_accumulation_steps"] == 4
    assert derived["gradient_clipping"] == 0.5
    assert derived["zero_optimization"]["stage"] == 1
    assert derived["bf16"] == {"enabled": True} and "fp16" not in derived


@pytest.mark.parametrize(("precision", "keys"), [("fp32", set()), ("bf16", {"bf16"}), ("fp16", {"fp16"})])
def test_precision_turns_on_one_section(precision, keys) -> None:
    config = check_config({"train": {**TRAIN, "precision": precision}})
    assert {"bf16", "fp16"} & set(deepspeed_dict(config, 1)) == keys


def test_expert_keys_pass_and_merge() -> None:
    extra = {"wall_clock_breakdown": True, "zero_optimization": {"overlap_comm": False}}
    derived = deepspeed_dict(check_config({"train": TRAIN, "deepspeed": {"extra": extra}}), 1)
    assert derived["wall_clock_breakdown"] is True
    assert derived["zero_optimization"] == {"stage": 1, "overlap_comm": False}
    assert extra == {"wall_clock_breakdown": True, "zero_optimization": {"overlap_comm": False}}


@pytest.mark.parametrize("name", sorted(DERIVED_KEYS))
def test_derived_keys_are_refused_and_say_who_decides(name) -> None:
    section, _, key = name.partition(".")
    extra = {section: {key: 1}} if key else {section: {"enabled": True}}
    config = check_config({"train": TRAIN, "deepspeed": {"extra": extra}})
    with pytest.raises(ConfigError) as caught:
        deepspeed_dict(config, 1)
    assert f"deepspeed.extra.{name}: derived from {DERIVED_KEYS[name]}" in str(caught.value)


def test_every_derived_key_is_guarded() -> None:
    """What the dictionary holds without expert keys cannot be given twice."""
    for precision in ("fp32", "bf16", "fp16"):
        derived = deepspeed_dict(check_config({"train": {**TRAIN, "precision": precision}}), 1)
        guarded = {name.partition(".")[0] for name in DERIVED_KEYS}
        assert set(derived) <= guarded


@pytest.mark.parametrize("value", [3, [1], "stage"])
def test_a_section_that_is_none_is_refused(value) -> None:
    config = check_config({"train": TRAIN, "deepspeed": {"extra": {"zero_optimization": value}}})
    with pytest.raises(ConfigError, match="deepspeed.extra.zero_optimization: .* must be a section"):
        deepspeed_dict(config, 1)


@pytest.mark.parametrize("stage", [1, 2])
def test_communication_overlaps_with_the_backward_pass_on_gpus(stage) -> None:
    config = check_config({"train": TRAIN, "deepspeed": {"zero_stage": stage}})
    on_gpus = deepspeed_dict(config, 4, "cuda")["zero_optimization"]
    assert on_gpus == {"stage": stage, "overlap_comm": True, "reduce_bucket_size": 40_000_000}
    big = {"train": {"global_batch_size": 64, "micro_batch_size": 1}, "deepspeed": {"zero_stage": stage}}
    assert deepspeed_dict(check_config(big), 64, "cuda")["zero_optimization"]["reduce_bucket_size"] == 64_000_000
    assert deepspeed_dict(config, 4)["zero_optimization"] == {"stage": stage, "reduce_bucket_size": 40_000_000}
    assert deepspeed_dict(config, 1, "cuda")["zero_optimization"] == {"stage": stage}
    offloaded = {"zero_stage": stage, "offload_optimizer": "cpu"}
    derived = deepspeed_dict(check_config({"train": TRAIN, "deepspeed": offloaded}), 4, "cuda")
    assert "overlap_comm" not in derived["zero_optimization"]
    off = {"zero_stage": stage, "extra": {"zero_optimization": {"overlap_comm": False}}}
    derived = deepspeed_dict(check_config({"train": TRAIN, "deepspeed": off}), 4, "cuda")
    assert derived["zero_optimization"]["overlap_comm"] is False


def test_gradients_are_summed_in_float32_where_that_is_asked_for() -> None:
    section = {"zero_stage": 2, "gradient_accumulation_dtype": "fp32"}
    derived = deepspeed_dict(check_config({"train": TRAIN, "deepspeed": section}), 1)
    assert derived["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in deepspeed_dict(check_config({"train": TRAIN}), 1)
