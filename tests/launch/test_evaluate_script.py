"""Evaluation of a run, through the script as a user starts it, on one rank and on two."""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from runs import REPOSITORY, command, run, write_corpus

from megasparse.evaluation.run import EvaluationSettings
from megasparse.evaluation.run import evaluate as perform
from megasparse.launching import LaunchEnvironment

SCRIPT = str(REPOSITORY / "launch" / "evaluate.py")
LINES = ["12 + 30 = 42\n", "7 + 7 = 14\n", "90 + 1 = 91\n", "für 3 + 3 = 6\n"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of one rank, ended while sparse; its corpus is the data set `corpus` beside it."""
    folder = tmp_path_factory.mktemp("trained")
    settings = ["run.name=tiny", "train.stop_after=8", "train.valid_interval=0", "train.sample_tokens=0"]
    run(command(write_corpus(folder, 10), folder, *settings, ranks=1))
    return folder / "tiny"


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("".join(LINES * 6), encoding="utf-8")
    return path


def evaluate(*words: str, ranks: int = 1, expect: int = 0) -> str:
    """What the script prints; on several ranks under torchrun."""
    launcher = [sys.executable]
    if ranks > 1:
        # Standalone: the launcher itself listens, at a port that its system chooses.
        launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", str(ranks)]
    return run([*launcher, SCRIPT, "--device", "cpu", *words], expect=expect).stdout


def evaluate_here(run_folder: Path, task: str, source: Path, **settings) -> dict:
    """The record of an evaluation in this process."""
    wanted = EvaluationSettings(run=run_folder, task=task, input=str(source), **settings)
    return perform(wanted, LaunchEnvironment.from_variables({}))


def test_two_ranks_find_what_one_finds(trained: Path, lines: Path, tmp_path: Path) -> None:
    output = tmp_path / "2.json"
    words = ["--task", "perplexity", "--input", str(lines), "--batch-size", "3", "--stride", "10"]
    shown = evaluate("--model", str(trained), *words, "--output", str(output), ranks=2)
    alone = evaluate_here(trained, "perplexity", lines, batch_size=3, stride=10, output=tmp_path / "1.json")
    shared = json.loads(output.read_text())
    for record in (alone, shared):
        assert record["results"].pop("seconds") > 0
    # Bit for bit: JSON holds every digit of a float64.
    assert shared["results"] == alone["results"] and shared["settings"] == alone["settings"]
    assert alone["results"]["tokens_scored"] == lines.stat().st_size - 1
    assert alone["hardware"].endswith("1 rank") and shared["hardware"].endswith("2 ranks")
    # Rank 0 alone speaks.
    assert shown.count(f"perplexity: {lines}") == 1 and shown.count("written: ") == 1, shown
    assert shared["step"] == 8 and shared["model"] == str(trained) and "torch" in shared["versions"]


def test_results_have_a_place_and_a_meaning(trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "passages.jsonl"
    source.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES * 3))
    shown = evaluate("--run", str(trained), "--task", "last-word", "--input", str(source), "--limit", "5")
    path = trained / "evaluations" / "last-word-passages.jsonl-step-8.json"
    record = json.loads(path.read_text())
    assert record["settings"]["limit"] == record["results"]["examples"] == 5
    assert record["settings"]["precision"] == "fp32" and record["settings"]["batch_size"] == 32
    assert 0.0 <= record["results"]["accuracy"] <= 1.0 and record["results"]["perplexity_per_last_word"] > 1.0
    assert "perplexity per last word" in shown and str(path) in shown


def test_a_token_file_of_the_run(trained: Path, tmp_path: Path) -> None:
    settings = {"stride": 32, "precision": "bf16", "limit": 4, "output": tmp_path / "x.json"}
    record = evaluate_here(trained, "perplexity", trained.parent / "corpus", **settings)
    results = record["results"]
    assert results["windows"] == 4 and results["tokens_scored"] == 4 * 31
    assert record["settings"]["stride"] == record["settings"]["window"] == 32
    assert record["settings"]["attention"] == "sparse" and record["settings"]["precision"] == "bf16"
    # Eight steps on this corpus are better than nothing.
    assert math.log(results["perplexity"]) < math.log(257) - 0.5
    assert json.loads((tmp_path / "x.json").read_text()) == record


def test_multiple_choice_of_a_run(trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "quiz.jsonl"
    quiz = [{"context": "7 + 7 =", "choices": ["14", "15", "nothing"], "label": i % 3} for i in range(6)]
    source.write_text("".join(json.dumps(row) + "\n" for row in quiz))
    record = evaluate_here(trained, "multiple-choice", source, output=tmp_path / "x.json")
    # The same question with every answer as the right one in turn.
    assert record["results"]["accuracy"] == record["results"]["accuracy_per_byte"] == pytest.approx(1 / 3)


def test_what_is_wrong_is_said_before_anything_starts(trained: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    rows = ({"context": "a", "choices": ["b", "c"], "label": label} for label in (1, 2))
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = evaluate("--run", str(trained), "--task", "multiple-choice", "--input", str(bad), expect=2)
    assert f"error: --input: {bad}, line 2: label: 2; must be 0 to 1" in shown and "Traceback" not in shown


def test_an_output_that_cannot_be_written_is_named(trained: Path, lines: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--output: .* cannot be written"):
        evaluate_here(trained, "perplexity", lines, limit=1, output=tmp_path / "file" / "x.json")


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed")
def test_the_harness_is_named_where_it_is_not_installed() -> None:
    shown = run([sys.executable, str(REPOSITORY / "launch" / "evaluate_harness.py"), "--tasks", "x"], expect=2).stdout
    assert "error: lm_eval is not installed: pip install 'megasparse[eval]'" in shown and "Traceback" not in shown
