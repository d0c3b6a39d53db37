"""Whole runs in which a rank stops or a copy of a mask goes wrong: one clear line, and nothing is lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from runs import command, curve, end, metrics, rank_process, run, start, wait_for_steps, write_corpus

pytestmark = pytest.mark.timeout(400)

LIMIT_SECONDS = 10
LAUNCHER_SECONDS = 31
"""The launcher asks the ranks that are left to end, and kills them after 30 s; a stopped one cannot be asked."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks from step 0 to the end in one go."""
    folder = tmp_path_factory.mktemp("straight")
    run(command(corpus, folder, "run.name=straight"))
    return folder / "straight"


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_and_the_run_goes_on_from_its_checkpoint(
    corpus: Path, straight: Path, tmp_path: Path, stopped: int
) -> None:
    # A stop inside a checkpoint has the long limit, which is therefore not much longer here.
    limits = [f"train.step_timeout_seconds={LIMIT_SECONDS}", "train.distributed_timeout_seconds=40"]
    process = start(command(corpus, tmp_path, "run.name=straight", "train.save_interval=4", *limits))
    try:
        wait_for_steps(process, tmp_path / "straight", 6)
        os.kill(rank_process(process, stopped), signal.SIGSTOP)
        stopped_at = time.monotonic()
        output, _ = process.communicate(timeout=40 + LAUNCHER_SECONDS + 15)
    finally:
        if process.poll() is None:
            end(process)
    assert process.returncode != 0, output
    assert time.monotonic() - stopped_at < 40 + LAUNCHER_SECONDS
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert f"error: rank {1 - stopped} has made no progress for " in line, line
    assert f"Rank {stopped} has not answered for " in line and "last seen at step " in line
    assert "train.step_timeout_seconds" in line and "train.resume=auto" in line
    stacks = tmp_path / "straight" / "hangs" / f"rank-0000{1 - stopped}.txt"
    assert str(stacks) in line and "loop.py" in stacks.read_text()
    assert metrics(tmp_path / "straight")[-1]["step"] < 24
    resumed = run(command(corpus, tmp_path, "run.name=straight", "train.resume=auto"))
    assert "going on from step 4" in resumed.stdout or "going on from step 8" in resumed.stdout, resumed.stdout
    assert "passed over" not in resumed.stdout
    assert curve(tmp_path / "straight") == curve(straight)


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        # The bit flips after step 9. Compared before the topology step of step 11, or before the checkpoint of step 10.
        (["train.replica_check_interval=5", "train.save_interval=4"], ["step-00000004", "step-00000008"]),
        (["train.replica_check_interval=0", "train.save_interval=10"], []),
    ],
)
def test_a_wrong_mask_bit_on_one_replica_is_found_and_never_saved(
    corpus: Path, straight: Path, tmp_path: Path, settings: list[str], saved: list[str]
) -> None:
    entry = Path(__file__).with_name("corrupt_mask.py")
    arguments = command(corpus, tmp_path, "run.name=straight", *settings)
    arguments = [str(entry) if word.endswith("pretrain.py") else word for word in arguments]
    output = run(arguments, expect=4).stdout
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "the mask of layer layers.0.attention.output differs between ranks 0, 1" in line, line
    assert "train.resume=auto" in line and "Traceback" not in output
    assert metrics(tmp_path / "straight")[-1]["step"] == 10
    found = sorted(path.name for path in (tmp_path / "straight" / "checkpoints").glob("*"))
    assert found == saved
    resumed = run(command(corpus, tmp_path, "run.name=straight", "train.resume=auto"))
    assert ("going on from step 8" in resumed.stdout) == bool(saved)
    assert curve(tmp_path / "straight") == curve(straight)
