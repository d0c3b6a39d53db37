"""Text of tokens that come one by one: equal to the text of all of them, and cut at stop strings, however it comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasparse.data.tokenizer import load_tokenizer
from megasparse.serving.text import GrowingText

BYTES = load_tokenizer("bytes")


def grown(tokenizer, prompt: list[int], tokens: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """What is shown after each token, and at the end."""
    text, parts = GrowingText(tokenizer, prompt, stop), []
    for token in tokens:
        parts.append(text.add(token))
        if text.stopped:
            break
    return [*parts, text.finish()]


@given(st.text(max_size=12), st.binary(max_size=30))
def test_the_parts_are_the_text_of_all_tokens(prompt, written) -> None:
    prompt_ids = BYTES.encode(prompt) or [256]
    whole = BYTES.decode([*prompt_ids, *written])
    assert "".join(grown(BYTES, prompt_ids, list(written))) == whole.removeprefix(BYTES.decode(prompt_ids))


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
