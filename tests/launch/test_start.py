"""Starts that do not come about end after `train.start_timeout_seconds`; runs that cannot write end with status 2."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

from runs import LONG, command, finish, run, start, wait_for_steps

SECONDS = 4


def rank_alone(corpus: Path, folder: Path, rank: int, port: int) -> str:
    """The error line of one rank of two, of which the other never comes."""
    words = command(corpus, folder, "run.name=alone", f"train.start_timeout_seconds={SECONDS}", ranks=1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    output = run(words, expect=3, variables={name: str(value) for name, value in names.items()}).stdout
    (line,) = [line for line in output.splitlines() if line.startswith("error")]
    assert "Traceback" not in output
    return line


def test_a_rank_that_died_before_the_ranks_met_is_named_after_the_time_out_of_a_start(
    corpus: Path, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert f"not started within {SECONDS} s: rank 1" in rank_alone(corpus, tmp_path, 0, port)


def test_a_second_rank_that_finds_another_program_at_the_port_says_so_after_that_time(
    corpus: Path, tmp_path: Path
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = rank_alone(corpus, tmp_path, 1, port)
    assert f"rank 0 does not answer at 127.0.0.1:{port} within {SECONDS} s" in line


def test_a_run_whose_folder_is_deleted_ends_with_status_2(corpus: Path, tmp_path: Path) -> None:
    arguments = command(corpus, tmp_path, "run.name=gone", LONG, "train.save_interval=3")
    with start(arguments) as process:
        wait_for_steps(process, tmp_path / "gone", 3)
        (tmp_path / "gone").rename(tmp_path / "elsewhere")
        shutil.rmtree(tmp_path / "elsewhere")
        output = finish(process, expect=2).stdout
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert re.search(r"gone/\S+: (was deleted while the run wrote it|No such file or directory)$", errors[0]), errors
    assert "Traceback" not in output, output
    assert not (tmp_path / "gone").exists()


def test_a_folder_that_cannot_be_made_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = run(command(corpus, tmp_path / "file", "run.name=x", ranks=1), expect=2).stdout
    named = f"error: run.folder: {tmp_path / 'file'}: File exists; must be a folder that can be written"
    assert named in output and "Traceback" not in output
