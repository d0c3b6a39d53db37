"""Two runs in one folder at once: the second is refused, and the death of the first sets the folder free."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from processes import LIMIT_SECONDS
from runs import LONG, command, metrics, rank_process, run, start, wait_for_checkpoint, wait_for_steps


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_the_second_run_is_refused_until_the_first_is_dead(corpus: Path, tmp_path: Path, ranks: int) -> None:
    folder, words = tmp_path / "both", ["run.name=both", LONG, "train.save_interval=4"]
    with start(command(corpus, tmp_path, *words, ranks=ranks)) as first:
        wait_for_steps(first, folder, 5)
        wait_for_checkpoint(first, folder)
        owner = rank_process(first, 0) if ranks > 1 else first.pid
        lock = json.loads((folder / "run.lock").read_text())
        assert lock["process"] == owner
        named = f"host {lock['host']}, process {owner}, since {lock['since']}"
        before = (folder / "config.yaml").read_bytes()
        # It holds its lock all the same, and leaves the cores to the others.
        paused = first.left()
        for process in paused:
            process.suspend()
        for resume, message in (
            ("auto", f"is in use by another run: {named}; must"),
            ("never", f"already ({named}); "),
        ):
            other = [*words, f"train.resume={resume}", "optimizer.lr=1e-3"]
            refused = run(command(corpus, tmp_path, *other, ranks=ranks if resume == "auto" else 1), expect=2).stdout
            assert message in refused and "Traceback" not in refused, refused
        assert (folder / "config.yaml").read_bytes() == before and first.poll() is None
        for process in paused:
            process.resume()
        os.kill(owner, signal.SIGKILL)
        first.communicate(timeout=LIMIT_SECONDS)
    assert (folder / "run.lock").is_file()
    stop = metrics(folder)[-1]["step"] + 1
    again = run(command(corpus, tmp_path, *words, "train.resume=auto", f"train.stop_after={stop}", ranks=ranks)).stdout
    assert "going on from step" in again
    assert [line["step"] for line in metrics(folder)] == list(range(1, stop + 1))
    assert not (folder / "run.lock").exists()
