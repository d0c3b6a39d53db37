"""What is saved is the state of its step, though it is copied while the next step runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run_distributed
from slow_copies import SAVED_STEPS, resumed_from_slow_copies


@pytest.mark.parametrize(
    ("ranks", "zero_stage"),
    [(2, 3), *(pytest.param(*layout, marks=pytest.mark.exhaustive) for layout in ((1, 0), (2, 1)))],
)
def test_no_step_changes_what_is_being_copied(tmp_path: Path, ranks: int, zero_stage: int) -> None:
    lines = run_distributed(resumed_from_slow_copies, ranks, zero_stage, tmp_path)[0]
    for step in SAVED_STEPS:
        assert lines[f"from {step}"] == lines["straight"][step:]
