"""Evaluation of a run, through the script as a user starts it, on one rank and on two."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from runs import REPOSITORY, command, free_port, run, write_corpus

pytestmark = pytest.mark.timeout(300)

SCRIPT = str(REPOSITORY / "launch" / "evaluate.py")
LINES = ["12 + 30 = 42\n", "7 + 7 = 14\n", "90 + 1 = 91\n", "für 3 + 3 = 6\n"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of one rank, ended while sparse; its corpus is the data set `corpus` beside it."""
    folder = tmp_path_factory.mktemp("trained")
    settings = ["run.name=tiny", "train.stop_after=6", "train.valid_interval=0", "train.sample_tokens=0"]
    run(command(write_corpus(folder, 10), folder, *settings, ranks=1))
    return folder / "tiny"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Task -> input file."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "lines.txt").write_text("".join(LINES * 6), encoding="utf-8")
    passages = [{"text": line} for line in LINES * 3]
    (folder / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    quiz = [{"context": "7 + 7 =", "choices": ["14", "15", "nothing"], "label": i % 3} for i in range(7)]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    names = {"perplexity": "lines.txt", "last-word": "passages.jsonl", "multiple-choice": "quiz.jsonl"}
    return {task: str(folder / name) for task, name in names.items()}


def evaluate(run_folder: Path, *words: str, ranks: int = 1, expect: int = 0) -> str:
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [str(Path(sys.executable).with_name("torchrun")), "--master_port", str(free_port())]
        launcher += ["--nproc_per_node", str(ranks)]
    return run([*launcher, SCRIPT, "--run", str(run_folder), "--device", "cpu", *words], expect=expect).stdout


def record_of(run_folder: Path, task: str, source: str, output: Path, *words: str, ranks: int = 1) -> tuple[dict, str]:
    shown = evaluate(
        run_folder, "--task", task, "--input", source, "--output", str(output), "--batch-size", "3", *words, ranks=ranks
    )
    return json.loads(output.read_text()), shown


@pytest.mark.parametrize("task", ["perplexity", "multiple-choice"])
def test_two_ranks_find_what_one_finds(trained: Path, inputs: dict[str, str], tmp_path: Path, task: str) -> None:
    alone, shown = record_of(trained, task, inputs[task], tmp_path / "1.json")
    shared, shown_by_both = record_of(trained, task, inputs[task], tmp_path / "2.json", ranks=2)
    for record in (alone, shared):
        assert record["results"].pop("seconds") > 0
    # Bit for bit: JSON holds every digit of a float64.
    assert shared["results"] == alone["results"] and shared["settings"] == alone["settings"]
    assert alone["hardware"].endswith("1 rank") and shared["hardware"].endswith("2 ranks")
    for text in (shown, shown_by_both):
        assert text.count(f"{task}: {inputs[task]}") == 1 and text.count("written: ") == 1, text
    assert alone["step"] == 6 and alone["model"] == str(trained) and "torch" in alone["versions"]


def test_results_have_a_place_and_a_meaning(trained: Path, inputs: dict[str, str]) -> None:
    shown = evaluate(trained, "--task", "last-word", "--input", inputs["last-word"], "--limit", "5")
    path = trained / "evaluations" / "last-word-passages.jsonl-step-6.json"
    record = json.loads(path.read_text())
    assert (
        record["settings"]["limit"] == record["results"]["examples"] == 5 and record["settings"]["precision"] == "fp32"
    )
    assert 0.0 <= record["results"]["accuracy"] <= 1.0 and record["results"]["perplexity_per_last_word"] > 1.0
    assert "perplexity per last word" in shown and str(path) in shown


def test_a_token_file_of_the_run(trained: Path, tmp_path: Path) -> None:
    words = ["--stride", "32", "--precision", "bf16", "--limit", "4"]
    record, _ = record_of(trained, "perplexity", str(trained.parent / "corpus"), tmp_path / "x.json", *words)
    results, settings = record["results"], record["settings"]
    assert results["windows"] == 4 and results["tokens_scored"] == 4 * 31
    assert settings["stride"] == settings["window"] == 32 and settings["precision"] == "bf16"
    # Six steps on this corpus are better than nothing.
    assert math.log(results["perplexity"]) < math.log(257) - 0.5


def test_what_is_wrong_is_said_before_anything_starts(trained: Path, inputs: dict[str, str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        '{"context": "a", "choices": ["b", "c"], "label": 1}\n{"context": "a", "choices": ["b", "c"], "label": 2}'
    )
    shown = evaluate(trained, "--task", "multiple-choice", "--input", str(bad), expect=2)
    assert f"error: --input: {bad}, line 2: label: 2; legal values: 0 to 1" in shown and "Traceback" not in shown
    assert not (tmp_path / "evaluations").exists()


def test_usage_mistakes_end_at_once(trained: Path) -> None:
    words = [sys.executable, SCRIPT, "--run", str(trained), "--task", "trivia", "--input", "x"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 2 and "invalid choice: 'trivia'" in done.stderr
