"""Runs from the outside: to the end, stopped and resumed, killed, terminated, refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from processes import LIMIT_SECONDS
from runs import (
    LONG,
    REPOSITORY,
    command,
    curve,
    golden_path,
    golden_text,
    metrics,
    rank_process,
    run,
    start,
    wait_for_checkpoint,
    wait_for_steps,
    write_corpus,
)

from megasparse.checkpoint.reader import Checkpoint
from megasparse.checkpoint.weights import load_model_weights


def weights(run_folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_model_weights(run_folder / "checkpoints" / f"step-{step:08d}")


def test_a_run_goes_through_all_phases_and_ends_dense_with_a_report(straight: Path) -> None:
    lines = metrics(straight)
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert list(dict.fromkeys(line["phase"] for line in lines)) == ["warm_up", "ultra_sparse", "restoration", "dense"]
    assert min(line["density"] for line in lines) == pytest.approx(0.2, abs=0.02)
    validated = [line["val_loss"] for line in lines if "val_loss" in line]
    assert len(validated) == 3 and validated[-1] < validated[0]
    assert_golden(straight, "mst")
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["finished"] and summary["final_density"] == 1.0
    assert {"config.yaml", "plan.json", "report.html", "sample.txt", "topology.jsonl"} <= set(os.listdir(straight))


def test_the_ledger_adds_up(straight: Path) -> None:
    lines = metrics(straight)
    plan = json.loads((straight / "plan.json").read_text())
    assert lines[-1]["flops_algorithmic"] == pytest.approx(plan["flops"]["algorithmic"], rel=1e-12)
    assert lines[-1]["flops_executed"] == pytest.approx(plan["flops"]["executed"], rel=1e-12)
    assert lines[-1]["flops_dense"] == pytest.approx(plan["flops"]["dense"], rel=1e-12)
    parts = [value for key, value in lines[-1].items() if key.startswith("seconds_")]
    assert sum(parts) == pytest.approx(lines[-1]["seconds"], rel=1e-6)
    assert lines[-1]["flops_algorithmic"] < 0.8 * lines[-1]["flops_dense"]


@pytest.mark.parametrize("stop_after", [7, pytest.param(13, marks=pytest.mark.exhaustive)])
def test_resume_continues_bit_for_bit(corpus: Path, straight: Path, tmp_path: Path, stop_after: int) -> None:
    """Step 7 is inside the fall, one past a topology update; 13 inside the ultra-sparse phase; accumulation is 2."""
    assert_resumes(corpus, straight, tmp_path, stop_after)


@pytest.mark.exhaustive
def test_resume_inside_a_logging_window_loses_nothing_of_it(corpus: Path, tmp_path: Path) -> None:
    run(command(corpus, tmp_path / "whole", "run.name=straight", "train.log_interval=5"))
    assert_resumes(corpus, tmp_path / "whole" / "straight", tmp_path, 8, "train.log_interval=5")


def assert_resumes(corpus: Path, straight: Path, tmp_path: Path, stop_after: int, *overrides: str) -> None:
    """A run stopped at a step and gone on with makes the curve and the weights of `straight`."""
    name = "run.name=straight"
    first = run(command(corpus, tmp_path, name, f"train.stop_after={stop_after}", *overrides))
    assert "stop_after" in first.stdout
    if not overrides and stop_after == 7:
        again = run(command(corpus, tmp_path, name, f"train.stop_after={stop_after}", "train.resume=auto"))
        assert "stop_after" in again.stdout and curve(tmp_path / "straight")[-1][0] == 7, "it has stopped there already"
    second = run(command(corpus, tmp_path, name, "train.resume=auto", *overrides))
    assert f"going on from step {stop_after}" in second.stdout
    assert curve(tmp_path / "straight") == curve(straight)
    expected, resumed = weights(straight, 24), weights(tmp_path / "straight", 24)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


LAYOUTS = {
    "one rank": (1, []),
    "tensor parallel at stage 3": (2, ["parallel.tensor_parallel_size=2", "deepspeed.zero_stage=3"]),
    "four ranks, tokens divided": (4, ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"]),
}


@pytest.fixture(scope="module")
def double(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data-parallel ranks at stage 1, stopped after 14 steps."""
    folder = tmp_path_factory.mktemp("double")
    run(command(corpus, folder, "run.name=double", "train.stop_after=14"))
    return folder / "double"


