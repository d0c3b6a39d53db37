"""What fine-tuning of few entries does not go with, refused by name."""

from __future__ import annotations

import pytest

from megasparse.config.checks import check_run, unused_settings
from megasparse.config.loader import ConfigError, load_config

GOOD = ["train.init_from=somewhere", "sparsity.algorithm=dense", "model.vocab_size=64", "train.global_batch_size=8"]
SMT = [*GOOD, "smt.density=0.01"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.init_from=null"], "train.init_from: unset does not go with smt.density; must be the model folder"),
        (["sparsity.algorithm=rigl"], "sparsity.algorithm: rigl does not go with smt.density; must be dense"),
        (["sparsity.algorithm=static"], "sparsity.algorithm: static .* must be dense"),
        (["parallel.tensor_parallel_size=2"], "parallel.tensor_parallel_size: 2 .* must be 1"),
        (["train.precision=fp16"], "train.precision: fp16 .* must be fp32 or bf16"),
        (["train.compile=blocks"], "train.compile: blocks .* must be none"),
        (["stacking.num_layers=1", "stacking.until=0.5"], "stacking.num_layers: 1 .* must be unset"),
        (["layer_dropping.theta=0.5"], "layer_dropping.theta: 0.5 .* must be unset"),
        (["model.activation=relu2", "activation_sparsity.pattern=2:4"], "activation_sparsity.pattern: 2:4"),
        (["model.activation=relu2", "switching.clusters=16"], "switching.clusters: 16 .* must be unset"),
        (["train.steps=100", "optimizer.warmup_steps=2"], "smt.warmup_steps: 100 .* must be below train.steps 100"),
        (["train.skip_step_sigma=6"], "train.skip_step_sigma: 6.0 .* must be unset"),
    ],
)
def test_what_an_adapter_does_not_go_with_is_refused(words: list[str], message: str) -> None:
    check_run(load_config([], SMT), 2)
    with pytest.raises(ConfigError, match=message):
        check_run(load_config([], [*SMT, *words]), 2)


def test_spiel_alone_and_with_a_window_inside_of_its_interval() -> None:
    given = [*GOOD, "spiel.density=0.01"]
    check_run(load_config([], given), 2)
    for words, message in (
        (["smt.density=0.1"], "smt.density: 0.1 does not go with spiel.density; must be unset"),
        (["spiel.interval=4"], "spiel.selection_steps: 5 .* must be at most spiel.interval 4"),
        (["sparsity.algorithm=rigl"], "sparsity.algorithm: rigl does not go with spiel.density; must be dense"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_run(load_config([], [*given, *words]), 2)


def test_settings_without_their_method_are_told() -> None:
    (sentence,) = [text for text in unused_settings(load_config([], [*GOOD, "smt.block_size=16"])) if "smt" in text]
    assert sentence == "used with smt.density only: smt.block_size"
