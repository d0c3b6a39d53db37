"""Conversion from and to transformers: logits, bytes, greedy tokens, at several numbers of ranks; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from harness import run_distributed  # noqa: E402
from random_models import CASES, T, V, content, our_model, random_model, save  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from megasparse.checkpoint.huggingface.exporting import export_huggingface  # noqa: E402
from megasparse.checkpoint.huggingface.importing import import_huggingface  # noqa: E402
from megasparse.checkpoint.model_folder import ModelFolder  # noqa: E402
from megasparse.checkpoint.sources import open_source  # noqa: E402
from megasparse.checkpoint.store import CheckpointError  # noqa: E402
from megasparse.config.loader import ConfigError  # noqa: E402
from megasparse.models import generate  # noqa: E402

TOLERANCE = 1e-5


def tokens() -> torch.Tensor:
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))


def assert_same_logits(got: torch.nn.Module, reference: torch.nn.Module) -> None:
    with torch.no_grad():
        a, b = got(tokens()), reference(tokens())
    a, b = (x if isinstance(x, torch.Tensor) else x.logits for x in (a, b))
    assert b.std() > 0.3
    # float32 on both sides, logits of order 1 after two blocks.
    torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_in_both_directions_and_tokens_too(tmp_path, case) -> None:
    theirs = save(case, tmp_path / "theirs")
    import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    model = our_model(tmp_path / "ours")
    assert_same_logits(model, theirs)
    export_huggingface(open_source(tmp_path / "ours"), tmp_path / "exported")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert type(again) is type(theirs)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(again.eval(), theirs)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), theirs.parameters(), strict=True))
    prompt = tokens()[:1, :5]
    wanted = again.generate(prompt, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(model, prompt, 12, temperature=0.0), wanted)


@pytest.mark.parametrize("case", ["gpt2", "llama3", "mistral-window", "qwen2"])
def test_ten_round_trips_change_no_byte(tmp_path, case) -> None:
    save(case, tmp_path / "theirs", max_shard_size="60KB")
    import_huggingface(tmp_path / "theirs", tmp_path / "ours-0", max_file_bytes=50_000)
    export_huggingface(open_source(tmp_path / "ours-0"), tmp_path / "exported-0", max_file_bytes=50_000)
    assert len(list((tmp_path / "exported-0").glob("*.safetensors"))) > 2
    ours, exported = content(tmp_path / "ours-0"), content(tmp_path / "exported-0")
    for number in range(1, 11):
        import_huggingface(tmp_path / f"exported-{number - 1}", tmp_path / f"ours-{number}", max_file_bytes=50_000)
        export_huggingface(
            open_source(tmp_path / f"ours-{number}"), tmp_path / f"exported-{number}", max_file_bytes=50_000
        )
        assert content(tmp_path / f"ours-{number}") == ours
        assert content(tmp_path / f"exported-{number}") == exported


def divided_logits(mesh, folders: list[str]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: our_model(Path(name), mesh.tensor_parallel)(tokens()) for name in folders}


def divided_logits_of(size: int):
    return {2: divided_logits_by_2, 4: divided_logits_by_4}[size]


def divided_logits_by_2(folders: list[str]) -> dict[str, torch.Tensor]:
    return _divided(2, folders)


def divided_logits_by_4(folders: list[str]) -> dict[str, torch.Tensor]:
    return _divided(4, folders)


def _divided(size: int, folders: list[str]) -> dict[str, torch.Tensor]:
    import os

    from megasparse.parallel import LaunchEnvironment, open_mesh

    with open_mesh(LaunchEnvironment.from_variables(os.environ), 60, size) as mesh:
        logits = divided_logits(mesh, folders)
        mesh.barrier()
    return logits


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.exhaustive), 4])
def test_logits_agree_where_ranks_share_the_model(tmp_path, size) -> None:
    expected, folders = {}, []
    for case in CASES:
        theirs = save(case, tmp_path / f"{case}-theirs")
        import_huggingface(tmp_path / f"{case}-theirs", tmp_path / case)
        folders.append(str(tmp_path / case))
        with torch.no_grad():
            expected[folders[-1]] = theirs(tokens()).logits
    assert V % size
    for logits in run_distributed(divided_logits_of(size), size, folders, timeout=120, with_mesh=False):
        for name, wanted in expected.items():
            torch.testing.assert_close(logits[name], wanted, rtol=TOLERANCE, atol=TOLERANCE)
