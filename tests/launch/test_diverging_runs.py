"""A whole run whose numbers go wrong: every step of it is shown, in words and in JSON, and it ends with a sentence."""

from __future__ import annotations

import json
from pathlib import Path

from runs import command, run

DIVERGING = ["run.name=run", "optimizer.lr=1e30", "train.log_interval=4", "train.valid_interval=4"]


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def lines(folder: Path) -> list[dict]:
    texts = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(text, parse_constant=refuse) for text in texts]


def test_a_run_that_diverges_ends_with_the_step(corpus: Path, tmp_path: Path) -> None:
    """The second step finds NaN; all of them are skipped from there on."""
    words = [*DIVERGING, "train.save_interval=4"]
    output = run(command(corpus, tmp_path, *words, ranks=1), expect=2).stdout
    (error,) = [line for line in output.splitlines() if line.startswith("error")]
    assert "error: step 11 is skipped, number 10 in a row (train.max_skipped_steps)" in error
    assert "as after step 1," in error and "Traceback" not in output
    assert "warning: step 7 is skipped: a loss or gradient is not finite" in output
    assert "step 7: its topology update is made in the next step that is not skipped" in output
    assert "warning: step 8: the validation loss is nan" in output
    assert [(line["skipped_steps"], line["grad_norm"], line["val_loss"]) for line in lines(tmp_path)] == [
        (3, None, None),
        (7, None, None),
    ]
    # Of the only step that was applied, and of none.
    assert lines(tmp_path)[0]["loss"] > 0 and lines(tmp_path)[1]["loss"] is None
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_one_that_may_go_on_comes_to_its_end(corpus: Path, tmp_path: Path) -> None:
    words = [*DIVERGING, "train.max_skipped_steps=100"]
    output = run(command(corpus, tmp_path, *words, ranks=1)).stdout
    assert "23, for their gradients" in output and "Traceback" not in output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=refuse)
    assert summary["finished"] and summary["skipped_steps"] == 23
    assert summary["val_loss"] is None and summary["best_val_loss"] is None and summary["loss"] > 0
    assert (tmp_path / "run" / "report.html").is_file()
