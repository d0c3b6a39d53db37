"""The files in configs/: each of them plans at a world size that fits, and keeps what its comments promise."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megasparse.config.loader import load_config
from megasparse.training.plan import make_plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WORLD_SIZES = {"gpt2-124m": 40, "gpt2-124m-base": 40, "gpt2-124m-paper": 40, "llama-1b": 64}
# The tokenizer of the quickstart is made by launch/quickstart.sh; a plan needs only its size.
WITHOUT_TOKENIZER = ["data.tokenizer=null", "data.tokenizer_path=null", "model.vocab_size=2048"]
HAS_TOKENIZER = ("quickstart", "wide-sparse")


@cache
def plan(name: str, *overrides: str) -> dict[str, Any]:
    words = [*(WITHOUT_TOKENIZER if name in HAS_TOKENIZER else []), *overrides]
    return make_plan(load_config([CONFIGS / f"{name}.yaml"], words), WORLD_SIZES.get(name, 2))


def promised(name: str, pattern: str) -> float:
    """The number that a comment of the file states."""
    comment = " ".join(re.findall(r"^# ?(.*)$", (CONFIGS / f"{name}.yaml").read_text(), flags=re.MULTILINE))
    found = re.search(pattern, comment)
    assert found is not None, f"{name}.yaml states no {pattern}"
    return float(found.group(1))


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_preset_plans_and_gives_no_setting_in_vain(name: str) -> None:
    result = plan(name)
    assert result["flops"]["algorithmic"] > 0 and result["parallel"]["accumulation_steps"] >= 1
    assert [line for line in result["warnings"] if "data.train is unset" not in line] == []


def test_the_paper_preset_costs_about_a_quarter_at_a_mean_density_of_about_a_fifth() -> None:
    result = plan("gpt2-124m-paper")
    assert 0.23 <= result["flops"]["ratio"] <= 0.27
    assert 0.17 <= result["schedule"]["mean_density"] <= 0.23
    assert [phase["name"] for phase in result["schedule"]["phases"]] == [
        "warm_up",
        "ultra_sparse",
        "restoration",
        "dense",
    ]


@pytest.mark.parametrize("name", ["gpt2-124m-paper", "gpt2-124m", "llama-1b"])
def test_comments_state_the_plan(name: str) -> None:
    result = plan(name)
    mean = promised(name, r"[Mm]ean density(?: of the sparse matrices)? (0\.\d+)")
    assert mean == pytest.approx(result["schedule"]["mean_density"], abs=5e-4)
    assert promised(name, r"algorithmic FLOPs (0\.\d+) of dense") == pytest.approx(result["flops"]["ratio"], abs=5e-4)
    assert promised(name, r"(\d\.\d+)x less") == pytest.approx(1 / result["flops"]["ratio"], abs=5e-3)


def test_variants_that_comments_mention_cost_what_they_say() -> None:
    ratio = plan("gpt2-124m", "sparsity.head=true")["flops"]["ratio"]
    assert promised("gpt2-124m", r"head=true the plan gives (0\.\d+)") == pytest.approx(ratio, abs=5e-4)
    ratio = plan("gpt2-124m-paper", "attention.phases={ultra_sparse: full}")["flops"]["ratio"]
    assert promised("gpt2-124m-paper", r"all along it is (0\.\d+)") == pytest.approx(ratio, abs=5e-4)


def test_the_wide_sparse_model_costs_as_much_as_the_dense_quickstart() -> None:
    wide, dense = plan("wide-sparse"), plan("quickstart", "sparsity.algorithm=dense")
    assert wide["flops"]["algorithmic"] == pytest.approx(dense["flops"]["algorithmic"], rel=0.02)
    for name, result, density in (("wide-sparse", wide, r"0\.16"), ("quickstart", dense, "1")):
        stated = promised("wide-sparse", rf"density {density} +([\d.]+) MFLOPs a token")
        per_token = result["flops"]["algorithmic"] / result["tokens"]["total"]
        assert stated == pytest.approx(per_token / 1e6, abs=0.05), name
    assert wide["parameters"]["total"] > 3 * dense["parameters"]["total"]


def test_the_llama_preset_has_the_size_of_its_name() -> None:
    assert 1.1e9 <= plan("llama-1b")["parameters"]["total"] <= 1.3e9


def test_the_table_of_presets_states_their_plans() -> None:
    page = (CONFIGS / "README.md").read_text().split("## How files build", 1)[0]
    rows = dict(re.findall(r"^\| `([\w-]+)\.yaml` \|.*\| ([^|]*) \|$", page, flags=re.MULTILINE))
    assert sorted(rows) == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    for name, cells in rows.items():
        ratio = re.match(r"[\d.]+", cells)
        if ratio is not None:
            assert float(ratio[0]) == pytest.approx(plan(name)["flops"]["ratio"], abs=5e-4), name
