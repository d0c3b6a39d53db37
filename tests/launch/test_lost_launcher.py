"""The outermost launcher is killed: its ranks save and leave, as for SIGTERM."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from processes import LIMIT_SECONDS
from runs import LONG, command, rank_process, start, wait_for_steps

from megasparse.launching.launcher import find_launchers


@pytest.mark.parametrize("how", ["kill", pytest.param("terminate", marks=pytest.mark.exhaustive)])
def test_ranks_save_and_leave_when_their_launcher_has_gone(corpus: Path, tmp_path: Path, how: str) -> None:
    words = command(corpus, tmp_path, "run.name=orphans", LONG, "train.save_interval=0", launcher="deepspeed")
    with start(words) as process:
        wait_for_steps(process, tmp_path / "orphans", 3)
        ranks = [psutil.Process(rank_process(process, rank)) for rank in range(2)]
        getattr(process, how)()
        psutil.wait_procs(ranks, timeout=LIMIT_SECONDS)
        left = [rank for rank in ranks if rank.is_running()]
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert not left, output
    assert list((tmp_path / "orphans" / "checkpoints").glob("step-*")), output
    assert how == "terminate" or "its launcher deepspeed (process " in output


def test_a_process_that_nobody_launched_watches_nobody() -> None:
    assert find_launchers().gone() is None
