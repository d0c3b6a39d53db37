"""From a folder of transformers to a pruned one: transformers computes what our model does, and the zeros are exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from random_models import V, our_model, save  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from megasparse.conversion.huggingface.exporting import export_huggingface  # noqa: E402
from megasparse.conversion.huggingface.importing import import_huggingface  # noqa: E402
from megasparse.conversion.sources import open_source  # noqa: E402
from megasparse.data.indexed import IndexedDatasetWriter  # noqa: E402
from megasparse.launching import LaunchEnvironment  # noqa: E402
from megasparse.pruning.patterns import parse_pattern  # noqa: E402
from megasparse.pruning.run import prune  # noqa: E402
from megasparse.pruning.settings import PruneSettings  # noqa: E402


@pytest.mark.parametrize(("case", "pattern"), [("llama3", "2:4"), ("gpt2", "unstructured"), ("mistral-window", "4x4")])
def test_there_and_back(tmp_path, case, pattern) -> None:
    theirs = save(case, tmp_path / "theirs")
    import_huggingface(tmp_path / "theirs", tmp_path / "dense")
    writer = IndexedDatasetWriter(tmp_path / "tokens", np.uint16)
    writer.add_document(np.random.default_rng(0).integers(0, V, 600))
    writer.finalize()
    rule = parse_pattern(pattern)
    density = None if rule.group else 0.5
    calibration = {"calibration": str(tmp_path / "tokens"), "samples": 9, "window": 30}
    settings = PruneSettings(tmp_path / "dense", tmp_path / "sparse", pattern=rule, density=density, **calibration)
    prune(settings, LaunchEnvironment.from_variables({}))
    export_huggingface(open_source(tmp_path / "sparse"), tmp_path / "exported")

    exported, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval(), our_model(tmp_path / "sparse")
    tokens = torch.randint(V, (2, 21))
    with torch.no_grad():
        expected = exported(tokens).logits
        torch.testing.assert_close(ours(tokens)[..., :V], expected, rtol=1e-4, atol=1e-4)
        # The weights have changed.
        assert not torch.allclose(theirs(tokens).logits, expected, rtol=1e-2, atol=1e-2)
    matrices = [
        weight for name, weight in exported.named_parameters()
        if weight.dim() == 2 and not any(word in name for word in ("embed", "wte", "wpe", "lm_head"))
    ]  # fmt: skip
    zeros = sum(int((weight == 0).sum()) for weight in matrices)
    assert zeros * 2 == sum(weight.numel() for weight in matrices) > 0
