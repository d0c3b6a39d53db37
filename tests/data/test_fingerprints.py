"""Fingerprints of data: equal for equal data wherever it lies, and different for what replaced it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from megasparse.config.schema import RunConfig
from megasparse.data import CorpusReader, IndexedDataset, IndexedDatasetWriter, load_tokenizer
from megasparse.data.fingerprints import NUM_SAMPLES, SAMPLE_BYTES, changes, fingerprint, run_fingerprint
from megasparse.data.preprocess import preprocess


def write(prefix, documents, dtype=np.uint16):
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return fingerprint(IndexedDataset(prefix))


def test_equal_data_has_equal_fingerprints_wherever_it_lies(tmp_path):
    before = write(tmp_path / "a", [[1, 2, 3], [4]])
    assert (before["documents"], before["tokens"], before["dtype"]) == (2, 4, "uint16")
    for suffix in (".bin", ".idx"):
        shutil.copy(tmp_path / f"a{suffix}", tmp_path / f"b{suffix}")
    kept = json.loads(json.dumps(before))
    assert kept == fingerprint(IndexedDataset(tmp_path / "b")) and changes(kept, before) == []


@pytest.mark.parametrize(
    "documents, dtype, changed",
    [
        ([[1, 2, 3], [4, 5]], np.uint16, {"tokens", "index_sha256", "samples_sha256"}),
        ([[1, 2], [3, 4]], np.uint16, {"index_sha256"}),
        ([[1, 2, 3], [5]], np.uint16, {"samples_sha256"}),
        ([[1, 2, 3], [4]], np.int32, {"dtype", "index_sha256", "samples_sha256"}),
        ([[1, 2, 3], [4], []], np.uint16, {"documents", "index_sha256"}),
        ([], np.uint16, {"documents", "tokens", "index_sha256", "samples_sha256"}),
    ],
)
def test_what_replaced_the_data_is_noticed(tmp_path, documents, dtype, changed):
    before = write(tmp_path / "a", [[1, 2, 3], [4]])
    found = changes(before, write(tmp_path / "a", documents, dtype))
    assert {line.split(":")[0].removeprefix("data.") for line in found} == changed
    assert "tokens" not in changed or f"data.tokens: 4 before, {sum(map(len, documents))} now" in found


def test_samples_reach_over_the_whole_data(tmp_path):
    tokens = np.random.default_rng().integers(0, 60_000, 4 * NUM_SAMPLES * SAMPLE_BYTES // 2)
    before = write(tmp_path / "a", [tokens])
    for place in (0, len(tokens) // 2, len(tokens) - 1):
        width = 0 if place in (0, len(tokens) - 1) else 4 * SAMPLE_BYTES
        changed = tokens.copy()
        changed[place - width : place + width + 1] += 1
        assert changes(before, write(tmp_path / "a", [changed]))[0].startswith("data.samples_sha256: ")


def test_all_that_a_run_reads(tmp_path, bpe_model):
    shutil.copy(bpe_model, tmp_path / "t.model")
    (tmp_path / "a.txt").write_text("a text", encoding="utf-8")
    preprocess(
        CorpusReader([tmp_path / "a.txt"]), load_tokenizer("sentencepiece", tmp_path / "t.model"), tmp_path / "a"
    )
    write(tmp_path / "b", [[1, 2]])
    data = {"train": [{"path": str(tmp_path / "a")}, {"path": str(tmp_path / "b")}], "tokenizer": "sentencepiece"}
    values = {"run": {"name": "x"}, "data": {**data, "tokenizer_path": str(tmp_path / "t.model")}}
    config = RunConfig.model_validate(values)
    before = run_fingerprint(config)
    assert before["train"][0]["tokenizer_sha256"] == before["tokenizer_sha256"] is not None
    assert before["train"][1]["tokenizer_sha256"] is None and before["valid"] == []
    assert changes(before, run_fingerprint(config)) == []
    write(tmp_path / "b", [[1, 3]])
    (line,) = changes(before, run_fingerprint(config))
    assert line.startswith("data.train[1].samples_sha256: ")
    fewer = RunConfig.model_validate({**values, "data": {**values["data"], "train": data["train"][:1]}})
    assert changes(before, run_fingerprint(fewer)) == ["data.train: 2 of them before, 1 of them now"]
    (tmp_path / "t.model").write_bytes(b"another")
    assert changes(before, run_fingerprint(config))[0].startswith("data.tokenizer_sha256: ")
