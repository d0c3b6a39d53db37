"""tokenizer.json files: what they store besides the vocabulary does not change the tokens of a text."""

from __future__ import annotations

import pytest

from megasparse.data import load_tokenizer

tokenizers = pytest.importorskip("tokenizers")

WORDS = "the model reads a small corpus of plain words and learns to continue them "


def byte_level(*special: str):
    """A byte-level BPE tokenizer with these special tokens as its first ids."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS * 3], trainer)
    return tokenizer


def load(tokenizer, folder, **options):
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return load_tokenizer("huggingface", path, **options)


@pytest.mark.parametrize("store", ["truncation", "padding", "fixed padding"])
def test_stored_truncation_and_padding_are_ignored(tmp_path, store):
    texts = [WORDS * 20, WORDS, "a"]
    model = byte_level("<|endoftext|>", "<pad>")
    expected = [model.encode(text).ids for text in texts]
    if store == "truncation":
        model.enable_truncation(16)
    else:
        model.enable_padding(pad_id=1, pad_token="<pad>", length=200 if store == "fixed padding" else None)
    tokenizer = load(model, tmp_path)
    assert [row.tolist() for row in tokenizer.encode_batch(texts)] == expected
    assert [tokenizer.encode(text) for text in texts] == expected
