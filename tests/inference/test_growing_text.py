"""Text of tokens that come one by one: equal to the text of all of them, and cut at stop strings, however it comes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasparse.data.tokenizer import load_tokenizer
from megasparse.inference.growing_text import GrowingText

BYTES = load_tokenizer("bytes")


def grown(tokenizer, prompt: list[int], tokens: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """What is shown after each token, and at the end."""
    text, parts = GrowingText(tokenizer, prompt, stop), []
    for token in tokens:
        parts.append(text.add(token))
        if text.stopped:
            break
    return [*parts, text.finish()]


@given(st.text(st.characters() | st.just("\ufffd"), max_size=12), st.binary(max_size=30))
def test_the_parts_are_the_text_of_all_tokens(prompt, written) -> None:
    """The prompt consists of whole characters, also one that decoders write for bytes that are none."""
    prompt_ids = BYTES.encode(prompt) or [256]
    assert "".join(grown(BYTES, prompt_ids, list(written))) == written.decode(errors="replace")


@given(st.binary(max_size=12), st.binary(max_size=12))
def test_no_part_of_a_prompt_of_any_bytes_is_shown(prompt, written) -> None:
    """But for a character that the text completes."""
    whole, before = (prompt + written).decode(errors="replace"), prompt.decode(errors="replace")
    known = before if whole.startswith(before) else before[:-1]
    assert "".join(grown(BYTES, list(prompt) or [256], list(written))) == whole.removeprefix(known)


@given(st.text(alphabet="ab", max_size=20), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_it_ends_where_the_first_stop_string_begins(written, stops) -> None:
    """Which is the first to be complete, and of several complete at once the first in the text."""
    expected = written
    for end in range(len(written) + 1):
        places = [place for stop in stops if (place := written.find(stop, 0, end)) >= 0]
        if places:
            expected = written[: min(places)]
            break
    assert "".join(grown(BYTES, [256], BYTES.encode(written), tuple(stops))) == expected


def test_characters_come_whole_and_nothing_that_a_stop_string_begins_with() -> None:
    assert grown(BYTES, [97], BYTES.encode("é!")) == ["", "é", "!", ""]
    assert grown(BYTES, [97], BYTES.encode("x--y--z"), ("--z",)) == ["x", "", "", "--y", "", "", "", ""]
    assert grown(BYTES, [97], BYTES.encode("x--"), ("--z",)) == ["x", "", "", "--"]
    # The rest of a character that the prompt has begun; bytes that never become one are told at the end.
    assert grown(BYTES, "é".encode()[:1], "é".encode()[1:]) == ["é", ""]
    assert grown(BYTES, [97], [0xC3]) == ["", "\ufffd"]
    assert grown(BYTES, [97, 0xC3], [98]) == ["b", ""] and grown(BYTES, [97, 0xC3], []) == [""]
    assert grown(BYTES, [97, 0xE2], [0x82, 0xFF, 98]) == ["", "", "\ufffdb", ""]
    assert grown(BYTES, BYTES.encode("\ufffd"), BYTES.encode("\ufffda")) == ["", "", "", "\ufffda", ""]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece model with the dummy prefix of Llama's, which drops the space before the first word."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("the cat sat on the mat and the dog ran to the cat\n" * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=300, byte_fallback=True,
        model_type="bpe", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return load_tokenizer("sentencepiece", folder / "tokenizer.model")


@pytest.mark.parametrize("written", [" cat sat on", "s and  dogs", " Ж€𝄞 the", "\n the\n\ncat ", "  "])
def test_spaces_between_prompt_and_text_are_kept(pieces, written) -> None:
    for prompt in ("the", "the dog ran to the mat and the cat sat on the mat", "a "):
        prompt_ids = pieces.encode(prompt)
        tokens = pieces.encode(prompt + written)[len(prompt_ids) :]
        # A token without text in between changes nothing.
        tokens = [*tokens[:1], pieces.end_of_document_id, *tokens[1:]]
        whole = pieces.decode([*prompt_ids, *tokens])
        assert "".join(grown(pieces, prompt_ids, tokens)) == whole.removeprefix(pieces.decode(prompt_ids))


def test_any_tokens_of_a_sentencepiece_model_give_the_text_of_all(shared_data) -> None:
    """Pieces of spaces alone too, which its decoder drops at the beginning of a text, one after another."""
    tokenizer = load_tokenizer("sentencepiece", shared_data / "sentencepiece" / "sp-test-1k.model")
    chance = random.Random(0)
    space = tokenizer.encode("\u4e16")[0]
    assert tokenizer.decode([space]) == ""
    for _ in range(300):
        weights = [40 if token == space else 1 for token in range(300)]
        prompt, tokens = (chance.choices(range(300), weights, k=chance.randint(1, 15)) for _ in range(2))
        whole = tokenizer.decode([*prompt, *tokens])
        assert "".join(grown(tokenizer, prompt, tokens)) == whole.removeprefix(tokenizer.decode(prompt))
    # The space before the first word is part of the text.
    prompt, tokens = tokenizer.encode("the"), tokenizer.encode("the cat")[1:]
    assert grown(tokenizer, prompt, tokens)[0].startswith(" ")


@pytest.fixture(scope="module")
def bytes_in_rows(tmp_path_factory):
    """As Llama 2's tokenizer.json: letters are pieces, all else bytes, and a row of bytes is decoded as one."""
    tokenizers = pytest.importorskip("tokenizers")
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghijklmnopqrstuvwxyz\u2581", "<unk>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    prepend, replace = tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = tokenizers.normalizers.Sequence([prepend, replace])
    kinds = tokenizers.decoders
    parts = [kinds.Replace("\u2581", " "), kinds.ByteFallback(), kinds.Fuse(), kinds.Strip(" ", 1, 0)]
    tokenizer.decoder = kinds.Sequence(parts)
    tokenizer.add_special_tokens(["</s>"])
    path = tmp_path_factory.mktemp("rows") / "tokenizer.json"
    tokenizer.save(str(path))
    return load_tokenizer("huggingface", path)


@pytest.mark.parametrize("prompt", ["the", "世界你好", "a 世界世界世界", "é", "🙂🙂🙂", " ", "\ufffd"])
def test_bytes_that_are_decoded_in_rows(bytes_in_rows, prompt) -> None:
    """A context that begins within a character would make U+FFFD of the whole row, the bytes of the text included."""
    prompt_ids = bytes_in_rows.encode(prompt)
    for written in (" cat", "a 吗 b", "世界", "你好你好你好 é", "🙂"):
        tokens = bytes_in_rows.encode(prompt + written)[len(prompt_ids) :]
        assert "".join(grown(bytes_in_rows, prompt_ids, tokens)) == written
    # A byte that is no character leaves those before it alone, although the decoder writes them as U+FFFD then.
    letter = bytes_in_rows.encode("a")[1]
    assert grown(bytes_in_rows, prompt_ids, [0xC3, letter]) == ["", "\ufffda", ""]
