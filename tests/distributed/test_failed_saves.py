"""A checkpoint that cannot be written is told and training goes on; the last one of a run is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
from failing_saves import saves
from harness import run_distributed


@pytest.mark.parametrize(("ranks", "failing"), [(1, 0), (2, 0), (2, 1)])
def test_a_full_disk_costs_a_checkpoint_and_nothing_else(tmp_path: Path, ranks: int, failing: int) -> None:
    found = run_distributed(saves, ranks, tmp_path / "checkpoints", failing)
    first = found[0]
    assert first["names"] == ["step-00000001", "step-00000003"]
    (warning,) = first["told"]
    assert warning.startswith("warning: the checkpoint of step 2 was not saved: ")
    assert "No space left on device" in warning and warning.endswith("training goes on")
    for rank in found:
        assert "the checkpoint of step 4 was not saved" in rank["message"]
        assert "No space left on device" in rank["message"]
    assert first["after_failure"] == ["step-00000001", "step-00000003"], "nothing of it is left"
    assert first["at_the_end"] == ["step-00000003", "step-00000005"]
