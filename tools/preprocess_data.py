#!/usr/bin/env python3
"""Turns text, JSONL or a folder of files into an indexed token dataset (.bin and .idx).

Under mpirun the ranks share the work; the result has the same bytes as that of one process. With --supervised, JSONL of
prompts and responses or of chat messages becomes data for fine-tuning, with a loss mask beside it, in one process.
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
from megasparse.data.chat import load_template
from megasparse.data.corpus import CorpusReader
from megasparse.data.facts import DataFacts, check_output_prefix, facts_path
from megasparse.data.huggingface_tokenizer import HuggingFaceTokenizer
from megasparse.data.index_format import dataset_paths, loss_mask_prefix
from megasparse.data.preprocess import mpi_communicator, preprocess, raise_together
from megasparse.data.supervised import ExampleEncoder, ExampleOptions, preprocess_examples
from megasparse.data.tokenizer import TOKENIZER_KINDS, Tokenizer, load_tokenizer

EXAMPLES = """examples:
  # WikiText: one document an article
  python tools/preprocess_data.py --input train.txt.xz --document-rule wikitext \\
      --tokenizer sentencepiece --tokenizer-path tokenizer.model --output-prefix data/wikitext

  # every Python file below a folder is a document, with bytes as tokens
  python tools/preprocess_data.py --input src/ --glob '*.py' --tokenizer bytes --output-prefix data/code

  # JSONL on four processes
  mpirun -np 4 python tools/preprocess_data.py --input part-*.jsonl.gz --jsonl-key content \\
      --tokenizer huggingface --tokenizer-path tokenizer.json --output-prefix data/web

  # lines {"prompt": ..., "response": ...} or {"messages": [{"role": ..., "content": ...}, ...]}, for fine-tuning
  python tools/preprocess_data.py --supervised --input tasks.jsonl --max-tokens 1025 \\
      --tokenizer huggingface --tokenizer-path tokenizer.json --output-prefix data/tasks
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
    add_example_arguments(parser)
    threads = "threads of SentencePiece a process (default: 1)"
    parser.add_argument("--num-threads", type=positive, default=1, metavar="N", help=threads)
    return parser.parse_args()


EXAMPLE_ARGUMENTS = ("prompt_key", "response_key", "messages_key", "template", "max_tokens")


def add_example_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("supervised data")
    group.add_argument(
        "--supervised", action="store_true", help="JSON lines are examples; their answers alone are learned"
    )
    group.add_argument("--prompt-key", type=utf8_argument, metavar="KEY", help="of the prompt (default: prompt)")
    group.add_argument("--response-key", type=utf8_argument, metavar="KEY", help="of its answer (default: response)")
    group.add_argument(
        "--messages-key", type=utf8_argument, metavar="KEY", help="of a list of chat messages (default: messages)"
    )
    template = (
        "of chat messages: the tokenizer's own, or `User: ...` and `Assistant: ...` (default: as the tokenizer has)"
    )
    group.add_argument("--template", choices=("tokenizer", "plain"), help=template)
    group.add_argument(
        "--max-tokens", type=positive, metavar="N", help="leave out longer examples (model.seq_length + 1)"
    )


def example_encoder(arguments: argparse.Namespace, tokenizer: Tokenizer) -> ExampleEncoder:
    """ValueError for options that do not fit together."""
    given = {name: getattr(arguments, name) for name in EXAMPLE_ARGUMENTS if getattr(arguments, name) is not None}
    if arguments.jsonl_key is not None:
        raise ValueError(f"--jsonl-key: {arguments.jsonl_key}; must be left out with --supervised, see --prompt-key")
    chosen, template, special = given.pop("template", None), None, None
    if isinstance(tokenizer, HuggingFaceTokenizer) and chosen != "plain":
        special = tokenizer.special_tokens
        template = load_template(arguments.tokenizer_path, list(special))
    if chosen == "tokenizer" and template is None:
        named = arguments.tokenizer_path or arguments.tokenizer
        raise ValueError(f"--template: tokenizer; must be plain: {named} has no chat template")
    return ExampleEncoder(tokenizer, ExampleOptions(**given), template, special if template else None)


def main(arguments: argparse.Namespace, communicator) -> None:
    failure: Exception | None = None
    first = communicator is None or communicator.Get_rank() == 0
    if first:
        try:
            check_output_prefix(arguments.output_prefix)
        except ValueError as error:
            failure = error
    raise_together(communicator, failure)
    prefix = arguments.output_prefix
    paths = [*dataset_paths(prefix), facts_path(prefix), *dataset_paths(loss_mask_prefix(prefix))]
    existing = [str(path) for path in paths if path.exists()]
    # Rank 0 decides alone: a later rank could otherwise see what an earlier one has begun to write.
    if communicator is not None:
        existing = communicator.bcast(existing)
    if existing and not arguments.overwrite:
        raise ValueError(f"{existing[0]} exists; --overwrite replaces it")
    tokenizer, reader, encode, end = None, None, None, arguments.end_of_document
    try:
        tokenizer = load_tokenizer(arguments.tokenizer, arguments.tokenizer_path, end_of_document=end)
        reader = reader_from_arguments(arguments)
        encode = example_encoder(arguments, tokenizer) if arguments.supervised else None
        check_example_arguments(arguments, communicator)
    except (ValueError, OSError) as error:
        failure = error
    # A file may be missing on one machine only; without this the other ranks would wait for ever.
    raise_together(communicator, failure)
    if encode is not None:
        write_examples(arguments, reader, encode)
        return
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


def check_example_arguments(arguments: argparse.Namespace, communicator) -> None:
    if arguments.supervised and communicator is not None:
        raise ValueError("--supervised: works in one process; must be started without mpirun")
    for name in EXAMPLE_ARGUMENTS:
        value = getattr(arguments, name)
        if value is not None and not arguments.supervised:
            raise ValueError(f"--{name.replace('_', '-')}: {value}; must be left out without --supervised")


def write_examples(arguments: argparse.Namespace, reader: CorpusReader, encode: ExampleEncoder) -> None:
    with progress_bar("tokenizing", reader.total_bytes) as progress:
        report = preprocess_examples(
            reader, encode, arguments.output_prefix, limit_documents=arguments.limit_documents, progress=progress
        )
    print(f"{arguments.output_prefix}: {report}")
    print(f"{arguments.output_prefix}: examples end with {DataFacts.of(encode.tokenizer).end_of_document}")


if __name__ == "__main__":
    options = parse_arguments()
    try:
        ranks = mpi_communicator()
    except ValueError as error:
        print(f"preprocess_data: error: {error}", file=sys.stderr)
        sys.exit(2)
    is_first = ranks is None or ranks.Get_rank() == 0
    sys.exit(run_tool("preprocess_data", lambda: main(options, ranks), report_errors=is_first))
