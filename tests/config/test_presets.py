"""The files in configs/: each of them plans at a world size that fits, on a cluster where it fits, and keeps what its
comments and configs/README.md promise."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Any

import processes
import pytest

from megasparse.config.loader import changed_settings, load_config
from megasparse.launching.submission import SlurmJob
from megasparse.planning.assumptions import parse_assumptions
from megasparse.planning.cluster import make_cluster
from megasparse.planning.forecast import forecast
from megasparse.training.plan import make_plan
from megasparse.utils.format import describe_kernel

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
WORLD_SIZES = {
    **{f"gpt2-124m{kind}": 40 for kind in ("", "-base", "-paper")},
    **{f"gpt2-355m{kind}": 40 for kind in ("", "-base", "-paper")},
    **{f"gpt2-{size}{kind}": 80 for size in ("774m", "1.5b") for kind in ("", "-base", "-paper")},
    "llama-1b": 64,
    "llama-7b": 256,
    "llama-70b": 2048,
}
# Fewer topology updates of the same phases: ratios change by less than 5e-4, and planning takes a twentieth of the
# time.
STEPS = {name: 30_000 if name.startswith("gpt2") else 20_000 for name in WORLD_SIZES}
MST = sorted(name for name in WORLD_SIZES if not name.endswith("-base"))
# Of the checkpoints that the model families' papers describe.
PARAMETERS = {
    "gpt2-355m": 355e6,
    "gpt2-774m": 774e6,
    "gpt2-1.5b": 1558e6,
    "llama-1b": 1.1e9,
    "llama-7b": 6.74e9,
    "llama-70b": 68.98e9,
}
# The tokenizer of the quickstart is made by launch/quickstart.sh; a plan needs only its size.
WITHOUT_TOKENIZER = ["data.tokenizer=null", "data.tokenizer_path=null", "model.vocab_size=2048"]
PRESETS = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.glob("*.yaml"))
BASELINES = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.glob("baselines/*.yaml"))
HAS_TOKENIZER = ("quickstart", "quickstart-base", "wide-sparse", *BASELINES)


@cache
def plan(name: str, *overrides: str) -> dict[str, Any]:
    words = [*(WITHOUT_TOKENIZER if name in HAS_TOKENIZER else []), *overrides]
    words += [f"train.steps={STEPS[name]}"] if name in STEPS else []
    return make_plan(load_config([CONFIGS / f"{name}.yaml"], words), WORLD_SIZES.get(name, 2))


def promised(name: str, pattern: str) -> float:
    """The number that a comment of the file states."""
    comment = " ".join(re.findall(r"^# ?(.*)$", (CONFIGS / f"{name}.yaml").read_text(), flags=re.MULTILINE))
    found = re.search(pattern, comment)
    assert found is not None, f"{name}.yaml states no {pattern}"
    return float(found.group(1))


def test_a_plan_says_in_which_units_its_layers_are_sparse() -> None:
    rows = plan("quickstart")["kernels"]["block_sparse"]
    assert rows and all(f"blocks of {row['block_size']}:" in describe_kernel(row) for row in rows)


@pytest.mark.parametrize("name", [*PRESETS, *BASELINES])
def test_every_preset_plans_and_gives_no_setting_in_vain(name: str) -> None:
    result = plan(name)
    assert result["flops"]["algorithmic"] > 0 and result["parallel"]["accumulation_steps"] >= 1
    # Of the machine, not of the preset: whether anything was measured there.
    ignored = ("data.train is unset", "kernels.tune auto: no measurements")
    assert [line for line in result["warnings"] if not any(words in line for words in ignored)] == []


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


@pytest.mark.parametrize("name", MST)
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


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_cost_as_much_as_the_quickstart(name: str) -> None:
    expected = plan("quickstart")["flops"]["algorithmic"]
    assert plan(name)["flops"]["algorithmic"] == pytest.approx(expected, rel=0.01)
    assert changed_settings(load_config([CONFIGS / "quickstart-base.yaml"]), load_config([CONFIGS / f"{name}.yaml"]))


def test_smet_has_the_settings_that_its_comment_names() -> None:
    config = load_config([CONFIGS / "baselines" / "smet.yaml"])
    sparsity, optimizer = config.sparsity, config.optimizer
    assert (sparsity.algorithm, sparsity.growth, sparsity.drop_fraction, sparsity.drop_anneal) == (
        "set",
        None,
        0.1,
        "run",
    )
    assert sparsity.per_weight_step_counts and config.lr_density_rule == (1.0, float("inf"))
    assert optimizer.weight_decay == optimizer.gradient_clipping == 0.0


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_presets_have_the_size_of_their_name(name: str) -> None:
    assert plan(name)["parameters"]["total"] == pytest.approx(PARAMETERS[name], rel=0.03)


@pytest.mark.parametrize("name", ["llama-1b", "llama-7b", "llama-70b"])
def test_comments_state_the_memory_of_a_rank(name: str) -> None:
    assert promised(name, r"([\d.]+) GB a rank") == pytest.approx(plan(name)["memory"]["total"] / 1e9, abs=0.06)


def test_the_paper_presets_differ_in_size_alone() -> None:
    small = load_config([CONFIGS / "gpt2-124m-paper.yaml"])
    for size in ("355m", "774m", "1.5b"):
        changed = changed_settings(small, load_config([CONFIGS / f"gpt2-{size}-paper.yaml"]))
        fields = {line.split(":")[0] for line in changed} - {"run.name", "train.micro_batch_size"}
        assert fields <= {"model.num_layers", "model.hidden_size", "model.num_attention_heads"}, size
    # Batch, steps and optimizer of the recipe.
    train, optimizer = small.train, small.optimizer
    assert (train.global_batch_size, small.model.seq_length, train.steps) == (480, 1024, 600_000)
    assert (optimizer.beta1, optimizer.beta2, optimizer.lr) == (0.9, 0.95, 6e-4)


def test_the_table_of_presets_states_their_plans() -> None:
    page = (CONFIGS / "README.md").read_text().split("## Layouts and clusters", 1)[0]
    rows = dict(re.findall(r"^\| `([\w./-]+)\.yaml` \|.*\| ([^|]*) \|$", page, flags=re.MULTILINE))
    assert sorted(rows) == sorted([*PRESETS, *BASELINES])
    for name, cells in rows.items():
        ratio = re.match(r"[\d.]+", cells)
        if ratio is not None:
            assert float(ratio[0]) == pytest.approx(plan(name)["flops"]["ratio"], abs=5e-4), name


def cluster_rows() -> list[tuple[str, str, int, str]]:
    """Preset, chip, GPUs and memory, as configs/README.md states them."""
    page = (CONFIGS / "README.md").read_text()
    rows = re.findall(
        r"^\| `([\w.-]+)\.yaml` \| ([\d,]+) x `([\w-]+)` \| .* \| ([\d.]+) GB \|", page, flags=re.MULTILINE
    )
    return [(name, chip, int(count.replace(",", "")), memory) for name, count, chip, memory in rows]


def test_the_table_of_clusters_has_every_preset() -> None:
    assert {name for name, *_ in cluster_rows()} == set(WORLD_SIZES)
    counts = [count for _, _, count, _ in cluster_rows()]
    assert min(counts) == 8 and max(counts) == 16384


@pytest.mark.parametrize(("name", "chip", "count", "memory"), cluster_rows(), ids=str)
def test_presets_fit_their_clusters(name: str, chip: str, count: int, memory: str) -> None:
    """The layout that the file states is possible there and fits, with the memory that the table states."""
    result = forecast(load_config([CONFIGS / f"{name}.yaml"]), make_cluster(chip, count), parse_assumptions([]))
    assert result["layout"]["is_given"], result["notes"]
    assert result["memory"]["total"] / 1e9 == pytest.approx(float(memory), abs=0.06)
    assert result["time"]["seconds"] > 0 and result["layouts"]


def test_a_large_preset_is_dry_run_by_the_real_script() -> None:
    script = str(REPOSITORY / "launch" / "pretrain.py")
    words = ["--config", str(CONFIGS / "llama-70b.yaml"), "train.steps=20000", "--dry-run", "--world-size", "16384"]
    done = processes.run(
        [sys.executable, script, *words, "--device", "cuda", "--json"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["parallel"]["data_parallel_size"] == 2048 and result["memory"]["total"] < 72e9


def test_the_slurm_commands_are_options_of_submit_and_ask_for_the_clusters(monkeypatch) -> None:
    page = (REPOSITORY / "launch" / "slurm" / "README.md").read_text().split("## Presets")[1].split("\n## ")[0]
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("python launch/slurm/submit.py")]
    spec = importlib.util.spec_from_file_location("submit", REPOSITORY / "launch" / "slurm" / "submit.py")
    submit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(submit)
    sizes = {(name, count) for name, _, count, _ in cluster_rows()}
    named = set()
    for words in commands:
        monkeypatch.setattr(sys, "argv", words[1:])
        asked = submit.parse_arguments()
        job = SlurmJob(nodes=asked.nodes, tasks_per_node=asked.tasks_per_node, time=asked.time)
        name = Path(asked.config[0]).stem
        assert (name, job.world_size) in sizes and asked.gpus_per_node == asked.tasks_per_node
        named.add(name)
    assert named == {name for name, _ in sizes if not name.endswith(("-base", "-paper"))}
