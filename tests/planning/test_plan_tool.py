"""tools/plan.py and what it reads: words, cluster files, bandwidths; bad input ends with status 2 and one line."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import processes
import pytest

from megasparse.config.loader import ConfigError
from megasparse.data.arguments import run_tool
from megasparse.planning.chips import CHIPS
from megasparse.planning.cluster import make_cluster, parse_bandwidth, read_cluster

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "plan.py"
MODEL = [
    *("model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4", "model.vocab_size=300"),
    *("sparsity.block_size=16", "train.steps=2000", "train.global_batch_size=32", "train.micro_batch_size=2"),
]


@pytest.fixture
def plan(monkeypatch, capsys):
    """Runs the tool in this process: (exit status, what it printed, what it complained about)."""
    spec = importlib.util.spec_from_file_location("plan_tool", SCRIPT)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *words])
        arguments = tool.parse_arguments()
        status = run_tool("plan", lambda: tool.main(arguments))
        return status, *capsys.readouterr()

    return run


def test_tables_name_what_matters(plan) -> None:
    status, printed, _ = plan(*MODEL, "--chip", "a100-80gb", "--count", "16", "--network", "200Gb", "--top", "2")
    assert status == 0
    text = " ".join(printed.split())
    for words in ("16 x NVIDIA A100", "25 GB/s a rank", "ultra-sparse", "Cheapest layouts", "extrapolated"):
        assert words in text, words
    for name in ("kernel_efficiency", "pue", "memory_reserve"):
        assert name in text


def test_the_table_of_chips_is_printed_with_sources(plan) -> None:
    status, printed, _ = plan("--chips")
    assert status == 0 and all(name in printed for name in CHIPS) and "data sheet" in printed


def test_json_from_a_cluster_file_where_options_win(tmp_path) -> None:
    """The script itself, as a user starts it."""
    path = tmp_path / "cluster.yaml"
    path.write_text("chip: h100\ncount: 8\ngpus_per_node: 4\nnetwork: 100Gb\n")
    words = ["--cluster", str(path), "--count", "16", "--json", "--assume", "pue=1.5", *MODEL]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    done = processes.run([sys.executable, SCRIPT, *words], env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    cluster = result["cluster"]
    assert (cluster["chip"], cluster["count"], cluster["ranks_per_node"], cluster["nodes"]) == ("h100", 16, 4, 4)
    assert cluster["network_bandwidth"] == 12.5e9 and result["energy"]["pue"] == 1.5
    assert cluster["source"] and cluster["as_of"]
    given = {row["name"]: row["given"] for row in result["assumptions"]}
    assert given["pue"] and not given["kernel_efficiency"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--chip", "h900", "--count", "8"), "plan: error: --chip: 'h900' is unknown; must be one of here, v100"),
        (("--count", "8"), "plan: error: --chip: needed"),
        (("--chip", "h100", "--count", "8", "--config", "missing.yaml"), "no such file"),
        (("--cluster", "missing.yaml"), "plan: error: --cluster: no such file"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(plan, words, message) -> None:
    status, printed, complaint = plan(*MODEL, *words)
    assert status == 2 and message in complaint
    assert len(complaint.strip().splitlines()) == 1 and printed == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- h100\n", "must hold keys and values"),
        ("gpus: 8\n", "'gpus' is unknown; must be one of chip, count"),
        ("count: eight\n", "count: 'eight' is not allowed; it must be a whole number"),
        ("chip: 100\n", "chip: 100 is not allowed"),
        ("chip: [\n", "not readable as YAML"),
        ("!!python/object/apply:os.system ['true']\n", "not readable as YAML"),
    ],
)
def test_bad_cluster_files(tmp_path, content, message) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_cluster(path)


@pytest.mark.parametrize(
    ("text", "expected"), [("400Gb", 50e9), ("50GB", 50e9), ("25 GB/s", 25e9), ("200Gbps", 25e9), ("1.6Tb/s", 200e9)]
)
def test_bandwidths(text, expected) -> None:
    assert parse_bandwidth(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["400", "fast", "-1GB", "0Gb", "400GiB"])
def test_bad_bandwidths(text) -> None:
    with pytest.raises(ConfigError, match="--network: .*must be"):
        parse_bandwidth(text)


def test_collectives_between_nodes_share_the_adapters() -> None:
    cluster = make_cluster("h100", 64, network="50GB")
    link = CHIPS["h100"].link_bandwidth
    assert cluster.bandwidth(8) == link
    assert cluster.bandwidth(64) == 8 * 50e9
    # With 8 tensor-parallel neighbours a data-parallel ring has one rank in each node, and one adapter.
    assert cluster.bandwidth(8, stride=8) == 50e9
    assert cluster.bandwidth(2, stride=4) == link


def test_every_chip_has_a_source_and_plausible_numbers() -> None:
    for chip in CHIPS.values():
        assert chip.source and chip.watts > 0 and chip.ranks_per_node == 8
        assert chip.link_bandwidth >= chip.network_bandwidth and chip.memory_bandwidth > chip.link_bandwidth
        assert 10e12 <= chip.peak["fp32"] < chip.peak["fp16"] <= 2500e12
        # FLOPs a byte of the roofline's ridge, of all these chips within a narrow range.
        assert 80 <= chip.peak["fp16"] / chip.memory_bandwidth <= 320
