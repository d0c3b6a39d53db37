"""A run goes on with every setting that may change, and ends well. For those that may not: tests/config."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from extensions_setup import SETTINGS, write_corpus
from harness import run_distributed

from megasparse.config.loader import load_config
from megasparse.config.resuming import FREE
from megasparse.launching import LaunchEnvironment
from megasparse.training.run import pretrain

WORDS = [*SETTINGS, "attention.stride=4"]
OTHER = {
    "attention.stride": "8",
    "attention.stride_offsets": "spread",
    "attention.phases": "{}",
    "attention.windows": "[{start: 0, end: 1, pattern: local}]",
    "attention.overrides": "[{layers: [1], pattern: local}]",
    "attention.dense_fallback": "true",
    "data.valid_fraction": "0.2 data.allow_changed=true",
    "data.document_masking": "true",
    "optimizer.lr": "1e-3",
    "optimizer.min_lr_ratio": "0.5",
    "optimizer.warmup_steps": "8",
    "optimizer.schedule": "wsd",
    "optimizer.beta1": "0.8",
    "optimizer.beta2": "0.9",
    "optimizer.epsilon": "1e-6",
    "optimizer.weight_decay": "0",
    "optimizer.gradient_clipping": "0",
    "train.steps": "18",
    "train.global_batch_size": "12",
    "train.micro_batch_size": "2",
    "train.micro_batch_size_by_phase": "{ultra_sparse: 8, restoration: 2}",
    "train.precision": "bf16",
    "train.activation_recomputation": "true",
    "train.log_interval": "1",
    "train.valid_interval": "2",
    "train.save_interval": "2",
    "train.keep_checkpoints": "1",
    "train.stop_after": "10",
    "train.skip_step_sigma": "6",
    "spiel.drop_fraction": "0.1",
    "train.max_skipped_steps": "3",
    "layer_tying.interval": "2",
    "sparsity.density": "0.5",
    "sparsity.points": "[[0, 1], [0.9, 0.2]]",
    "sparsity.distribution": "erdos_renyi",
    "sparsity.depth_boost": "0.2",
    "sparsity.update_interval": "3",
    "sparsity.drop_fraction": "0.1",
    "sparsity.drop_anneal": "none",
    "sparsity.drop_score": "snip",
    "sparsity.growth": "random",
    "sparsity.row_floor": "true sparsity.density=0.5",
    "sparsity.skip_optimizer_on_update": "true",
    "sparsity.lr_density_power": "0",
    "sparsity.balance_shards": "true",
    "sparsity.algorithm": "set",
    "sparsity.storage": "packed",
    "sparsity.groups": "[{pattern: layers.0.*, density: 0.3}]",
    "second_order.damping": "0.1",
    "second_order.gradients": "2",
    "kernels.block_sparse": "reference",
    "kernels.hybrid_attention": "reference",
    "deepspeed.zero_stage": "3",
}
"""Another value of what the state of a run might not fit."""
IN_PART = {"data.valid_fraction", "sparsity.algorithm", "sparsity.groups", "sparsity.lr_density_power"}
"""Fields that may change to some values only, or with another setting."""
ALWAYS = (
    "data.valid_fraction",
    "train.precision",
    "sparsity.algorithm",
    "sparsity.groups",
    "sparsity.row_floor",
    "train.global_batch_size",
)


def go_on(words: Sequence[str], folder: Path, changes: Sequence[Sequence[str]]) -> list[str]:
    """Stop a run, go on with each of the changes on its own copy; how each ended."""
    environment, found = LaunchEnvironment.from_variables(os.environ), []
    pretrain(load_config([], [*words, "run.name=stopped", "train.stop_after=6"]), environment)
    for number, change in enumerate(changes):
        name = f"changed-{number}"
        shutil.copytree(folder / "stopped", folder / name)
        try:
            config = load_config([], [*words, f"run.name={name}", "train.resume=auto", *change])
            summary = pretrain(config, environment)
            found.append(summary["reason"])
        except ValueError as error:
            found.append(str(error))
    return found


def test_the_values_here_are_of_fields_that_may_change() -> None:
    free = {f"{section}.{name}" for section, names in FREE.items() for name in names.split()}
    assert set(OTHER) - free == IN_PART


@pytest.mark.parametrize("fields", [ALWAYS, pytest.param(tuple(OTHER), marks=pytest.mark.exhaustive)])
def test_a_run_goes_on_with_every_setting_that_may_change(tmp_path: Path, fields: tuple[str, ...]) -> None:
    # Where a value needs another setting, that stands after it.
    changes = [re.split(r" (?=sparsity|data)", f"{field}={OTHER[field]}") for field in fields]
    found = run_distributed(go_on, 1, [*WORDS, *write_corpus(tmp_path)], tmp_path, changes, with_mesh=False)[0]
    expected = ["stopped after step 10 (train.stop_after)" if f == "train.stop_after" else "finished" for f in fields]
    assert dict(zip(fields, found, strict=True)) == dict(zip(fields, expected, strict=True))
