#!/usr/bin/env python3
"""Makes supervised tasks as JSON lines of prompts and responses, for tools/preprocess_data.py --supervised.

`arithmetic` writes word problems with worked answers: train.jsonl, valid.jsonl (other numbers), test.jsonl (other
wordings and numbers). `sst2` writes the sentiment of film reviews from the tables of GLUE: a random part of the first
table as valid.jsonl, the rest as train.jsonl, the second table as test.jsonl. The same seed makes the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from megasparse.config.loader import ConfigError
from megasparse.data.arguments import run_tool, tool_parser
from megasparse.utils.files import make_folders, write_at_once

EXAMPLES = """examples:
  python tools/make_tasks.py arithmetic --train 20000 --valid 500 --test 500 --output data/arithmetic
  python tools/make_tasks.py arithmetic --largest 12 --known-wordings --output data/small-numbers

  python tools/make_tasks.py sst2 --input sst2/train.tsv.xz sst2/dev.tsv --output data/sst2
  python tools/preprocess_data.py --supervised --input data/sst2/train.jsonl --tokenizer bytes \\
      --output-prefix data/sst2/train
"""
HEADER = "sentence\tlabel"
RESPONSES = {"0": " negative", "1": " positive"}

Records = Sequence[dict[str, str]]


def main(arguments: argparse.Namespace) -> None:
    for split in ("train", "valid", "test"):
        count = getattr(arguments, split, None)
        if count is not None and count < 1:
            raise ConfigError(f"--{split}: {count}; must be 1 or more")
    make = arithmetic if arguments.task == "arithmetic" else sentiment
    for split, records in make(arguments).items():
        make_folders(arguments.output)
        path = arguments.output / f"{split}.jsonl"
        write_at_once(path, "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records))
        print(f"{path}: {len(records):,} examples")


def arithmetic(arguments: argparse.Namespace) -> dict[str, Records]:
    from megasparse.studies.word_problems import SPLITS, word_problems

    def problems(split: str, count: int) -> Records:
        return word_problems(split, count, arguments.seed, arguments.largest)

    if not arguments.known_wordings:
        return {split: problems(split, getattr(arguments, split)) for split in SPLITS}
    held_out = problems("valid", arguments.valid + arguments.test)
    train = problems("train", arguments.train)
    return {"train": train, "valid": held_out[: arguments.valid], "test": held_out[arguments.valid :]}


def sentiment(arguments: argparse.Namespace) -> dict[str, Records]:
    train, test = (read_table(path) for path in arguments.input)
    if arguments.valid >= len(train):
        raise ConfigError(f"--valid: {arguments.valid}; must be below the {len(train)} rows of the first table")
    random.Random(arguments.seed).shuffle(train)
    valid, train = train[: arguments.valid], train[arguments.valid :]
    if arguments.train is not None:
        train = train[: arguments.train]
    return {"train": train, "valid": valid, "test": test}


def read_table(path: str) -> list[dict[str, str]]:
    """The rows of a table of GLUE as prompts and responses."""
    from megasparse.evaluation.inputs import read_text

    if not Path(path).is_file():
        raise ConfigError(f"--input: {path}; must be a file: a table of GLUE, compressed or not")
    header, *rows = read_text(path).splitlines()
    if header != HEADER:
        raise ConfigError(f"--input: {path}, line 1: {header[:60]!r}; must be {HEADER!r}")
    if not rows:
        raise ConfigError(f"--input: {path}; has no rows; must have one below its first line")
    records = []
    for number, row in enumerate(rows, 2):
        sentence, _, label = row.rpartition("\t")
        if label not in RESPONSES or not sentence.strip():
            raise ConfigError(f"--input: {path}, line {number}: {row[-60:]!r}; must be a sentence, a tab and 0 or 1")
        records.append({"prompt": f"{sentence.strip()}\nSentiment:", "response": RESPONSES[label]})
    return records


def parse_arguments() -> argparse.Namespace:
    parser = tool_parser(__doc__, EXAMPLES)
    tasks = parser.add_subparsers(dest="task", required=True)
    problems = tasks.add_parser("arithmetic", help="word problems with worked answers")
    problems.add_argument("--train", type=int, default=20_000, metavar="N", help="default: 20000")
    problems.add_argument("--test", type=int, default=500, metavar="N", help="default: 500")
    largest = "no larger numbers in a problem: the fewer, the easier to learn (default: 40)"
    problems.add_argument("--largest", type=int, default=40, metavar="N", help=largest)
    known = "test on the wordings to learn from, with numbers that were held out"
    problems.add_argument("--known-wordings", action="store_true", help=known)
    reviews = tasks.add_parser("sst2", help="sentiment of film reviews")
    tables = "the tables to learn from and to test on, compressed or not"
    reviews.add_argument("--input", nargs=2, required=True, metavar=("TRAIN", "DEV"), help=tables)
    reviews.add_argument("--train", type=int, metavar="N", help="only so many rows to learn from")
    for one in (problems, reviews):
        one.add_argument("--valid", type=int, default=500, metavar="N", help="default: 500")
        one.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
        one.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder for the files")
    return parser.parse_args()


if __name__ == "__main__":
    options = parse_arguments()
    raise SystemExit(run_tool("make_tasks", lambda: main(options)))
