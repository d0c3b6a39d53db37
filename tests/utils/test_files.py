"""Files are written at once: with the user's permissions, in place of links, and not at all after an error. What is
flushed survives a power cut."""

import os

import pytest

from megasparse.utils.files import make_folders, sync_files, write_at_once, write_json


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_of_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_at_once(tmp_path / "new" / "file.txt", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "file.txt").stat().st_mode & 0o777 == mode


def test_link_is_replaced_and_its_target_left_alone(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_at_once(link, b"new")
    assert not link.is_symlink()
    assert (target.read_text(), link.read_text()) == ("old", "new")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failure_half_way_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, call):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="no space left"):
        write_json(path, {"a": 2})
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == '{\n "a": 1\n}\n'


def test_what_is_no_json_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", float("nan"), allow_nan=False)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def flushed(monkeypatch):
    """Paths that ``os.fsync`` is called for."""
    paths, fsync = [], os.fsync

    def noted(handle):
        paths.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    return paths


def test_new_folders_are_flushed_into_those_that_hold_them(tmp_path, flushed):
    make_folders(tmp_path / "runs" / "run" / "checkpoints")
    assert flushed == [str(tmp_path), str(tmp_path / "runs"), str(tmp_path / "runs" / "run")]
    flushed.clear()
    make_folders(tmp_path / "runs")
    assert not flushed


def test_files_of_a_pattern_are_flushed_with_their_names(tmp_path, flushed):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "sample.txt").write_text("text")
    sync_files(tmp_path, "*.jsonl")
    assert flushed == [str(tmp_path / "metrics.jsonl"), str(tmp_path)]
