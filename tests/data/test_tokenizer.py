"""Tokenizers: exact round trips, ids outside the vocabulary, unusable files, training."""

from __future__ import annotations

import builtins
import random
import sys

import pytest

from megasparse.data import CorpusOptions, CorpusReader, DatasetError, load_tokenizer
from megasparse.data.tokenizer_training import train_sentencepiece

TEXTS = [
    "",
    " ",
    "def f(x):\n\treturn  x\n\n\n        # two  spaces\r\n\tif x:\n\t\tpass\n",
    "  leading and trailing   ",
    "é 漢字 🙂 \u00a0\u3000\ufeff ﬁ A\u030a \u2028 \u2585",
    "the mark \u2581 of \u2581\u2581 SentencePiece\u2581",
    "\x00\x01\x1f\x7f",
    "<unk> </s> <s> <|endoftext|> <0x0A>",
    "1234567890" * 300,
]


@pytest.fixture(scope="module")
def byte_tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture(scope="module")
def sentencepiece(trained_model):
    return load_tokenizer("sentencepiece", trained_model)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_exact_round_trip(sentencepiece, byte_tokenizer, text):
    for tokenizer in (sentencepiece, byte_tokenizer):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_document_id not in ids
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        assert tokenizer.decode([*ids, tokenizer.end_of_document_id]) == text


def test_round_trip_of_random_unicode(sentencepiece):
    generator = random.Random()
    for _ in range(50):
        points = [
            generator.choice([generator.randrange(0x250), generator.randrange(0x2500, 0x2600)]) for _ in range(60)
        ]
        text = "".join(map(chr, points))
        assert sentencepiece.decode(sentencepiece.encode(text)) == text


