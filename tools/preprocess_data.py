#!/usr/bin/env python3
"""Turns text, JSONL or a folder of files into an indexed token dataset (.bin and .idx).

Under mpirun the ranks share the work; the result has the same bytes as that of one process.
"""

from __future__ import annotations

import argparse
import sys

from megasparse.data.arguments import (
    add_corpus_arguments,
    positive,
    progress_bar,
    reader_from_arguments,
    run_tool,
    tool_parser,
    utf8_argument,
)
from megasparse.data.facts import DataFacts, check_output_prefix, facts_path
from megasparse.data.index_format import dataset_paths
from megasparse.data.preprocess import mpi_communicator, preprocess, raise_together
from megasparse.data.tokenizer import TOKENIZER_KINDS, load_tokenizer

EXAMPLES = """examples:
  # WikiText: one document an article
  python tools/preprocess_data.py --input train.txt.xz --document-rule wikitext \\
      --tokenizer sentencepiece --tokenizer-path tokenizer.model --output-prefix data/wikitext

  # every Python file below a folder is a document, with bytes as tokens
  python tools/preprocess_data.py --input src/ --glob '*.py' --tokenizer bytes --output-prefix data/code

  # JSONL on four processes
  mpirun -np 4 python tools/preprocess_data.py --input part-*.jsonl.gz --jsonl-key content \\
      --tokenizer huggingface --tokenizer-path tokenizer.json --output-prefix data/web
"""


def parse_arguments() -> argparse.Namespace:
    parser = tool_parser(__doc__, EXAMPLES)
    add_corpus_arguments(parser)
    parser.add_argument("--tokenizer", required=True, choices=TOKENIZER_KINDS, help="kind of tokenizer")
    parser.add_argument("--tokenizer-path", metavar="FILE", help="the .model or tokenizer.json file")
    ends = "what ends documents, if not a usual piece"
    parser.add_argument("--end-of-document", type=utf8_argument, metavar="PIECE", help=ends)
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="of PREFIX.bin, .idx and .meta.json")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--limit-documents", type=positive, metavar="N", help="stop after N documents")
    threads = "threads of SentencePiece a process (default: 1)"
    parser.add_argument("--num-threads", type=positive, default=1, metavar="N", help=threads)
    return parser.parse_args()


def main(arguments: argparse.Namespace, communicator) -> None:
    failure: Exception | None = None
    first = communicator is None or communicator.Get_rank() == 0
    if first:
        try:
            check_output_prefix(arguments.output_prefix)
        except ValueError as error:
            failure = error
    raise_together(communicator, failure)
    paths = [*dataset_paths(arguments.output_prefix), facts_path(arguments.output_prefix)]
    existing = [str(path) for path in paths if path.exists()]
    # Rank 0 decides alone: a later rank could otherwise see what an earlier one has begun to write.
    if communicator is not None:
        existing = communicator.bcast(existing)
    if existing and not arguments.overwrite:
        raise ValueError(f"{existing[0]} exists; --overwrite replaces it")
    tokenizer, reader, end = None, None, arguments.end_of_document
    try:
        tokenizer = load_tokenizer(arguments.tokenizer, arguments.tokenizer_path, end_of_document=end)
        reader = reader_from_arguments(arguments)
    except (ValueError, OSError) as error:
        failure = error
    # A file may be missing on one machine only; without this the other ranks would wait for ever.
    raise_together(communicator, failure)
    with progress_bar("tokenizing", reader.total_bytes, enabled=first) as progress:
        report = preprocess(
            reader,
            tokenizer,
            arguments.output_prefix,
            communicator=communicator,
            num_threads=arguments.num_threads,
            limit_documents=arguments.limit_documents,
            progress=progress,
        )
    if first:
        print(f"{arguments.output_prefix}: {report}")
        print(f"{arguments.output_prefix}: documents end with {DataFacts.of(tokenizer).end_of_document}")


if __name__ == "__main__":
    options = parse_arguments()
    try:
        ranks = mpi_communicator()
    except ValueError as error:
        print(f"preprocess_data: error: {error}", file=sys.stderr)
        sys.exit(2)
    is_first = ranks is None or ranks.Get_rank() == 0
    sys.exit(run_tool("preprocess_data", lambda: main(options, ranks), report_errors=is_first))
