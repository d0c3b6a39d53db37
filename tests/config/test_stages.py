"""The name map of a model that grows in depth, and the configurations of its stages."""

from __future__ import annotations

import pytest
from extensions_setup import SETTINGS

from megasparse.config.checks import check_run
from megasparse.config.loader import ConfigError, load_config
from megasparse.config.stages import copies, growth_step, is_small, original, small_stage, stage_of, with_layers
from megasparse.training.plan import make_plan

WORDS = ["model.num_layers=8", "stacking.num_layers=2", "stacking.until=0.25", "train.steps=10"]


def test_layers_are_copied_in_turn() -> None:
    assert original("layers.5.mlp.up.weight", 2) == "layers.1.mlp.up.weight"
    assert original("active/layers.12.attention.qkv", 3) == "active/layers.0.attention.qkv"
    assert original("embedding.tokens.weight", 2) == "embedding.tokens.weight"
    assert copies("layers.1.mlp.up", 2, 8) == [f"layers.{layer}.mlp.up" for layer in (1, 3, 5, 7)]
    assert copies("ever/head", 2, 8) == ["ever/head"]
    assert original("sublayers.5.weight", 2) == "sublayers.5.weight"


def test_the_stages_of_a_run() -> None:
    whole = load_config([], [*WORDS, "attention.overrides=[{every: 2, first: 1, pattern: local}, {pattern: fixed}]"])
    small = small_stage(whole)
    assert growth_step(whole) == 2 and growth_step(load_config([])) is None
    assert is_small(small) and not is_small(whole) and small.model.num_layers == 2
    assert [override.layer_numbers(2) for override in small.attention.overrides] == [[1], [0, 1]]
    assert stage_of(whole, {"num_layers": 2}) == small and stage_of(whole, {"num_layers": 8}) == whole
    again = with_layers(small, 8)
    assert [o.layer_numbers(8) for o in again.attention.overrides] == [[1, 3, 5, 7], list(range(8))]
    assert small.train == whole.train and small.sparsity == whole.sparsity


@pytest.mark.parametrize("layers", ["[0, 2, 4, 6]", "[0, 1, 2, 3, 4, 5, 6, 7]", "[]"])
def test_exceptions_of_attention_that_copies_share_are_allowed(layers: str) -> None:
    words = [*WORDS, "model.vocab_size=64", f"attention.overrides=[{{layers: {layers}, pattern: local}}]"]
    check_run(load_config([], words), 1)


TINY = [*SETTINGS, *WORDS]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["sparsity.groups=[{pattern: layers.0.*, density: 0.5}, {pattern: '*'}]"],
            r"sparsity.groups: layer layers.2.attention.qkv has other settings than layers.0.attention.qkv, whose copy",
        ),
        (["sparsity.depth_boost=0.5"], r"sparsity.depth_boost: 0.5 gives copies another density .* at step 2, .* be 0"),
    ],
)
def test_layers_that_cannot_take_over_what_the_small_model_has_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(load_config([], [*TINY, *words]), 1)


@pytest.mark.parametrize(
    "words",
    [
        ["sparsity.groups=[{pattern: layers.*.mlp.*, density: 0.5}]"],
        ["sparsity.depth_boost=0.5", "sparsity.points=[[0,1],[0.3,1],[0.5,0.5],[0.7,1]]"],
    ],
)
def test_layers_that_can_are_not(words: list[str]) -> None:
    stages = make_plan(load_config([], [*TINY, *words]), 1)["stages"]
    assert [stage["num_layers"] for stage in stages] == [2, 8]