@pytest.mark.parametrize(
    "layout", ["one rank", pytest.param("tensor parallel at stage 3", marks=pytest.mark.exhaustive), *list(LAYOUTS)[2:]]
)
def test_every_layout_makes_the_same_curve_and_topology(
    corpus: Path, straight: Path, double: Path, tmp_path: Path, layout: str
) -> None:
    """Against two data-parallel ranks at stage 1, over the fall and into the ultra-sparse phase."""
    ranks, overrides = LAYOUTS[layout]
    run(command(corpus, tmp_path, "run.name=other", "train.stop_after=14", *overrides, ranks=ranks))
    # float32 sums in another order: a few units in the last place over 14 steps.
    expected = [line[2] for line in curve(straight)[:14]]
    assert [line[2] for line in curve(tmp_path / "other")] == pytest.approx(expected, rel=1e-5)
    folder = Path("checkpoints") / "step-00000014"
    one, two = (Checkpoint(run_folder / folder).topology() for run_folder in (tmp_path / "other", double))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "other" / "sample.txt").read_text() == (double / "sample.txt").read_text()


@pytest.mark.parametrize(
    ("ranks", "number"),
    [
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.exhaustive),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.exhaustive),
        (2, signal.SIGTERM),
        pytest.param(2, signal.SIGUSR1, marks=pytest.mark.exhaustive),
    ],
)
def test_a_signal_saves_and_ends_cleanly(corpus: Path, tmp_path: Path, ranks: int, number: signal.Signals) -> None:
    """To the process itself; with two ranks, to rank 1 alone: rank 0 learns of it and both end."""
    with start(command(corpus, tmp_path, "run.name=stopped", LONG, ranks=ranks)) as process:
        wait_for_steps(process, tmp_path / "stopped", 3)
        os.kill(process.pid if ranks == 1 else rank_process(process, rank=1), number)
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0 and ("stopped by" in output), output
    stopped_at = metrics(tmp_path / "stopped")[-1]["step"]
    assert (tmp_path / "stopped" / "checkpoints" / f"step-{stopped_at:08d}" / "index.json").is_file()
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert not summary["finished"] and summary["steps"] == stopped_at < 100000


def test_a_killed_rank_ends_the_others_and_the_run_goes_on_from_its_checkpoint(
    corpus: Path, straight: Path, tmp_path: Path
) -> None:
    settings = ["run.name=straight", "train.save_interval=4", "train.keep_checkpoints=9"]
    with start(command(corpus, tmp_path, *settings, launcher="deepspeed")) as process:
        wait_for_steps(process, tmp_path / "straight", 6)
        wait_for_checkpoint(process, tmp_path / "straight")
        os.kill(rank_process(process, rank=1), signal.SIGKILL)
        # The collectives of the run wait for 1,800 s: it ends because the others are told, not by their time-out.
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode != 0
    assert "rank 0 lost contact with another rank: rank 1 has not answered for" in output, output
    assert "last seen at" in output and "train.resume=auto" in output, output
    run(command(corpus, tmp_path, "run.name=straight", "train.resume=auto"))
    assert curve(tmp_path / "straight") == curve(straight)


def test_a_resumed_run_names_what_was_changed(corpus: Path, straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "straight")
    longer = command(corpus, tmp_path, "run.name=straight", "train.resume=auto", "train.steps=32", "optimizer.lr=4e-3")
    output = run(longer).stdout
    assert "density: 1.0000 at step 24 of 24 before, 0." in output and "weights are dropped" in output
    assert "train.steps: 24 -> 32" in output and "optimizer.lr: 0.005 -> 0.004" in output
    assert "train.resume" not in output.split("changed since")[1].splitlines()[0]
    assert metrics(tmp_path / "straight")[-1]["step"] == 32


def test_the_closing_sample_never_decides_how_a_run_ends(corpus: Path, tmp_path: Path) -> None:
    """Also of a vocabulary of more entries than the tokenizer has, which an untrained model draws from alike."""
    settings = ["run.name=wide", "model.vocab_size=512", "train.sample_tokens=200", "train.valid_interval=0"]
    arguments = command(corpus, tmp_path, *settings, "train.resume=auto", ranks=1)
    run(arguments)
    left = tmp_path / "wide" / "sample.txt"
    assert len(left.read_text()) > 1
    left.unlink()
    (tmp_path / "wide" / "summary.json").unlink()
    left.mkdir()
    assert "warning: no sample was left" in run(arguments).stdout
    assert (tmp_path / "wide" / "summary.json").is_file() and (tmp_path / "wide" / "report.html").is_file()


def test_a_damaged_newest_checkpoint_is_passed_over(corpus: Path, straight: Path, tmp_path: Path) -> None:
    run(command(corpus, tmp_path, "run.name=straight", "train.stop_after=9", "train.save_interval=4"))
    newest = tmp_path / "straight" / "checkpoints" / "step-00000009" / "rank-00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    resumed = run(command(corpus, tmp_path, "run.name=straight", "train.resume=auto"))
    assert "passed over" in resumed.stdout and "rank-00000.safetensors has 1000 bytes" in resumed.stdout
    assert "going on from step 8" in resumed.stdout
    assert curve(tmp_path / "straight") == curve(straight)


