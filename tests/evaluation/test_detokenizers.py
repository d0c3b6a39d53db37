"""De-tokenizers on lines as the test sets hold them, and on WikiText-2 itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megasparse.evaluation.detokenizers import DETOKENIZERS, count_collisions, detokenize

WIKITEXT = [
    (" = Robert Boulter = ", "= Robert Boulter ="),
    (" = = = Filming = = = ", "=== Filming ==="),
    (" It cost 1 @,@ 000 @.@ 5 dollars , not less . ", "It cost 1,000.5 dollars, not less."),
    (" a well @-@ known play ; it ( 2006 ) was good ! ", "a well-known play; it (2006) was good!"),
    (' He said : " No , thanks . " Then left . ', 'He said: "No, thanks." Then left.'),
    (" the players ' union ", "the players' union"),
    (" Boulter 's team and Ripley 's ", "Boulter's team and Ripley's"),
    (" at 20 ° C [ 3 ] { x } ? ", "at 20°C [3] {x}?"),
    ("", ""),
]
TREEBANK = [
    (" mr. <unk> is n't chairman of <unk> n.v. ", "mr. <unk> isn't chairman of <unk> n.v."),
    (" the company 's $ N million and # N million", "the company's $1 million and #1 million"),
    (" from N N to the <unk> ' end ", "from 1 1 to the <unk>' end"),
]


@pytest.mark.parametrize(("kind", "pairs"), [("wikitext", WIKITEXT), ("ptb", TREEBANK)])
def test_examples(kind: str, pairs: list[tuple[str, str]]) -> None:
    for original, expected in pairs:
        assert detokenize(original, kind) == expected
    whole = "\n".join(original for original, _ in pairs)
    assert detokenize(whole, kind) == "\n".join(expected for _, expected in pairs)
    assert count_collisions(whole, kind) == 0


def test_none_changes_nothing() -> None:
    text = " a , b @-@ c \n\n 's \r\n"
    assert detokenize(text, "none") == text and count_collisions(text, "none") == 0
    assert set(DETOKENIZERS) == {"none", "wikitext", "ptb"}


def test_collisions_are_counted() -> None:
    assert count_collisions(" a @-@ b \n a-b \n c \n c", "wikitext") == 1


def test_a_quote_that_is_never_closed_stays_on_its_line() -> None:
    assert detokenize(' an " inch \n a " yard ', "wikitext") == 'an " inch\na " yard'


def test_wikitext_2_keeps_its_lines_apart(shared_data: Path) -> None:
    """Invertible on the real thing: no two lines become one; nothing but spaces and number marks is lost."""
    text = (shared_data / "wikitext-2" / "test.txt").read_text(encoding="utf-8")
    assert count_collisions(text, "wikitext") == 0
    plain = detokenize(text, "wikitext")
    assert len(plain.split("\n")) == len(text.split("\n"))
    assert 0.93 < len(plain) / len(text) < 0.98
    assert not re.search(r" [,;.]( |$)| @[-,.]@ ", plain, flags=re.M)

    def letters(line: str) -> str:
        return re.sub(r"[ @]", "", re.sub(r" @([-,.])@ ", r"\1", line))

    changed = [a for a, b in zip(text.split("\n"), plain.split("\n"), strict=True) if letters(a) != letters(b)]
    # `N` stands for a number in the treebank; the common rules replace it in WikiText too.
    assert all(" N " in line for line in changed), json.dumps(changed[:3])
