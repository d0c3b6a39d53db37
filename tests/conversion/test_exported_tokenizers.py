"""SentencePiece models in exported folders: transformers gives the same ids, or there is none to open."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_models import save

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")

from megasparse.conversion.huggingface.exporting import export_huggingface  # noqa: E402
from megasparse.conversion.huggingface.importing import import_huggingface  # noqa: E402
from megasparse.conversion.sources import open_source  # noqa: E402
from megasparse.data.corpus import CorpusOptions, CorpusReader  # noqa: E402
from megasparse.data.tokenizer import load_tokenizer  # noqa: E402
from megasparse.data.tokenizer_training import train_sentencepiece  # noqa: E402

TEXT = Path(__file__).read_text(encoding="utf-8")
PROBES = [*TEXT.split("\n"), TEXT, "  two  spaces ", "\n\n\tx", "ünïcode 漢字 🙂", " ", "\u00e9 e\u0301 \ufb01"]
SIZE = 380


def llama_like(path: Path, **changes: object) -> None:
    settings = {
        "model_type": "bpe", "byte_fallback": True, "bos_id": 1, "eos_id": 2, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "add_dummy_prefix": False,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_prefix=str(path.with_suffix("")),
        **{"vocab_size": SIZE, **settings, **changes},
    )  # fmt: skip


def ours(path: Path, model_type: str = "bpe") -> None:
    source = path.with_name("text.txt")
    source.write_text(TEXT, encoding="utf-8")
    train_sentencepiece(CorpusReader([str(source)], CorpusOptions()), str(path), vocab_size=SIZE, model_type=model_type)


def export(tmp_path: Path, case: str) -> tuple[Path, list[str]]:
    """A model with the tokenizer that lies in `tmp_path`, in and out again."""
    theirs = tmp_path / "theirs"
    import_huggingface(theirs, tmp_path / "ours")
    return tmp_path / "out", export_huggingface(open_source(tmp_path / "ours"), tmp_path / "out")


@pytest.fixture(params=["gpt2", "llama2"])
def case(request, monkeypatch) -> str:
    import random_models

    kind, settings = random_models.CASES[request.param]
    monkeypatch.setitem(random_models.CASES, request.param, (kind, {**settings, "vocab_size": SIZE}))
    return request.param


@pytest.mark.parametrize("kind", [ours, llama_like])
def test_transformers_gives_our_ids(tmp_path, case, kind) -> None:
    save(case, tmp_path / "theirs")
    kind(tmp_path / "theirs" / "tokenizer.model")
    folder, notes = export(tmp_path, case)
    assert notes == []
    expected = load_tokenizer("sentencepiece", tmp_path / "theirs" / "tokenizer.model")
    opened = transformers.AutoTokenizer.from_pretrained(folder)
    for text in PROBES:
        assert opened(text)["input_ids"] == expected.encode(text), text
    assert len(opened) == SIZE and opened.eos_token_id == expected.end_of_document_id
    assert opened.decode(expected.encode(TEXT)).strip() == TEXT.strip()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: ours(path, "unigram"), "it is a unigram model"),
        (lambda path: llama_like(path, byte_fallback=False, vocab_size=250), "it has no pieces for bytes"),
        (lambda path: llama_like(path, add_dummy_prefix=True), "it puts a space before each text"),
        (lambda path: llama_like(path, remove_extra_whitespaces=True), "white space"),
        (lambda path: llama_like(path, normalization_rule_name="nmt_nfkc"), "changes characters"),
    ],
)
def test_where_ids_would_differ_there_is_no_tokenizer_and_it_is_said(tmp_path, case, make, reason) -> None:
    save(case, tmp_path / "theirs")
    try:
        make(tmp_path / "theirs" / "tokenizer.model")
    except (RuntimeError, ValueError) as error:
        pytest.skip(str(error))
    folder, notes = export(tmp_path, case)
    assert len(notes) == 1 and "no tokenizer is written" in notes[0] and reason in notes[0]
    assert not list(folder.glob("tokenizer*")) and notes[0] in (folder / "README.md").read_text()
