"""The DeepSpeed dictionary of a run, derived from its ``RunConfig``. Nothing else in the package writes such keys.

Expert keys pass through ``deepspeed.extra``; those that are derived here are refused, so that there is one truth.
"""

from __future__ import annotations

from typing import Any

from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig

# Keys of DeepSpeed that another setting of ours decides, and which one.
DERIVED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "the section optimizer",
    "scheduler": "the section optimizer",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "zero_allow_untested_optimizer": "MegaSparse's own optimizer",
    "tensorboard": "train.trackers",
    "wandb": "train.trackers",
    "steps_per_print": "train.log_interval",
    "timers.throughput": "MegaSparse's own tokens_per_s",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.offload_optimizer": "deepspeed.offload_optimizer",
    "zero_force_ds_cpu_optimizer": "deepspeed.offload_optimizer",
    "data_types.grad_accum_dtype": "deepspeed.gradient_accumulation_dtype",
}


def deepspeed_dict(config: RunConfig, data_parallel_size: int, device: str = "cpu") -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``. Raises ConfigError for an expert key that is derived.

    device: type of the device that trains.
    """
    check_extra(config.deepspeed.extra)
    train = config.train
    derived: dict[str, Any] = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.accumulation_steps(data_parallel_size),
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own line per n steps would stand beside ours.
        "steps_per_print": 2**31 - 1,
        # Its timer, which nobody reads, waits for the device before and after every micro-batch.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {"stage": config.deepspeed.zero_stage},
    }
    if config.deepspeed.offload_optimizer != "none":
        derived["zero_optimization"]["offload_optimizer"] = {"device": config.deepspeed.offload_optimizer}
        # Our optimizer steps on the CPU too; DeepSpeed's own knows nothing of densities.
        derived["zero_force_ds_cpu_optimizer"] = False
    elif data_parallel_size > 1 and config.deepspeed.zero_stage in (1, 2):
        # A bucket of gradients is reduced while the backward pass fills the next one. DeepSpeed's own size, 500 million
        # elements, holds all of most models, so that nothing would overlap; this one is Megatron-LM's. On CPUs nothing
        # overlaps, but a whole bucket is taken from memory in every step, and other tensors lie in what was one.
        derived["zero_optimization"]["reduce_bucket_size"] = max(40_000_000, 1_000_000 * data_parallel_size)
        if device == "cuda":
            derived["zero_optimization"]["overlap_comm"] = True
    if config.deepspeed.gradient_accumulation_dtype == "fp32":
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    if train.precision == "bf16":
        derived["bf16"] = {"enabled": True}
    if train.precision == "fp16":
        derived["fp16"] = {"enabled": True}
    return _merge(derived, config.deepspeed.extra)


def check_extra(extra: dict[str, Any]) -> None:
    """Raise ConfigError where an expert key is one that MegaSparse derives."""
    for name, owner in DERIVED_KEYS.items():
        section, _, key = name.partition(".")
        if section not in extra:
            continue
        if key and not isinstance(extra[section], dict):
            raise ConfigError(f"deepspeed.extra.{section}: {extra[section]!r} is not allowed; must be a section")
        if not key or key in extra[section]:
            raise ConfigError(f"deepspeed.extra.{name}: derived from {owner}; set it there")


def _merge(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    merged = dict(lower)
    for key, value in upper.items():
        both_sections = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_sections else value
    return merged
