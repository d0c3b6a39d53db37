"""Whatever a run writes may fail: it ends with one sentence that names path and reason, or says it and goes on.

What decides nothing, because it can be made again from what is there, is the closing sample and the report.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import failing_writes
import pytest
from extensions_setup import SETTINGS, write_corpus
from failing_writes import FINISHED
from harness import run_distributed

DISK_BYTES = 4 * 2**20
NEEDED = ["config.yaml", "plan.json", "metrics.jsonl", "topology.jsonl", "summary.json"]
CAN_BE_MADE_AGAIN = ["sample.txt", "report.html"]
SAMPLE = ["model.vocab_size=320", "data.tokenizer=bytes", "train.sample_tokens=4"]


def test_what_cannot_be_written_is_named_and_only_sample_and_report_decide_nothing(tmp_path: Path) -> None:
    words = [*SETTINGS, *SAMPLE, *write_corpus(tmp_path), "train.steps=3"]
    names = [*NEEDED, "checkpoints/partial-step-00000003", *CAN_BE_MADE_AGAIN]
    # A checkpoint's own name of before is cleared away, however full it is.
    expected = {name: "/" if name in NEEDED else FINISHED for name in names}
    found = run_distributed(
        failing_writes.with_folders_in_the_way, 1, [*words, "train.resume=auto"], tmp_path, names, with_mesh=False
    )[0]
    for name, end in found.items():
        assert (end == FINISHED) == (expected[name] == FINISHED), (name, end)
        assert end == FINISHED or (f"/{name}: " in end and "irectory" in end and "\n" not in end), end


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of `DISK_BYTES`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_wherever_a_run_meets_it_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, disk: Path
) -> None:
    words = [*SETTINGS, *write_corpus(tmp_path)]
    found = run_distributed(failing_writes.on_a_small_disk, 1, words, disk, with_mesh=False)[0]
    ends = [end for end, _ in found]
    assert ends[-1] == FINISHED and len(ends) > 8
    for end in ends[:-1]:
        assert "No space left on device" in end and str(disk) in end and "\n" not in end, end
    for place in ("run.lock", "checkpoint of step"):
        assert any(place in end for end in ends), (place, ends)
    assert all(goes_on for _, goes_on in found), found


def test_a_run_folder_that_is_deleted_is_missed_at_the_next_write(tmp_path: Path) -> None:
    """After a step with a line of metrics, one without, and the last: then the checkpoint cannot be written."""
    words = [*SETTINGS, *write_corpus(tmp_path), "sparsity.algorithm=dense"]
    found = run_distributed(failing_writes.deleted_after, 1, words, tmp_path, [2, 3, 12], with_mesh=False)[0]
    assert all(still_gone for _, still_gone in found), found
    for end, _ in found:
        assert "metrics.jsonl: was deleted while the run wrote it" in end, found


def test_links_in_the_run_folder_are_replaced_or_refused_and_never_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    words = [*SETTINGS, *SAMPLE, *write_corpus(tmp_path), "train.steps=6"]
    replaced = ["config.yaml", "plan.json", "summary.json", "sample.txt", "report.html"]
    refused = ["metrics.jsonl", "topology.jsonl"]
    found = run_distributed(
        failing_writes.through_planted_links, 1, words, tmp_path, [*replaced, *refused], tmp_path / "target",
        with_mesh=False,
    )[0]  # fmt: skip
    for name in replaced:
        assert found[name] == FINISHED or "config.yaml" in name, found
    for name in refused:
        assert f"{name}: is a symbolic link; must be a file" in found[name], found
