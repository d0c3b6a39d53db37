"""Arithmetic word problems with worked answers, and which of them are held out.

    examples = word_problems("train", 10_000, seed=0)
    examples[0]     # {"prompt": "Ann has 12 apples ...?\n", "response": "12 + 30 = 42\n#### 42"}

A problem is a template with numbers of at most two digits. Problems to learn from have templates and numbers of their
own; `valid` has the same templates with numbers that were held out; `test` has templates that were held out, and such
numbers: a model cannot know it by heart. Which numbers are held out depends on them alone. A small `largest` number
makes problems that a model of a million parameters can learn.
"""

from __future__ import annotations

import operator as operators
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MARKER = "####"
"""Stands before the result, as in GSM8K."""
LARGEST, SMALLEST_RANGE = 40, 5
"""Number in a problem, and the least that it may be limited to: with fewer, hardly any are left to hold out."""
HELD_OUT = 5
"""One of so many sets of numbers is held out."""
SPLITS = ("train", "valid", "test")
MOST = 1_000_000
"""Examples of a split: far more than a model of such problems needs."""
MOST_REPEATS = 1000
"""Known problems in a row after which hardly any is left."""
NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kim", "Leo")
THINGS = ("apples", "books", "coins", "stamps", "marbles", "pens", "shells", "cards")

VALUES = {"+": operators.add, "-": operators.sub, "*": operators.mul}

Steps = list[tuple[int, str, int]]
"""(left, operator, right) of each line of work; the value of the last line is the result."""


@dataclass(frozen=True)
class Template:
    """text: with {name}, {other}, {things} and the numbers {a}, {b}, {c}. steps: of these numbers, none below 0."""

    text: str
    steps: Callable[[int, int, int], Steps]


def _sum_then(operator: str) -> Callable[[int, int, int], Steps]:
    return lambda a, b, c: [(a, "+", b), (a + b, operator, c)]


TEMPLATES = (
    Template("{name} has {a} {things} and finds {b}. How many {things} has {name}?", lambda a, b, c: [(a, "+", b)]),
    Template("{name} buys {b} {things}. {other} has {a}. How many have they in all?", lambda a, b, c: [(b, "+", a)]),
    Template("{name} had {a} {things} and then got {b}, and {c} again. How many now?", _sum_then("+")),
    Template(
        "{name} has {a} {things}, {other} has {b} more than {name}. How many have both?",
        lambda a, b, c: [(a, "+", b), (a, "+", a + b)],
    ),
    Template("{name} had {a} and {b} {things} and gave {c} away. How many are left?", _sum_then("-")),
    Template("A box holds {c} {things}. {name} has {a} boxes. How many {things}?", lambda a, b, c: [(a, "*", c)]),
    Template(
        "{name} has {a} boxes of {c} {things} and {b} single ones. How many {things}?",
        lambda a, b, c: [(a, "*", c), (a * c, "+", b)],
    ),
    Template(
        "{name} puts {c} {things} on each of {a} tables, {other} on {b}. How many {things}?",
        lambda a, b, c: [(a, "+", b), (a + b, "*", c)],
    ),
    Template("Of {a} and {b} {things}, {c} are lost by {name}. How many stay?", _sum_then("-")),
    Template("{name} counts {a} {things} today and {b} a day before. What is the sum?", lambda a, b, c: [(a, "+", b)]),
)
TEST_TEMPLATES = (
    Template("{other} gives {b} {things} to {name}, who had {a}. How many now?", lambda a, b, c: [(a, "+", b)]),
    Template("{name} found {a} {things}, then {b}, and lost {c} of them. How many has {name}?", _sum_then("-")),
    Template(
        "There are {a} bags with {c} {things} in each, and {b} {things} more. How many in all?",
        lambda a, b, c: [(a, "*", c), (a * c, "+", b)],
    ),
)


def word_problems(split: str, count: int, seed: int, largest: int = LARGEST) -> list[dict[str, str]]:
    """`count` different problems of a split. Raises ValueError for a number or a split that there is not."""
    if split not in SPLITS:
        raise ValueError(f"split: {split}; must be one of {', '.join(SPLITS)}")
    if not SMALLEST_RANGE <= largest <= 99:
        raise ValueError(f"largest: {largest}; must be from {SMALLEST_RANGE} to 99")
    if count > MOST:
        raise ValueError(f"{split}: {count} examples; must be at most {MOST}")
    chance = random.Random(f"{seed} {split}")
    templates = TEST_TEMPLATES if split == "test" else TEMPLATES
    found: dict[str, str] = {}
    repeats = 0
    while len(found) < count:
        if repeats == MOST_REPEATS:
            raise ValueError(f"{split}: {count} examples; must be at most about {len(found)}, all that are different")
        prompt, response = _problem(chance, templates, largest, held_out=split != "train")
        repeats = repeats + 1 if prompt in found else 0
        found[prompt] = response
    return [{"prompt": prompt, "response": response} for prompt, response in found.items()]


def is_held_out(numbers: Sequence[int]) -> bool:
    """Of the numbers that a problem shows, in any order."""
    low, *others = sorted(numbers)
    return sum(number * factor for number, factor in zip((low, *others), (31, 17, 7), strict=False)) % HELD_OUT == 0


def _problem(
    chance: random.Random, templates: tuple[Template, ...], largest: int, *, held_out: bool
) -> tuple[str, str]:
    """Prompt and response."""
    while True:
        template = chance.choice(templates)
        most = {"a": largest, "b": largest, "c": min(largest, 9)}
        numbers = {key: chance.randint(2, limit) for key, limit in most.items()}
        shown = [number for key, number in numbers.items() if f"{{{key}}}" in template.text]
        steps = template.steps(numbers["a"], numbers["b"], numbers["c"])
        if is_held_out(shown) == held_out and all(VALUES[operator](x, y) >= 0 for x, operator, y in steps):
            break
    name, other = chance.sample(NAMES, 2)
    text = template.text.format(name=name, other=other, things=chance.choice(THINGS), **numbers)
    lines, result = [], 0
    for left, operator, right in steps:
        result = VALUES[operator](left, right)
        lines.append(f"{left} {operator} {right} = {result}")
    return f"{text}\n", "\n".join([*lines, f"{MARKER} {result}"])
