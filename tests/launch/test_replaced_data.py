"""Data or a tokenizer that is replaced between a stop and going on: refused, or told where that is allowed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from runs import REPOSITORY, command, metrics, run, write_corpus

from megasparse.data import CorpusOptions, CorpusReader, IndexedDataset, IndexedDatasetWriter, load_tokenizer
from megasparse.data.preprocess import preprocess
from megasparse.data.tokenizer_training import train_sentencepiece


def test_data_that_was_replaced_is_no_continuation(tmp_path: Path) -> None:
    corpus, folder = write_corpus(tmp_path), tmp_path / "x"
    first = command(corpus, tmp_path, "run.name=x", "train.stop_after=3", ranks=1)
    again = command(corpus, tmp_path, "run.name=x", "train.resume=auto", "train.stop_after=4", ranks=1)
    run(first)
    record = json.loads((folder / "data.json").read_text())
    assert record["end_of_document"] == {"id": 256, "piece": None} and record["train"][0]["documents"] == 40
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    exchange_documents(corpus)
    refused = run(again, expect=2).stdout
    assert f"error: data: not as {folder / 'data.json'} says: data.train[0].samples_sha256: " in refused
    assert "or data.allow_changed=true" in refused and "Traceback" not in refused
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    told = run([*again, "data.allow_changed=true"]).stdout
    assert "warning: changed since the run was last started: data.train[0].samples_sha256: " in told
    assert "data.allow_changed:" not in told and metrics(folder)[-1]["step"] == 4
    assert json.loads((folder / "data.json").read_text())["train"] != record["train"]
    (folder / "data.json").unlink()
    assert "data: cannot be told, as " in run([*again, "train.stop_after=5"]).stdout


def test_another_split_of_the_data_is_no_continuation(tmp_path: Path) -> None:
    words = command(write_corpus(tmp_path), tmp_path, "run.name=x", "train.stop_after=2", ranks=1)
    again = [*words, "train.resume=auto", "train.stop_after=3", "data.valid_fraction=0.3"]
    run(words)
    assert "data.valid_fraction: 0.3, but the run to go on with has 0.1; must be 0.1" in run(again, expect=2).stdout
    told = run([*again, "data.allow_changed=true"]).stdout
    assert "warning: changed since the run was last started: the order of the samples, by data.valid_fraction: " in told


def test_a_tokenizer_that_was_replaced_is_no_continuation(tmp_path: Path) -> None:
    """By one of as many entries with the same end of a document."""
    train_tokenizers(tmp_path)
    shutil.copy(tmp_path / "bpe.model", tmp_path / "t.model")
    settings = ["run.name=x", "data.tokenizer=sentencepiece", f"data.tokenizer_path={tmp_path / 't.model'}"]
    corpus = write_corpus(tmp_path)
    words = command(corpus, tmp_path, *settings, "model.vocab_size=512", "train.resume=auto", ranks=1)
    run([*words, "train.stop_after=3"])
    shutil.copy(tmp_path / "unigram.model", tmp_path / "t.model")
    assert "data.tokenizer_sha256: " in run(words, expect=2).stdout


def test_a_run_with_another_tokenizer_than_that_of_its_data_does_not_start(tmp_path: Path) -> None:
    train_tokenizers(tmp_path)
    made_with, prefix = load_tokenizer("sentencepiece", tmp_path / "bpe.model"), tmp_path / "data"
    preprocess(python_sources(), made_with, prefix)
    settings = ["run.name=x", "data.tokenizer=sentencepiece", f"data.tokenizer_path={tmp_path / 'unigram.model'}"]
    told = run(command(prefix, tmp_path, *settings), expect=2).stdout
    assert "error: data.tokenizer: sentencepiece:unigram.model " in told and "Traceback" not in told
    assert f" is not the tokenizer of {prefix}, which was made with sentencepiece:bpe.model " in told
    assert not (tmp_path / "x").exists()


def python_sources() -> CorpusReader:
    return CorpusReader([REPOSITORY / "megasparse" / "utils"], CorpusOptions(glob="*.py"))


def train_tokenizers(folder: Path) -> None:
    """Two of as many entries and with the same end of a document."""
    for kind in ("bpe", "unigram"):
        train_sentencepiece(python_sources(), folder / f"{kind}.model", vocab_size=400, model_type=kind)


def exchange_documents(corpus: Path) -> None:
    """The same lengths and sizes, another text at the beginning."""
    dataset = IndexedDataset(corpus)
    documents = [np.array(dataset.document(index)) for index in range(len(dataset))]
    sizes = [Path(f"{corpus}{suffix}").stat().st_size for suffix in (".bin", ".idx")]
    documents[0][:5] = documents[0][:5][::-1] + 1
    del dataset
    with IndexedDatasetWriter(corpus, "uint16") as writer:
        for document in documents:
            writer.add_document(document)
        writer.finalize()
    assert [Path(f"{corpus}{suffix}").stat().st_size for suffix in (".bin", ".idx")] == sizes
