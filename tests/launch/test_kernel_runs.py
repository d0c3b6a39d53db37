"""Runs whose sparse layers change their kernel on the way, from the outside."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from runs import REPOSITORY, command, curve, metrics, run

from megasparse.config.loader import load_config
from megasparse.kernels.common.tables import Measurement
from megasparse.kernels.hybrid_attention import fast_kernel
from megasparse.kernels.hybrid_attention.break_even import TABLE, Row
from megasparse.utils.hardware import hardware_name


def test_kernels_change_at_the_break_even_density_and_leave_the_curve(corpus: Path, tmp_path: Path) -> None:
    mixed = run(command(corpus, tmp_path, "run.name=mixed", "kernels.break_even=0.5"))
    run(command(corpus, tmp_path, "run.name=dense", "kernels.block_sparse=dense", ranks=1))
    lines, dense = metrics(tmp_path / "mixed"), metrics(tmp_path / "dense")
    # Sums in float32 in another order, over 24 steps.
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in dense], rel=1e-4)
    (density, phase, lr, norm, flops), other = (curve(tmp_path / name)[0][4:] for name in ("mixed", "dense"))
    # One rank adds up the squares of a gradient in another order than two.
    assert (density, phase, lr, pytest.approx(norm, rel=1e-6), flops) == other
    # Below the break-even density the FLOPs that are executed fall with the algorithmic ones.
    assert lines[-1]["flops_executed"] < dense[-1]["flops_executed"]
    assert "kernels: 8 layers dense -> cpu (attention.qkv, attention.output, mlp.up, mlp.down)" in mixed.stdout
    assert "8 layers cpu -> dense" in mixed.stdout
    plan = json.loads((tmp_path / "mixed" / "plan.json").read_text())
    assert lines[-1]["flops_executed"] == pytest.approx(plan["flops"]["executed"], rel=1e-12)
    assert {row["kernel"] for row in plan["kernels"]["block_sparse"]} == {"cpu"}
    for line in (tmp_path / "mixed" / "topology.jsonl").read_text().splitlines():
        entry = json.loads(line)
        assert entry["kernels"] == ({"cpu": 8} if max(entry["densities"].values()) <= 0.5 else {"dense": 8})
    summary = json.loads((tmp_path / "mixed" / "summary.json").read_text())
    assert summary["kernels"]["layers_at_end"] == {"dense": 8} and summary["kernels"]["device"] == "cpu"
    assert "8 by the kernel cpu" in (tmp_path / "mixed" / "report.html").read_text()


def test_without_a_compiler_a_run_is_dense_and_says_so_once(corpus: Path, tmp_path: Path) -> None:
    variables = {"CXX": "no-such-compiler", "MEGASPARSE_CACHE": str(tmp_path / "cache")}
    words = ["run.name=plain", "train.stop_after=6"]
    done = run(command(corpus, tmp_path, *words, ranks=1), variables=variables)
    assert done.stdout.count("no C++ compiler found: no-such-compiler") == 1
    assert not list((tmp_path / "cache").glob("*.so"))
    forced = run(command(corpus, tmp_path, "kernels.block_sparse=cpu", ranks=1), variables=variables, expect=2)
    assert "kernels.block_sparse: 'cpu' cannot run: no C++ compiler" in forced.stdout


def test_the_tuner_writes_a_table_that_its_machine_reads(tmp_path: Path) -> None:
    tool = [sys.executable, str(REPOSITORY / "tools" / "tune_kernels.py"), "--shapes", "32x64", "--blocks", "16", "24"]
    tool += ["--tokens", "16", "--rounds", "1", "--precisions", "fp32"]
    variables = {"MEGASPARSE_CACHE": str(tmp_path)}
    table = tmp_path / "break_even.json"
    dry = run([*tool, "--dry-run"], variables=variables)
    assert "break-even" in dry.stdout and "sparsity.block_size 24" in dry.stdout and not table.exists()
    run(tool, variables=variables)
    (measurement,) = json.loads(table.read_text())["measurements"]
    assert measurement["device"] == "cpu" and measurement["threads"] == 1 and len(measurement["rows"]) == 1
    table.write_text("{")
    assert "no table of break-even measurements" in run(tool, variables=variables, expect=2).stdout
    assert table.read_text() == "{"


def test_the_tuner_measures_attention_patterns(tmp_path: Path) -> None:
    tool = [sys.executable, str(REPOSITORY / "tools" / "tune_kernels.py"), "--attention", "--lengths", "16", "24"]
    tool += ["--strides", "8", "--head-dims", "8", "--rounds", "1", "--precisions", "fp32"]
    variables = {"MEGASPARSE_CACHE": str(tmp_path)}
    table = tmp_path / "attention_break_even.json"
    assert "beats dense" in run([*tool, "--dry-run"], variables=variables).stdout and not table.exists()
    run(tool, variables=variables)
    (measurement,) = json.loads(table.read_text())["measurements"]
    fastest = fast_kernel("cpu", torch.float32, 8)
    pairs = list(product(dict.fromkeys((fastest, "tiled")), ("local", "strided", "sparse", "fixed")))
    # Full attention is torch's, or that of the compiled kernel.
    wanted = [("cpu", "full"), *pairs] if fastest == "cpu" else pairs
    assert [(row["kernel"], row["pattern"]) for row in measurement["rows"]] == wanted
    assert measurement["device"] == "cpu" and "--attention" in measurement["command"]
    table.write_text("{")
    assert "attention_break_even.json: no table" in run(tool, variables=variables, expect=2).stdout


def test_a_first_start_measures_once_and_all_that_a_table_decides_follows(corpus: Path, tmp_path: Path) -> None:
    """Without a compiler only the attention by tiles is left to be measured: at 32 tokens full attention is faster."""
    variables = {"CXX": "no-such-compiler", "MEGASPARSE_CACHE": str(tmp_path / "cache")}
    table = tmp_path / "cache" / "attention_break_even.json"
    words = ["kernels.tune=auto", "attention.dense_fallback=true", "run.name=new"]
    first = run(command(corpus, tmp_path, *words, "train.stop_after=2"), variables=variables)
    assert first.stdout.count("measuring the kernels on this machine") == 1, "rank 0 tells, the other one reads"
    assert first.stdout.index("measuring") < first.stdout.index("Plan of new")
    (measurement,) = json.loads(table.read_text())["measurements"]
    assert (measurement["hardware"], measurement["threads"]) == (hardware_name("cpu"), 1)
    assert [(row["pattern"], list(row["seconds"])) for row in measurement["rows"]] == [("sparse", ["32"])]
    assert load_config([tmp_path / "new" / "config.yaml"]).attention.dense_fallback == ["sparse"]
    before = table.read_bytes()
    again = run(command(corpus, tmp_path, *words, "train.resume=auto", "train.stop_after=4"), variables=variables)
    assert "measuring" not in again.stdout and table.read_bytes() == before


def test_a_run_settles_its_dense_fallback_and_keeps_to_it(corpus: Path, tmp_path: Path) -> None:
    """A table that says that full attention is faster than `sparse` is there at the first start only."""
    seconds = {"32": {"kernel": 2.0, "mask": 3.0, "dense": 1.0}, "64": {"kernel": 1.0, "mask": 3.0, "dense": 2.0}}
    row = Row(fast_kernel("cpu", torch.float32, 16), "float32", "sparse", 8, 16, 4, seconds)
    variables = {"MEGASPARSE_CACHE": str(tmp_path / "cache")}
    table = tmp_path / "cache" / "attention_break_even.json"
    TABLE.write(table, [Measurement(hardware_name("cpu"), "cpu", 1, (row,), {}, "by hand", "2026-01-01")])
    words = ["run.name=wide", "attention.dense_fallback=true", "attention.stride_offsets=spread"]
    words += ["attention.phases={ultra_sparse: sparse, restoration: strided}", "kernels.block_sparse=dense"]
    words += ["attention.overrides=[{heads: 0.5, pattern: fixed}, {every: 2, first: 1, pattern: local}]"]
    told = "attention.dense_fallback: full attention runs in place of sparse"
    first = run(command(corpus, tmp_path, *words, "train.stop_after=8", ranks=1), variables=variables)
    table.unlink()
    again = run(command(corpus, tmp_path, *words, "train.resume=auto", ranks=1), variables=variables)
    for done in (first, again):
        assert told in done.stdout and f"{told}," not in done.stdout
    assert "attention.dense_fallback: [" not in again.stdout, "nothing has changed since the first start"
    folder = tmp_path / "wide"
    assert load_config([folder / "config.yaml"]).attention.dense_fallback == ["sparse"]
    plan, lines = json.loads((folder / "plan.json").read_text()), metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert lines[-1]["flops_algorithmic"] == pytest.approx(plan["flops"]["algorithmic"], rel=1e-12)
