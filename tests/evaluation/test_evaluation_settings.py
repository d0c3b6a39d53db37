"""Settings of an evaluation that are refused before any process group starts, and the choice of the task."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from megasparse.config.loader import check_config
from megasparse.data import IndexedDatasetWriter
from megasparse.data.tokenizer import load_tokenizer
from megasparse.evaluation.continuations import LastWord, MultipleChoice
from megasparse.evaluation.perplexity import Perplexity
from megasparse.evaluation.results import print_results, show_progress
from megasparse.evaluation.run import EvaluationSettings, check_settings, evaluate, make_task
from megasparse.inference.trained import TrainedModel
from megasparse.launching import LaunchEnvironment
from megasparse.models.build import build_model


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    """A model of random weights as `open_trained` hands it out."""
    model = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 16}
    config = check_config({"model": model, "data": {"tokenizer": "bytes"}, "sparsity": {"block_size": 16}})
    tokenizer = load_tokenizer("bytes")
    return TrainedModel(config, build_model(config, tokenizer.vocab_size).eval(), tokenizer, 0, "full", [])


def settings(**changes) -> EvaluationSettings:
    return EvaluationSettings(**{"run": Path("nowhere"), "task": "perplexity", "input": "x", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "trivia"}, "--task: trivia; must be one of perplexity, last-word, multiple-choice"),
        ({"detokenizer": "c4"}, "--detokenizer: c4; must be one of none, wikitext, ptb"),
        ({"precision": "fp8"}, "--precision: fp8; must be one of fp32, bf16, fp16"),
        ({"precision": "fp16"}, "--precision: fp16 needs a GPU"),
        ({"batch_size": 0}, "--batch-size: 0; must be 1 or more"),
        ({"limit": -3}, "--limit: -3; must be 1 or more"),
        ({"output": Path(".")}, "--output: . is a folder"),
        ({"marker": "#"}, "--marker: only used with --task answer"),
        ({"task": "classification", "max_tokens": 9}, "--max-tokens: only used with --task answer"),
        ({"task": "answer", "choices": ("a", "b")}, "--choices: only used with --task classification"),
        ({"task": "answer", "window": 8}, "--window: only used with --task perplexity"),
        ({"task": "last-word", "window": 8}, "--window: only used with --task perplexity"),
        ({"task": "last-word", "stride": 4}, "--stride: only used with --task perplexity"),
        ({"task": "multiple-choice", "detokenizer": "ptb"}, "--detokenizer: only used with"),
    ],
)
def test_wrong_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(settings(**changes))


def test_a_run_that_is_none_is_refused(tmp_path: Path) -> None:
    alone = LaunchEnvironment.from_variables({})
    with pytest.raises(ValueError, match="nothing"):
        evaluate(settings(run=tmp_path / "nothing"), alone)


def test_the_input_decides_between_text_and_tokens(trained: TrainedModel, tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "tokens", "uint16") as writer:
        writer.add_document([1, 2, 300])
    (tmp_path / "text").write_text("some text")
    assert isinstance(make_task(settings(input=str(tmp_path / "text")), trained), Perplexity)
    with pytest.raises(ValueError, match="holds the token 300, the model has 257 entries"):
        make_task(settings(input=str(tmp_path / "tokens")), trained)
    with pytest.raises(ValueError, match="holds tokens, not text"):
        make_task(settings(input=str(tmp_path / "tokens"), detokenizer="ptb"), trained)
    with IndexedDatasetWriter(tmp_path / "tokens", "uint16") as writer:
        writer.add_document([1, 2, 256])
    task = make_task(settings(input=str(tmp_path / "tokens")), trained)
    assert isinstance(task, Perplexity) and task.windows.tokens.tolist() == [1, 2, 256]
    with IndexedDatasetWriter(tmp_path / "short", "uint16") as writer:
        writer.add_document([1])
    with pytest.raises(ValueError, match="holds 1 tokens; must be 2 tokens or more"):
        make_task(settings(input=str(tmp_path / "short")), trained)
    with pytest.raises(ValueError, match="no such file; must be a text file, or the prefix"):
        make_task(settings(input=str(tmp_path / "nothing")), trained)


def test_a_window_can_be_shorter_than_the_model_reads(trained: TrainedModel, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some text of a few words")
    with IndexedDatasetWriter(tmp_path / "tokens", "uint16") as writer:
        writer.add_document(list(range(24)))
    for name in ("text", "tokens"):
        task = make_task(settings(input=str(tmp_path / name), window=8), trained)
        assert isinstance(task, Perplexity) and (task.windows.window, task.windows.stride) == (8, 4)
        assert task.settings["window"] == 8 and max(len(window.tokens) for window in task.windows) == 8
        assert make_task(settings(input=str(tmp_path / name)), trained).settings["window"] == 16
        for window in (0, 1, 17):
            with pytest.raises(ValueError, match=f"--window: {window}; must be 2 to 16, the sequence length"):
                make_task(settings(input=str(tmp_path / name), window=window), trained)
        with pytest.raises(ValueError, match="--stride: 9; must be 1 to 8, the window"):
            make_task(settings(input=str(tmp_path / name), window=8, stride=9), trained)


def test_json_lines_become_tasks(trained: TrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a b", "context": "a", "choices": ["b", "c"], "label": 0}')
    assert isinstance(make_task(settings(task="last-word", input=str(path)), trained), LastWord)
    assert isinstance(make_task(settings(task="multiple-choice", input=str(path)), trained), MultipleChoice)


def test_the_table_holds_every_number(tmp_path: Path) -> None:
    record = {
        "task": "perplexity", "input": f"/{'long/' * 40}[bold]x.txt", "model": "runs/x", "step": 1200,
        "settings": {"stride": 512, "limit": None},
        "results": {"perplexity": 1234.5678, "bits_per_byte": None, "words": 1234567},
    }  # fmt: skip
    stream = io.StringIO()
    print_results(record, Console(file=stream, width=80))
    shown = stream.getvalue()
    assert record["input"] in shown
    for words in ("1,234.57", "bits per byte", "n/a", "1,234,567", "512", "1,200"):
        assert words in shown, words


def test_progress_is_a_few_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with show_progress(Console(file=stream, width=80)) as advance:
        for done in range(1, 96):
            advance(done, 95)
    assert len(stream.getvalue().splitlines()) == 10 and stream.getvalue().endswith("95 of 95 batches\n")
    with show_progress(None) as advance:
        advance(1, 2)
    with show_progress(Console(file=stream, width=80, force_terminal=True)) as advance:
        advance(1, 2)
    assert "scoring" in stream.getvalue()
