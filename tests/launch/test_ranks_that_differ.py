"""Real ranks with other settings, data or code than rank 0: all end with status 2, and rank 0 says why."""

from __future__ import annotations

import shutil
from pathlib import Path

from ports import port_of, reserve_port
from runs import REPOSITORY, command, finish, start, write_corpus


def test_settings_data_and_code_of_one_rank(tmp_path: Path) -> None:
    for name in ("megasparse", "launch"):
        shutil.copytree(REPOSITORY / name, tmp_path / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    loop = tmp_path / "code" / "megasparse" / "training" / "loop.py"
    loop.write_text(loop.read_text() + "# Another state of the code.\n")
    corpus, runs = write_corpus(tmp_path), tmp_path / "runs"
    words = command(corpus, runs, ranks=1)
    other = [words[0], str(tmp_path / "code" / "launch" / "pretrain.py"), *words[2:], "optimizer.lr=1e-3"]
    with reserve_port() as reserved:
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port_of(reserved))}
        ranks = [
            start(arguments, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **variables})
            for rank, (arguments, variables) in enumerate(
                [(words, {}), (other, {"PYTHONPATH": str(tmp_path / "code")})]
            )
        ]
        first, second = (finish(process, expect=2).stdout for process in ranks)
    assert "error: ranks differ from rank 0: rank 1: optimizer.lr is 0.001 instead of 0.005; " in first, first
    assert "megasparse/training/loop.py is " in first and "; must be one configuration, one code" in first
    assert "Traceback" not in first + second
    assert not runs.exists(), "a refused run left something behind"


def test_a_rank_that_is_refused_alone_is_heard(tmp_path: Path) -> None:
    """Its settings are wrong by themselves, and rank 0 waits for it."""
    words = command(write_corpus(tmp_path), tmp_path / "runs", "train.global_batch_size=6", ranks=1)
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "1", "LOCAL_RANK": "1"}
    assert "error on rank 1: train.global_batch_size: 6" in finish(start(words, variables), expect=2).stdout