FURTHER_ALGORITHMS = [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("gradual", "static", "set", "spdf")]


@pytest.mark.parametrize("algorithm", ["dense", "rigl", *FURTHER_ALGORITHMS])
def test_every_algorithm_is_one_override_away(corpus: Path, tmp_path: Path, algorithm: str) -> None:
    run(command(corpus, tmp_path, f"run.name={algorithm}", f"sparsity.algorithm={algorithm}", ranks=1))
    final = metrics(tmp_path / algorithm)[-1]["density"]
    assert final == pytest.approx(1.0 if algorithm in ("dense", "spdf") else 0.2, abs=0.02)
    assert_golden(tmp_path / algorithm, algorithm)


def assert_golden(run_folder: Path, algorithm: str) -> None:
    """Equal steps, densities and phases; losses to 1e-3, as processors add up in different orders and a topology update
    may turn a last digit into another unit."""
    expected = [row.split() for row in golden_path(algorithm).read_text().splitlines()[1:]]
    found = [row.split() for row in golden_text(run_folder).splitlines()[1:]]
    assert [(row[0], *row[3:]) for row in found] == [(row[0], *row[3:]) for row in expected]
    for column in (1, 2):
        losses = [float(row[column]) for row in expected]
        assert [float(row[column]) for row in found] == pytest.approx(losses, rel=1e-3, nan_ok=True)


def test_settings_are_refused_before_anything_starts(corpus: Path, straight: Path, tmp_path: Path) -> None:
    cases = {
        "train.stepz=3": "did you mean steps?",
        "deepspeed.extra={train_batch_size: 4}": "derived from train.global_batch_size",
        "data.train=[{path: /nowhere/corpus}]": "/nowhere/corpus",
        "sparsity.update_interval=20": "would not become dense again",
        "data.train=null": "data.train",
    }
    for override, message in cases.items():
        refused = run(command(corpus, tmp_path, override, ranks=1), expect=2)
        assert message in refused.stdout, refused.stdout
        assert "Traceback" not in refused.stdout
    assert not list(tmp_path.iterdir()), "a refused run left something behind"
    again = run(command(corpus, straight.parent, "run.name=straight", ranks=1), expect=2)
    assert "holds a run already" in again.stdout


def test_a_refused_resume_leaves_the_run_as_it_was(corpus: Path, straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "straight")
    before = contents(tmp_path / "straight")
    for override, message in {
        "model.num_layers=3": "model.num_layers: 3, but the run to go on with has 2; must be 2",
        "train.steps=20": "past the end of the run: train.steps is 20",
    }.items():
        refused = run(command(corpus, tmp_path, "run.name=straight", "train.resume=auto", override), expect=2)
        assert message in refused.stdout, refused.stdout
        assert contents(tmp_path / "straight") == before, override


def test_a_run_without_a_good_checkpoint_is_not_started_over(corpus: Path, straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "straight")
    for weights_file in (tmp_path / "straight" / "checkpoints").glob("step-*/rank-00000.safetensors"):
        weights_file.write_bytes(b"cut off")
    before = contents(tmp_path / "straight")
    refused = run(command(corpus, tmp_path, "run.name=straight", "train.resume=auto"), expect=2)
    assert "no good checkpoint" in refused.stdout and "has 7 bytes" in refused.stdout
    assert contents(tmp_path / "straight") == before


def test_bad_data_in_mid_run_ends_all_ranks_and_names_the_token(tmp_path: Path) -> None:
    """The end-of-document id 256 is beyond a vocabulary of 200: ranks meet it at different steps."""
    settings = ["run.name=bad", "data.tokenizer=null", "model.vocab_size=200", "train.valid_interval=0"]
    with start(command(write_corpus(tmp_path), tmp_path, *settings)) as process:
        # No time-out of 1,800 s of a collective is waited for.
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode != 0
    assert "256" in output and "200" in output and "Traceback" not in output, output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_dry_run_prints_the_plan_of_any_world_size_as_json(corpus: Path, tmp_path: Path) -> None:
    settings = ["train.global_batch_size=4096", "--dry-run", "--world-size", "512", "--json"]
    plan = json.loads(run(command(corpus, tmp_path, *settings, ranks=1)).stdout)
    assert plan["parallel"]["world_size"] == 512 and plan["parallel"]["accumulation_steps"] == 2
    assert not list(tmp_path.iterdir())


def test_print_config_is_a_configuration_again(corpus: Path, tmp_path: Path) -> None:
    entry = [sys.executable, str(REPOSITORY / "launch" / "pretrain.py")]
    printed = run(command(corpus, tmp_path, "--print-config", ranks=1), fresh=True).stdout
    (tmp_path / "config.yaml").write_text(printed)
    assert run([*entry, "--config", str(tmp_path / "config.yaml"), "--print-config"]).stdout == printed
