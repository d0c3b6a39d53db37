"""Writes the golden curves anew: python tests/golden/regenerate.py. Say in the commit why they changed.

A curve is that of the tiny run of tests/launch/runs.py on one rank, in float32, for one algorithm.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))
from runs import command, golden_path, golden_text, run, write_corpus  # noqa: E402

ALGORITHMS = ("mst", "dense", "static", "set", "rigl", "gradual", "spdf")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder)
        for algorithm in ALGORITHMS:
            run(command(corpus, folder, f"run.name={algorithm}", f"sparsity.algorithm={algorithm}", ranks=1))
            golden_path(algorithm).write_text(golden_text(folder / algorithm))
            print(f"wrote {golden_path(algorithm).name}")


if __name__ == "__main__":
    main()
