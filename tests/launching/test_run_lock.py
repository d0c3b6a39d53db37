"""One run at a time in a folder; whole runs are in tests/launch/test_two_runs.py."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

import pytest

from megasparse.config.loader import ConfigError
from megasparse.launching.run_lock import LOCK, hold_folder, owner_of


def refuse(note: str) -> None:
    raise AssertionError(note)


def test_the_folder_is_made_and_what_stays_empty_goes(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    with hold_folder(folder, refuse):
        owner = owner_of(folder)
        assert owner is not None and owner.startswith(f"host {socket.gethostname()}, process {os.getpid()}, since 2")
    assert not list(tmp_path.iterdir())
    with hold_folder(folder, refuse):
        (folder / "metrics.jsonl").touch()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_a_second_holder_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    with hold_folder(tmp_path / "x", refuse):
        before = (tmp_path / "x" / LOCK).read_bytes()
        with pytest.raises(ConfigError, match=rf"another run: host .*, process {os.getpid()}, since .*; must"):
            hold_folder(tmp_path / "x", refuse).__enter__()
        assert (tmp_path / "x" / LOCK).read_bytes() == before
    with hold_folder(tmp_path / "x", refuse):
        pass


def test_what_a_killed_run_has_left_hinders_nobody(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "process": 1, "since": "2026"}))
    assert owner_of(tmp_path) == "host elsewhere, process 1, since 2026"
    with hold_folder(tmp_path, refuse):
        assert "elsewhere" not in (tmp_path / LOCK).read_text()
    assert not list(tmp_path.iterdir())


def test_a_server_is_given_time_to_free_the_lock_of_a_host_that_has_crashed(tmp_path: Path) -> None:
    notes: list[str] = []
    with open(tmp_path / LOCK, "w") as file:
        json.dump({"host": "elsewhere", "process": 1, "since": "2026"}, file)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        began = time.monotonic()
        with pytest.raises(ConfigError, match="host elsewhere, process 1"):
            hold_folder(tmp_path, notes.append, lease_seconds=2).__enter__()
        assert time.monotonic() - began >= 2 and notes == [
            f"waiting up to 2 s for {tmp_path / LOCK}, which is held by host elsewhere, process 1, since 2026"
        ]


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    notes: list[str] = []
    with hold_folder(tmp_path, notes.append):
        assert len(notes) == 1 and "a second run would not be noticed" in notes[0]


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "x" / LOCK).symlink_to(tmp_path / "kept")
    with pytest.raises(OSError, match=LOCK):
        hold_folder(tmp_path / "x", refuse).__enter__()
    assert (tmp_path / "kept").read_text() == "kept"
