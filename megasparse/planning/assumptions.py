"""Shares and costs that no data sheet states and that we have not measured on GPUs: named, shown, settable.

    assumptions = parse_assumptions(["dense_efficiency=0.6"])
    assumptions["dense_efficiency"], assumptions.at("low")["kernel_efficiency"]

The numbers and their meanings stand in ``assumptions.yaml``. `low` is the slow end of what is likely, `high` the fast
end, whatever the direction of the number itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from megasparse.config.loader import ConfigError

CASES = ("low", "expected", "high")


@dataclass(frozen=True)
class Assumption:
    low: float
    expected: float
    high: float
    meaning: str
    basis: str = ""
    largest: float | None = None
    """Largest value; None: there is none. The smallest is 0."""


def _read_table() -> Mapping[str, Assumption]:
    rows = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return MappingProxyType({name: Assumption(*row.pop("cases"), **row) for name, row in rows.items()})


ASSUMPTIONS = _read_table()


@dataclass(frozen=True)
class Assumptions:
    """The values of one case, with those that the user set in place of the table's."""

    given: Mapping[str, float]
    case: str = "expected"

    def __getitem__(self, name: str) -> float:
        return self.given[name] if name in self.given else getattr(ASSUMPTIONS[name], self.case)

    def at(self, case: str) -> Assumptions:
        """The same with the other values of a case where nothing is given."""
        return Assumptions(self.given, case)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per assumption, for tables and JSON."""
        for name, assumption in ASSUMPTIONS.items():
            yield {
                "name": name,
                "used": self[name],
                "given": name in self.given,
                **{case: getattr(assumption, case) for case in CASES},
                "meaning": assumption.meaning,
                "basis": assumption.basis,
            }


def parse_assumptions(words: Sequence[str]) -> Assumptions:
    """From words such as `pue=1.1`. Raises ConfigError for unknown names and values out of range."""
    given: dict[str, float] = {}
    for word in words:
        name, separator, text = word.partition("=")
        if name not in ASSUMPTIONS or not separator:
            raise ConfigError(f"--assume: {word!r} is no name=value; must be one of {', '.join(ASSUMPTIONS)}")
        given[name] = _number(name, text)
    return Assumptions(MappingProxyType(given))


def _number(name: str, text: str) -> float:
    largest = ASSUMPTIONS[name].largest
    allowed = f"0 to {largest:g}" if largest is not None else "numbers from 0 up"
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"--assume: {name}={text!r} is no number; must be {allowed}") from None
    divides = name.endswith("efficiency")
    if not 0.0 <= value <= (largest if largest is not None else 1e12) or (divides and value == 0.0):
        allowed = f"above {allowed}" if divides else allowed
        raise ConfigError(f"--assume: {name}={text} is out of range; must be {allowed}")
    return value
