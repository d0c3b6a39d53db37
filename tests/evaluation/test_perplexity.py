"""Perplexity: the numbers of a plain transformers loop, and the units that a text is counted in."""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import model_with_weights_of, random_gpt2

from megasparse.data import DataFacts, EndOfDocument, IndexedDataset, IndexedDatasetWriter
from megasparse.data.tokenizer import load_tokenizer
from megasparse.evaluation.inputs import open_tokens
from megasparse.evaluation.perplexity import TextSize, perplexity, text_perplexity, token_file_perplexity
from megasparse.evaluation.scoring import Scorer

BYTES = load_tokenizer("bytes")
T = 48


def words(count: int) -> str:
    rng = random.Random(2)
    return "".join(rng.choice(["the ", "river ", "ran\n", "cold , ", "für ", "days . "]) for _ in range(count))


def transformers_perplexity(reference: torch.nn.Module, tokens: torch.Tensor, window: int, stride: int) -> float:
    """The plain loop: labels of tokens that were scored before are masked out, the library computes the loss."""
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, tokens.numel(), stride):
        end = min(begin + window, tokens.numel())
        inputs = tokens[None, begin:end]
        labels = inputs.clone()
        labels[:, : previous_end - begin] = -100
        # The library shifts the labels by one, so the first of a window never counts.
        scored = int((labels[:, 1:] != -100).sum())
        if scored:
            with torch.no_grad():
                total += reference(inputs, labels=labels).loss.item() * scored
            count += scored
        previous_end = end
        if end == tokens.numel():
            break
    return math.exp(total / count)


@pytest.mark.parametrize("stride", [7, 24, 48])
def test_a_hugging_face_model_has_the_perplexity_of_a_plain_transformers_loop(stride: int) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    reference = random_gpt2(vocab_size=257, seq_length=T)
    text = words(60)
    task = text_perplexity(text, BYTES, T, stride)
    results = task.results(Scorer(model_with_weights_of(reference), batch_size=3).scores(task.windows))
    tokens = torch.tensor(BYTES.encode(text))
    # float32 on both sides.
    assert results["perplexity"] == pytest.approx(transformers_perplexity(reference, tokens, T, stride), rel=1e-5)
    expected = len(tokens) - 1 if stride < T else len(tokens) - math.ceil(len(tokens) / T)
    assert results["tokens"] == len(tokens) and results["tokens_scored"] == expected
    assert results["loss"] == pytest.approx(math.log(results["perplexity"]))


def constant_scores(task, nats_per_token: float) -> np.ndarray:
    return np.array([[-nats_per_token * window.num_scored, 0.0] for window in task.windows])


def test_units_are_those_of_the_original_text() -> None:
    original = " = Title = \n \n für 1 @,@ 000 days , \n"
    task = text_perplexity(original, BYTES, 8, 4, "wikitext")
    plain = "= Title =\n\nfür 1,000 days,\n"
    assert bytes(np.asarray(task.windows.tokens).tolist()).decode() == plain
    results = task.results(constant_scores(task, 2.0))
    nats = 2.0 * (len(plain.encode()) - 1)
    assert (results["bytes"], results["words"], results["line_ends"]) == (len(original.encode()), 9, 3)
    assert results["perplexity"] == pytest.approx(math.exp(2.0))
    assert results["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(original.encode()))
    assert results["perplexity_per_byte"] == pytest.approx(math.exp(nats / len(original.encode())))
    assert results["perplexity_per_word"] == pytest.approx(math.exp(nats / 9))
    assert results["perplexity_per_word_and_line_end"] == pytest.approx(math.exp(nats / 12))
    assert task.settings == {
        "window": 8, "stride": 4, "detokenizer": "wikitext", "lines_made_equal_by_detokenizer": 0,
    }  # fmt: skip


def test_a_token_file_counts_the_decoded_documents(tmp_path: Path) -> None:
    texts = ["für zwei\n", "drei vier fünf"]
    with IndexedDatasetWriter(tmp_path / "x", "uint16") as writer:
        for text in texts:
            writer.add_document([*BYTES.encode(text), BYTES.end_of_document_id])
    dataset = IndexedDataset(tmp_path / "x")
    task = token_file_perplexity(dataset, BYTES, 8, 4)
    results = task.results(constant_scores(task, 1.0))
    size = TextSize.of("".join(texts))
    assert results["bytes"] == size.bytes and results["words"] == 5 and results["line_ends"] == 1
    assert results["tokens"] == size.bytes + 2 and results["tokens_scored"] == size.bytes + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        ({"vocab_size": 300, "tokenizer": "other"}, "made with other, of 300 entries, the model's bytes has 257"),
        ({"end_of_document": EndOfDocument(0, "<s>")}, r"ends documents with id 0 \(<s>\), the model with id 256"),
    ],
)
def test_a_token_file_of_another_tokenizer_is_told(tmp_path: Path, changes: dict, message: str) -> None:
    with IndexedDatasetWriter(tmp_path / "x", "uint16", facts=replace(DataFacts.of(BYTES), **changes)) as writer:
        writer.add_document([97, 98, BYTES.end_of_document_id])
    with pytest.warns(UserWarning, match=message) if message else warnings.catch_warnings():
        if not message:
            warnings.simplefilter("error")
        assert open_tokens(str(tmp_path / "x"), 300, BYTES).num_tokens == 3


def test_ids_that_only_the_model_has_stand_for_no_text(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "x", "uint16") as writer:
        writer.add_document([97, 300, 98])
    task = token_file_perplexity(IndexedDataset(tmp_path / "x"), BYTES, 8, 4)
    results = task.results(constant_scores(task, 1.0))
    assert results["bytes"] == 2 and results["tokens_scored"] == 2


def test_a_part_of_a_text_has_no_bytes_and_words() -> None:
    task = text_perplexity("one two three four", BYTES, 8, 4, limit=2)
    results = task.results(constant_scores(task, 1.0))
    assert results["windows"] == 2 and results["tokens_scored"] == 11 and "bytes" not in results
    assert "bytes" in (whole := text_perplexity("one", BYTES, 8, limit=2)).results(constant_scores(whole, 1.0))


def test_default_stride_is_half_the_window() -> None:
    assert text_perplexity("one two three four", BYTES, 8).settings["stride"] == 4


def test_bad_values_are_refused() -> None:
    for stride in (0, 9, -1):
        with pytest.raises(ValueError, match=f"--stride: {stride}; must be 1 to 8"):
            text_perplexity("one two", BYTES, 8, stride)
    with pytest.raises(ValueError, match="the text has 1 tokens"):
        text_perplexity("a", BYTES, 8)
    assert perplexity(1e6, 3) is None and perplexity(1.0, 0) is None
