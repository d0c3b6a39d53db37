"""Trains SentencePiece models whose `decode(encode(text)) == text` for any text, code included.

    train_sentencepiece(CorpusReader(["src/"], CorpusOptions(glob="*.py")), "tokenizer.model", vocab_size=8192)

Nothing is normalised, white space is kept, and a character without a piece becomes its UTF-8 bytes. Training text is
cut at line ends, so no piece holds one: a line end is always the byte piece <0x0A>. Id 0 is the unknown piece, never
produced because of the bytes; id 1, `<|endoftext|>`, ends documents and cannot come out of any text.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from megasparse.data.corpus import CorpusReader
from megasparse.data.index_format import DatasetError
from megasparse.data.tokenizer import SPACE_MARK
from megasparse.utils.files import write_at_once

MODEL_TYPES = ("bpe", "unigram")
END_OF_DOCUMENT = "<|endoftext|>"
# SentencePiece passes over sentences beyond a length; longer lines are cut, so that none is lost.
MAX_SENTENCE_CHARACTERS = 2048
# 256 bytes, the unknown and the end-of-document piece, and at least some letters.
MIN_VOCAB_SIZE = 300


@dataclass(frozen=True)
class TrainingReport:
    """`sentences_seen` lines were in the corpus; `sentences_used` of them were trained on."""

    vocab_size: int
    sentences_seen: int
    sentences_used: int


def train_sentencepiece(
    reader: CorpusReader,
    output: str | PathLike[str],
    *,
    vocab_size: int,
    model_type: str = "bpe",
    max_sentences: int = 500_000,
    seed: int = 0,
    character_coverage: float = 0.9995,
    num_threads: int = 1,
) -> TrainingReport:
    """Trains on a uniform sample of `max_sentences` lines and writes the model file `output` at once.

    The same corpus, options and thread count give the same bytes. ValueError or DatasetError for settings or a
    corpus that cannot give such a vocabulary.
    """
    import sentencepiece

    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type is {model_type!r}; must be {', '.join(MODEL_TYPES)}")
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size}; with all bytes it must be at least {MIN_VOCAB_SIZE}")
    if max_sentences < 1:
        raise ValueError(f"max_sentences is {max_sentences}; it must be at least 1")
    sample, seen = _sample(_sentences(reader), max_sentences, seed)
    if not sample:
        raise DatasetError("the input holds no text to train on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_DOCUMENT,
            bos_id=-1,
            pad_id=-1,
            # Counted in bytes; a character has at most four.
            max_sentence_length=4 * MAX_SENTENCE_CHARACTERS,
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"no model of vocab_size {vocab_size} from {len(sample)} lines of text; use more text or a smaller "
            f"vocabulary ({error})"
        ) from error
    write_at_once(Path(output), model.getvalue())
    return TrainingReport(vocab_size, seen, len(sample))


def _sentences(reader: CorpusReader) -> Iterator[str]:
    for segment in reader.segments():
        # The mark for spaces and the null character are reserved: a sentence with one would be passed over.
        text = segment.text.replace(SPACE_MARK, "").replace("\0", "")
        for line in text.split("\n"):
            for start in range(0, len(line), MAX_SENTENCE_CHARACTERS):
                yield line[start : start + MAX_SENTENCE_CHARACTERS]


def _sample(sentences: Iterator[str], limit: int, seed: int) -> tuple[list[str], int]:
    """A uniform sample of at most `limit` sentences, in order of arrival slots, and how many there were."""
    generator = random.Random(seed)
    sample: list[str] = []
    seen = 0
    for sentence in sentences:
        seen += 1
        if len(sample) < limit:
            sample.append(sentence)
        else:
            # Reservoir sampling, Vitter's algorithm R.
            slot = generator.randrange(seen)
            if slot < limit:
                sample[slot] = sentence
    return sample, seen
