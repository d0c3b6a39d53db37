"""De-tokenizers: word-level test sets as ordinary text, for models that read ordinary text.

    text = detokenize(original, "wikitext")

WikiText and the Penn Treebank are published as words with spaces around every mark (`1 @,@ 000 ,`). A model trained
on text would pay for these spaces, which say nothing. The GPT-2 paper removes them by invertible de-tokenizers and
counts words of the original. The rules here are those that evaluations of GPT-2 and later models have in common,
oddities included (two apostrophes on a line count as quotation marks), applied line by line. ``count_collisions``
tells whether they were invertible on a text: distinct lines must stay distinct.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Rule = tuple[re.Pattern[str], str]


def _rules(*pairs: tuple[str, str]) -> Sequence[Rule]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


# A line has one space at each end while these are applied, in this order.
WIKITEXT = _rules(
    (r"s '", "s'"),
    (r" @([-,.])@ ", r"\1"),
    (r" ([:;.!?,])(?= )", r"\1"),
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" \u00b0 ", "\u00b0"),
    (r"(?<=\S )N(?= \S)", "1"),
    (r" 's", "'s"),
)
PENN_TREEBANK = _rules((r" n't", "n't"), (r" '", "'"), (r"(?<= )N(?= )", "1"), (r"\$ 1", "$1"), (r"# 1", "#1"))
DETOKENIZERS = {"none": (), "wikitext": WIKITEXT, "ptb": PENN_TREEBANK}


def detokenize(text: str, kind: str) -> str:
    """The text without the marks of its word tokenizer; lines stay lines. `none` changes nothing."""
    rules = DETOKENIZERS[kind]
    return "\n".join(_line(line, rules) for line in text.split("\n")) if rules else text


def count_collisions(text: str, kind: str) -> int:
    """Distinct lines (but for spaces at their ends) that the de-tokenizer made equal to another one."""
    rules = DETOKENIZERS[kind]
    lines = {line.strip(" ") for line in text.split("\n")}
    return len(lines) - len({_line(line, rules) for line in lines}) if rules else 0


def _line(line: str, rules: Sequence[Rule]) -> str:
    line = f" {line.strip(' ')} "
    for pattern, replacement in rules:
        line = pattern.sub(replacement, line)
    return line.strip(" ")
