"""What a rank does does not grow with the number of ranks, by the product's own code in worlds that are not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from processes import run

WORLDS = (16, 64, 256)
PHASES = ("start", "step", "update", "save", "resume")
# Rank 0 and the first ones of groups join what others have written: a group of 32 for each level of the tree.
BOUNDED = {"files_looked_at": 140, "files_opened": 130, "files_changed": 130}


def counts(folder: Path, repository: Path, *words: str) -> dict:
    """By layout, rank and name of a number: the numbers, in the order of the worlds."""
    script = repository / "benchmarks" / "thousand_ranks.py"
    output = ["--output-suffix", "test", "--output-folder", str(folder)]
    done = run([sys.executable, str(script), "--worlds", *map(str, WORLDS), *words, *output], timeout=900)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("thousand_ranks_test_*.json")
    result = json.loads(path.read_text())
    assert result["growing"] == []
    return {name: list(by_size.values()) for name, by_size in result["table"].items()}


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    ("tensor_parallel", "zero_stage", "overrides"),
    [
        pytest.param("2", "3", (), marks=pytest.mark.exhaustive),
        pytest.param("1", "1", (), marks=pytest.mark.exhaustive),
        pytest.param("1", "1", ("sparsity.block_size=1",), marks=pytest.mark.exhaustive),
        pytest.param("1", "0", (), marks=pytest.mark.exhaustive),
    ],
)
def test_no_number_grows_faster_than_the_logarithm(
    tmp_path: Path, repository: Path, tensor_parallel: str, zero_stage: str, overrides: tuple[str, ...]
) -> None:
    more = ["--overrides", *overrides] if overrides else []
    found = counts(tmp_path, repository, "--tensor-parallel", tensor_parallel, "--zero-stages", zero_stage, *more)
    layout = f"tensor parallel {tensor_parallel}, ZeRO {zero_stage}"
    for rank in ("first rank", "middle rank"):

        def numbers(name: str, rank: str = rank) -> list[float]:
            return found[f"{layout}, {rank}, {name}"]

        for phase in PHASES:
            _, fewer, more = numbers(f"{phase}: collectives")
            # From 64 to 256 ranks the tree keeps its two levels.
            assert fewer == more, (rank, phase)
            assert numbers(f"{phase}: store_operations") == [numbers(f"{phase}: store_operations")[0]] * len(WORLDS)
            assert max(numbers(f"{phase}: calls_for_groups")) <= 4
            for name, most in BOUNDED.items():
                assert max(numbers(f"{phase}: {name}")) <= most, (rank, phase, name)
        assert max(numbers("connections: host")) <= 60 and max(numbers("heartbeats: peers")) <= 62
        # One reduction over all ranks in an ordinary step: of the gradient norm, with which a signal to stop goes.
        assert len(set(numbers("step: collectives"))) == 1
