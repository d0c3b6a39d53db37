"""Which settings may change when a run goes on from a checkpoint: one table of all fields.

check_resume(load_config([folder / "config.yaml"]), config)         # ConfigError names field, old and new value

What is saved belongs to the fields of `FIXED`: with other values the saved state would not fit, or would mean something
else, as a position in the data does where the samples stand in another order. All other fields are in `FREE`: a change
takes effect from the next step on, and is announced.
"""

from __future__ import annotations

from collections.abc import Callable
from math import fsum, inf, isclose
from typing import Any

from megasparse.config.adapters import SmtConfig
from megasparse.config.loader import ConfigError, changed_settings
from megasparse.config.schema import ModelConfig, RunConfig, SparsityConfig

Rule = Callable[[RunConfig, RunConfig], bool]
"""(configuration that the run was last started with, that of now) -> whether the change must be refused."""


OTHER_ORDER = "some samples come again and others are left out"
"""What follows where the position in the data, a number of samples, is counted on in samples of another order."""


def _always(before: RunConfig, after: RunConfig) -> bool:
    return True


def _gains_or_loses_masks(before: RunConfig, after: RunConfig) -> bool:
    return "dense" in (before.sparsity.algorithm, after.sparsity.algorithm)


def _lacks_step_counts(before: RunConfig, after: RunConfig) -> bool:
    return _counts_steps(after.sparsity) and not _counts_steps(before.sparsity)


def _counts_steps(sparsity: SparsityConfig) -> bool:
    return sparsity.per_weight_step_counts or sparsity.regrowth_warmup_steps > 0


def _changes_blocks(before: RunConfig, after: RunConfig) -> bool:
    """As far as that can be told without the names of the layers; the topology that is loaded tells the rest."""
    old, new = (
        [(g.pattern, g.dense, g.block_size) for g in run.sparsity.groups if g.dense or g.block_size]
        for run in (before, after)
    )
    return old != new


def _starts_elsewhere(before: RunConfig, after: RunConfig) -> bool:
    """The folder may have been deleted since, and then the setting is left out."""
    return after.train.init_from is not None


def _becomes_auto(before: RunConfig, after: RunConfig) -> bool:
    """Whether saved masks come from trained weights is known only to runs that had `auto` from their beginning."""
    return after.sparsity.lr_density_power == "auto"


def _changes_blend(before: RunConfig, after: RunConfig) -> bool:
    """Whether the sources have other shares of the samples; what lies in them is compared by their fingerprints."""
    old, new = (_shares(run) for run in (before, after))
    return len(old) != len(new) or not all(isclose(a, b, rel_tol=1e-12) for a, b in zip(old, new, strict=True))


def _shares(run: RunConfig) -> list[float]:
    weights = [source.weight for source in run.data.train or ()]
    return [weight / fsum(weights) for weight in weights]


def _changes_split(before: RunConfig, after: RunConfig) -> bool:
    """Where sets for validation come in place of the fraction, or go, their fingerprints tell."""
    old, new = before.data, after.data
    return old.valid is None and new.valid is None and old.valid_fraction != new.valid_fraction


def _unless_allowed(rule: Rule) -> Rule:
    return lambda before, after: not after.data.allow_changed and rule(before, after)


ORDERING: dict[str, Rule] = {"data.train": _changes_blend, "data.valid_fraction": _changes_split}
"""Fields that decide which sample stands at a position, and when they do so otherwise than before."""


FIXED: dict[str, Rule] = {
    "run.seed": _always,
    **{field: _unless_allowed(rule) for field, rule in ORDERING.items()},
    **{f"model.{name}": _always for name in ModelConfig.model_fields},
    "train.init_from": _starts_elsewhere,
    "stacking.num_layers": _always,
    **{f"smt.{name}": _always for name in SmtConfig.model_fields},
    "spiel.density": _always,
    "spiel.variant": _always,
    "spiel.interval": _always,
    "spiel.selection_steps": _always,
    "switching.clusters": _always,
    "switching.shards": _always,
    "tensor_train.rank": _always,
    "tensor_train.cores": _always,
    "layer_tying.mode": _always,
    "layer_tying.sources": _always,
    "layer_tying.hidden_size": _always,
    "sparsity.algorithm": _gains_or_loses_masks,
    "sparsity.block_size": _always,
    "sparsity.head": _always,
    "sparsity.low_rank": _always,
    "sparsity.init_density_power": _always,
    "sparsity.groups": _changes_blocks,
    "sparsity.lr_density_power": _becomes_auto,
    "second_order.fisher_block": _always,
    "sparsity.per_weight_step_counts": _lacks_step_counts,
    "sparsity.regrowth_warmup_steps": _lacks_step_counts,
}

