"""What the tools share on their command lines: parsers, the options that describe a corpus, how errors are told."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager

from megasparse.data.corpus import DOCUMENT_RULES, CorpusOptions, CorpusReader
from megasparse.utils.streams import use_utf8

# The argument of each option of CorpusOptions, and the input that it is for.
ARGUMENTS = {
    "document_rule": ("document_rule", "text file, named by itself"),
    "separator": ("document_separator", "text file, named by itself"),
    "jsonl_key": ("jsonl_key", "JSON lines (.jsonl, .ndjson, .json) and no .parquet"),
    "glob": ("glob", "folder"),
    "exclude": ("exclude", "folder"),
}


def utf8_argument(value: str) -> str:
    """Text of the command line that is compared with text of files; Python decodes it by the locale."""
    try:
        return os.fsencode(value).decode("utf-8")
    except UnicodeError:
        return value


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the input paths and the options of `CorpusOptions`."""
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="text, JSON lines (.jsonl, .ndjson, .json; both also .gz, .xz, .bz2, .zst), .parquet, or folders",
    )
    group.add_argument(
        "--document-rule",
        choices=DOCUMENT_RULES,
        help="what a document is in a text file (default: the whole file)",
    )
    group.add_argument(
        "--document-separator", type=utf8_argument, metavar="LINE", help="a line equal to LINE ends a document"
    )
    group.add_argument(
        "--jsonl-key",
        type=utf8_argument,
        metavar="KEY",
        help="key of the text in JSON lines, column in Parquet (default: text)",
    )
    group.add_argument("--glob", help="files to take below a folder, one document each (default: *.txt)")
    group.add_argument("--exclude", nargs="+", metavar="NAME", help="folders and files below a folder to pass over")


def reader_from_arguments(arguments: argparse.Namespace) -> CorpusReader:
    """The reader that `add_corpus_arguments` describes. ValueError for what does not fit together."""
    rule = arguments.document_rule or ("file" if arguments.document_separator is None else "separator")
    options = CorpusOptions(
        rule,
        arguments.document_separator,
        "text" if arguments.jsonl_key is None else arguments.jsonl_key,
        "*.txt" if arguments.glob is None else arguments.glob,
        tuple(arguments.exclude or ()),
    )
    reader = CorpusReader(arguments.input, options)
    for name in reader.unused_options():
        argument, uses = ARGUMENTS[name]
        value = getattr(arguments, argument)
        if value is not None:
            raise ValueError(f"--{argument.replace('_', '-')}: {value}; must be left out: --input has no {uses}")
    return reader


def tool_parser(description: str | None, examples: str) -> argparse.ArgumentParser:
    """A parser whose help shows both texts as they are."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, epilog=examples, formatter_class=form)


def positive(text: str) -> int:
    """The type of an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; must be at least 1")
    return int(text)


def run_tool(name: str, main: Callable[[], None], *, report_errors: bool = True) -> int:
    """Runs `main`, whatever the locale; user errors become one line on standard error and exit status 2."""
    use_utf8()
    try:
        main()
    except (ValueError, OSError) as error:
        if report_errors:
            print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def progress_bar(description: str, total_bytes: int, *, enabled: bool = True):
    """A progress bar on standard error, where that is a terminal; yields a function that takes the bytes done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal)) as bar:
        task = bar.add_task(description, total=total_bytes)
        yield lambda done: bar.update(task, completed=done)
