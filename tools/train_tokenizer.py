#!/usr/bin/env python3
"""Trains a SentencePiece tokenizer that gives back every text exactly, code and white space included."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from megasparse.data.arguments import add_corpus_arguments, reader_from_arguments, run_tool, tool_parser
from megasparse.data.tokenizer_training import MODEL_TYPES, train_sentencepiece

EXAMPLES = """examples:
  # for the Python files below a folder
  python tools/train_tokenizer.py --input src/ --glob '*.py' --vocab-size 8192 --output tokenizer.model

  # for prose, on a sample of 200,000 lines
  python tools/train_tokenizer.py --input books.txt.xz --vocab-size 16384 --max-sentences 200000 \\
      --output tokenizer.model
"""


def parse_arguments() -> argparse.Namespace:
    parser = tool_parser(__doc__, EXAMPLES)
    add_corpus_arguments(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="the .model file to write")
    parser.add_argument("--vocab-size", required=True, type=int, metavar="N", help="ids, bytes and end piece included")
    parser.add_argument("--model-type", choices=MODEL_TYPES, default="bpe", help="default: bpe")
    sentences = "lines to train on (default: 500000)"
    parser.add_argument("--max-sentences", type=int, default=500_000, metavar="N", help=sentences)
    parser.add_argument("--seed", type=int, default=0, help="of the sample of lines (default: 0)")
    parser.add_argument("--num-threads", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    if Path(arguments.output).exists() and not arguments.overwrite:
        raise ValueError(f"{arguments.output} exists; --overwrite replaces it")
    began = time.monotonic()
    names = ("vocab_size", "model_type", "max_sentences", "seed", "num_threads")
    options = {name: getattr(arguments, name) for name in names}
    report = train_sentencepiece(reader_from_arguments(arguments), arguments.output, **options)
    print(
        f"{arguments.output}: {report.vocab_size:,} pieces from {report.sentences_used:,} of "
        f"{report.sentences_seen:,} lines in {time.monotonic() - began:.1f} s"
    )


if __name__ == "__main__":
    parsed = parse_arguments()
    sys.exit(run_tool("train_tokenizer", lambda: main(parsed)))