def test_round_trip_of_source_files(sentencepiece, python_sources):
    for path in sorted(python_sources.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        ids = sentencepiece.encode(text)
        assert sentencepiece.decode(ids) == text
        assert len(ids) < 0.6 * len(text)


def test_batches_equal_single_texts(sentencepiece, byte_tokenizer):
    for tokenizer in (sentencepiece, byte_tokenizer):
        rows = tokenizer.encode_batch(TEXTS, num_threads=2)
        assert [row.tolist() for row in rows] == [tokenizer.encode(text) for text in TEXTS]


def test_text_may_be_cut_after_any_line_end(sentencepiece):
    text = TEXTS[2] * 3
    whole = sentencepiece.encode(text)
    lines = text.splitlines(keepends=True)
    assert [token for line in lines for token in sentencepiece.encode(line)] == whole


def test_ids_beyond_the_vocabulary_decode_to_nothing(sentencepiece, byte_tokenizer):
    for tokenizer in (sentencepiece, byte_tokenizer):
        ids = tokenizer.encode("a text")
        beyond = [tokenizer.vocab_size, tokenizer.vocab_size + 47, 10**6]
        assert tokenizer.decode([*beyond, *ids[:2], *beyond, *ids[2:], *beyond]) == "a text"
        assert tokenizer.decode(beyond) == ""
        with pytest.raises(ValueError, match="token id -1; ids must be 0 or more"):
            tokenizer.decode([1, -1])


def test_bytes(byte_tokenizer):
    assert (byte_tokenizer.vocab_size, byte_tokenizer.end_of_document_id) == (257, 256)
    assert byte_tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert byte_tokenizer.decode([0xC3]) == "\ufffd"


def test_published_sentencepiece_model(shared_data):
    tokenizer = load_tokenizer("sentencepiece", shared_data / "sentencepiece" / "sp-test-1k.model")
    expected = [151, 88, 21, 887, 5, 65, 47, 11, 4, 15, 400, 6]
    assert tokenizer.encode("Hello world, this is a test.") == expected
    assert (tokenizer.vocab_size, tokenizer.end_of_document_id) == (1000, 2)
    assert tokenizer.decode(expected) == "Hello world, this is a test."


@pytest.fixture
def gpt2_file(shared_data, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    folder = shared_data / "gpt2-tokenizer"
    path = tmp_path / "tokenizer.json"
    model = tokenizers.ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    model.save(str(path))
    return path


def test_huggingface(gpt2_file):
    tokenizer = load_tokenizer("huggingface", gpt2_file)
    assert tokenizer.encode("Hello world, this is GPT-2.") == [15496, 995, 11, 428, 318, 402, 11571, 12, 17, 13]
    assert (tokenizer.vocab_size, tokenizer.end_of_document_id) == (50257, 50256)
    assert tokenizer.decode([*tokenizer.encode(TEXTS[2]), 50256]) == TEXTS[2]
    assert [row.tolist() for row in tokenizer.encode_batch(["a b", "c"])] == [tokenizer.encode("a b"), [66]]
    assert tokenizer.decode([15496, 50257, 50303, 995]) == "Hello world"
    named = load_tokenizer("huggingface", gpt2_file, end_of_document="Hello")
    assert named.end_of_document_id == 15496
    with pytest.raises(ValueError, match="no end-of-document token; looked for <nothing>"):
        load_tokenizer("huggingface", gpt2_file, end_of_document="<nothing>")


def test_huggingface_without_the_library(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name == "tokenizers":
            raise ImportError(name)
        return real_import(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, "tokenizers", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"pip install 'megasparse\[hf\]'"):
        load_tokenizer("huggingface", tmp_path / "tokenizer.json")


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
@pytest.mark.parametrize("content", [b"", b"no tokenizer", b'{"model": 3}'])
def test_files_that_are_no_tokenizer(tmp_path, kind, content):
    path = tmp_path / "broken.model"
    with pytest.raises(ValueError, match=r"broken\.model: no such tokenizer file"):
        load_tokenizer(kind, path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.model: not a "):
        load_tokenizer(kind, path)


def test_wrong_use_of_kinds(tmp_path):
    with pytest.raises(ValueError, match="must be one of sentencepiece, huggingface, bytes"):
        load_tokenizer("word")
    with pytest.raises(ValueError, match="needs a file"):
        load_tokenizer("sentencepiece")
    with pytest.raises(ValueError, match="has no file"):
        load_tokenizer("bytes", tmp_path / "x")


def test_training_is_deterministic_and_respects_the_sample(tmp_path, python_sources):
    def train(name, **settings):
        reader = CorpusReader([python_sources], CorpusOptions(glob="*.py"))
        report = train_sentencepiece(reader, tmp_path / name, vocab_size=500, **settings)
        return report, (tmp_path / name).read_bytes()

    first, content = train("a.model", max_sentences=600, seed=1)
    _, again = train("b.model", max_sentences=600, seed=1)
    _, other = train("c.model", max_sentences=600, seed=2)
    assert content == again != other
    assert first.sentences_used == 600 < first.sentences_seen
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "b.model", "c.model"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"vocab_size": 100}, "vocab_size is 100; .* at least 300"),
        ({"vocab_size": 60_000}, "no model of vocab_size 60000"),
        ({"vocab_size": 500, "model_type": "word"}, "must be bpe, unigram"),
        ({"vocab_size": 500, "max_sentences": 0}, "max_sentences is 0"),
    ],
)
def test_training_with_bad_settings(tmp_path, python_sources, settings, message):
    with pytest.raises(ValueError, match=message):
        train_sentencepiece(CorpusReader([python_sources], CorpusOptions(glob="*.py")), tmp_path / "x", **settings)
    assert list(tmp_path.iterdir()) == []


def test_training_on_nothing(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DatasetError, match="no text to train on"):
        train_sentencepiece(CorpusReader([tmp_path / "empty.txt"]), tmp_path / "x", vocab_size=500)


def test_tool(run_tool, tmp_path, python_sources):
    arguments = ("--input", python_sources, "--glob", "*.py", "--vocab-size", 600, "--output", tmp_path / "t.model")
    done = run_tool("train_tokenizer", *arguments)
    assert done.returncode == 0, done.stderr
    assert "600 pieces from" in done.stdout
    assert load_tokenizer("sentencepiece", tmp_path / "t.model").vocab_size == 600
    again = run_tool("train_tokenizer", *arguments)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "--overwrite replaces it" in again.stderr
    assert run_tool("train_tokenizer", *arguments, "--overwrite").returncode == 0
