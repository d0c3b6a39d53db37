"""A run of tied layers tells one number of parameters: before it, after it and of what it has saved."""

from __future__ import annotations

import json

from runs import command, run
from tool_calls import call

from megasparse.checkpoint.weights import find_checkpoint, load_model_weights


def test_shared_parameters_count_once_wherever_they_are_told(corpus, tmp_path) -> None:
    words = ["sparsity.algorithm=dense", "layer_tying.mode=fixed", "layer_tying.sources=[0,0]", "train.stop_after=1"]
    run(command(corpus, tmp_path, "run.name=run", *words, ranks=1))
    folder = tmp_path / "run"
    weights = load_model_weights(find_checkpoint(folder)[0])
    # The second of two layers has the weights of the first; the head has those of the embedding.
    wanted = sum(weight.numel() for name, weight in weights.items() if not name.startswith(("layers.1.", "head.")))
    plan, summary = (json.loads((folder / f"{name}.json").read_text()) for name in ("plan", "summary"))
    assert plan["parameters"]["total"] == summary["parameters"] == summary["distinct_parameters"] == wanted
    status, printed = call("inspect_checkpoint", "--json", folder)
    assert status == 0, printed
    saved = json.loads(printed)
    assert saved["parameters"] == saved["active_parameters"] == wanted
