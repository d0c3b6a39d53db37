"""Last words: what the user must mend is one line and status 2, on the rank that has met it."""

from __future__ import annotations

import errno
import os

import pytest

from megasparse.launching import exit as leaving
from megasparse.launching.exit import EXPECTED, explain_and_exit


class Left(Exception):
    """In place of the end of the process."""


@pytest.fixture
def statuses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []

    def leave(status: int) -> None:
        found.append(status)
        raise Left

    monkeypatch.setattr(leaving, "exit_now", leave)
    return found


@pytest.mark.parametrize(("rank", "beginning"), [(0, "error: "), (1, "error on rank 1: ")])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG])
def test_a_file_that_cannot_be_written_is_one_line(capsys, statuses, number, rank, beginning) -> None:
    error = OSError(number, os.strerror(number), "/disk/runs/x/metrics.jsonl")
    assert isinstance(error, EXPECTED)
    with pytest.raises(Left):
        explain_and_exit(error, rank)
    assert statuses == [2]
    assert capsys.readouterr().err == f"{beginning}/disk/runs/x/metrics.jsonl: {os.strerror(number)}\n"


def test_an_error_of_the_system_that_is_about_no_file_keeps_its_traceback(statuses) -> None:
    with pytest.raises(ConnectionRefusedError):
        explain_and_exit(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), 0)
    assert not statuses
