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


def other_model(kind):
    """Models that make special tokens of a text themselves, as their vocabularies hold them."""
    models, trainers, pre = tokenizers.models, tokenizers.trainers, tokenizers.pre_tokenizers
    options = {"special_tokens": ["<unk>", "</s>", "<|endoftext|>"], "show_progress": False}
    if kind == "unigram":
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        trainer, tokenizer.pre_tokenizer = (
            trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", **options),
            pre.Metaspace(),
        )
        tokenizer.decoder = tokenizers.decoders.Metaspace()
    else:
        kinds = {"bpe": (models.BPE, trainers.BpeTrainer), "word pieces": (models.WordPiece, trainers.WordPieceTrainer)}
        model, make = kinds[kind]
        tokenizer = tokenizers.Tokenizer(model(unk_token="<unk>"))
        trainer, tokenizer.pre_tokenizer = make(vocab_size=300, **options), pre.WhitespaceSplit()
    text = "a page about </s> and <|endoftext|> </s> <unk> and how it works"
    tokenizer.train_from_iterator([text] * 5, trainer)
    return tokenizer


SPELLED = [
    "<|endoftext|>",
    "a page about <|endoftext|> and how it works",
    "</s> <s></s></s>\n</s>",
    "<unk> <unk><|endoftext|></s>",
]


@pytest.mark.parametrize("kind", ["byte level", "added later", "bpe", "unigram", "word pieces"])
def test_a_text_that_spells_a_special_token_stays_text(tmp_path, kind):
    if kind == "byte level":
        model = byte_level("<|endoftext|>", "</s>", "<unk>")
    elif kind == "added later":
        model = byte_level("<unk>")
        # Not marked as special, as some published vocabularies have it.
        model.add_tokens([tokenizers.AddedToken("<|endoftext|>", special=False)])
    else:
        model = other_model(kind)
    tokenizer = load(model, tmp_path)
    special = {model.token_to_id(name) for name in ("<|endoftext|>", "</s>")} - {None}
    assert tokenizer.end_of_document_id == model.token_to_id("<|endoftext|>")
    for text, row in zip(SPELLED, tokenizer.encode_batch(SPELLED), strict=True):
        assert row.tolist() == tokenizer.encode(text)
        assert special.isdisjoint(row.tolist())
        if kind in ("byte level", "added later"):
            assert tokenizer.decode([*row, tokenizer.end_of_document_id]) == text
    # All other texts keep their tokens.
    assert tokenizer.encode("a page about how it works") == model.encode("a page about how it works").ids
    assert max(model.get_vocab().values()) + 1 == tokenizer.vocab_size


def test_tokens_of_the_text_beside_the_special_ones_are_still_found(tmp_path):
    model = byte_level("<|endoftext|>")
    model.add_tokens([tokenizers.AddedToken("<tool>", special=False)])
    tokenizer = load(model, tmp_path)
    assert model.token_to_id("<tool>") in tokenizer.encode("a <tool> b <|endoftext|>")


def test_a_piece_chosen_by_hand_may_also_be_text(tmp_path):
    tokenizer = load(byte_level("<|endoftext|>"), tmp_path, end_of_document="a")
    assert tokenizer.encode("a") == [tokenizer.end_of_document_id]


def test_ids_beyond_the_vocabulary_decode_to_nothing(tmp_path):
    tokenizer = load(byte_level("<|endoftext|>"), tmp_path)
    first, *rest = tokenizer.encode("a text")
    assert tokenizer.decode([first, tokenizer.vocab_size, *rest, 10**6]) == "a text"