FREE: dict[str, str] = {
    "run": "name folder",
    "attention": "stride stride_offsets phases windows overrides dense_fallback",
    "data": "valid document_masking reset_positions tokenizer tokenizer_path allow_changed",
    "optimizer": "lr min_lr_ratio warmup_steps schedule decay_fraction decay_start beta1 beta2 epsilon "
    "weight_decay gradient_clipping",
    "train": "steps global_batch_size micro_batch_size micro_batch_size_by_phase precision "
    "activation_recomputation compile log_interval "
    "valid_interval valid_samples save_interval keep_checkpoints resume stop_after trackers sample_tokens "
    "sample_prompt profile_steps distributed_timeout_seconds step_timeout_seconds start_timeout_seconds "
    "skip_step_sigma max_skipped_steps",
    "stacking": "until",
    "sparsity": "density warmup_end restoration_start restoration_end warmup_shape restoration_shape shape_steps "
    "points distribution depth_boost update_interval drop_fraction drop_anneal drop_score drop_score_lambda growth "
    "growth_ratio regrown row_floor fold_low_rank balance_shards skip_optimizer_on_update lr_density_cap "
    "storage capacity_change_cost",
    "distillation": "teacher states cross_entropy_weight logits_weight hidden_weight temperature layer_map tokens "
    "epsilon reduction last_state ratio_over",
    "activation_sparsity": "pattern warmup_steps kernel",
    "layer_dropping": "theta gamma together",
    "second_order": "gradients damping",
    "layer_tying": "interval reward discount lr epsilon_decay epsilon_floor",
    "task": "path kind choices marker max_tokens limit batch_size",
    "spiel": "drop_fraction",
    "switching": "active threshold interval period share dense_end",
    "kernels": "block_sparse break_even dense hybrid_attention elementwise optimizer loss tune",
    "parallel": "tensor_parallel_size sequence_parallel",
    "deepspeed": "zero_stage offload_optimizer gradient_accumulation_dtype extra",
}
"""Names by section."""


def check_resume(before: RunConfig, after: RunConfig) -> None:
    """Raise ConfigError for each field whose change the saved state does not allow, with both values."""
    found = []
    for field, refuses in FIXED.items():
        old, new = (_value(run, field) for run in (before, after))
        if old != new and refuses(before, after):
            allowed = f", or data.allow_changed=true, with which {OTHER_ORDER}" if field in ORDERING else ""
            told = f"{field}: {new}, but the run to go on with has {old}; must be {old}, or another run.name"
            found.append(told + allowed)
    if after.sparsity.lr_density_power == "auto" and before.lr_density_rule != after.lr_density_rule:
        power, cap = before.lr_density_rule
        found.append(
            "sparsity.lr_density_power: auto, but with the settings of now the run would have begun otherwise than it "
            f"has; must be {power}, with lr_density_cap {'null' if cap == inf else cap}"
        )
    if found:
        raise ConfigError("\n".join(found))


def announced_changes(before: RunConfig, after: RunConfig) -> list[str]:
    """What is told of a run that goes on with other settings, a line each."""
    fields = [field for field, changes in ORDERING.items() if changes(before, after)]
    told = [f"the order of the samples, by {' and '.join(fields)}: {OTHER_ORDER}"] if fields else []
    return [*changed_settings(before, after), *told]


def _value(config: RunConfig, field: str) -> Any:
    section, name = field.split(".")
    value = getattr(getattr(config, section), name)
    if field == "data.train" and value is not None:
        # Paths may change: data that was moved is the same data.
        return f"sources of weights {[source.weight for source in value]}"
    return [group.model_dump(exclude_defaults=True) for group in value] if field == "sparsity.groups" else value
