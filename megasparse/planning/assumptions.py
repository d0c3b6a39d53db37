"""Shares and costs that no data sheet states and that we have not measured on GPUs: named, shown, settable.

    assumptions = parse_assumptions(["dense_efficiency=0.6"])
    assumptions["dense_efficiency"], assumptions.at("low")["kernel_efficiency"]

`low` is the slow end of what is likely, `high` the fast end, whatever the direction of the number itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megasparse.config.loader import ConfigError

CASES = ("low", "expected", "high")


@dataclass(frozen=True)
class Assumption:
    low: float
    expected: float
    high: float
    meaning: str
    basis: str
    largest: float | None = None
    """Largest value; None: there is none. The smallest is 0."""


_SHARE = 1.0

ASSUMPTIONS: Mapping[str, Assumption] = MappingProxyType(
    {
        "dense_efficiency": Assumption(
            0.50,
            0.65,
            0.75,
            "share of the peak that dense products reach",
            "common for large bfloat16 products",
            _SHARE,
        ),
        "kernel_efficiency": Assumption(
            0.50,
            0.70,
            0.85,
            "e of the block-sparse kernels: speed-up over dense products times density",
            "not measured on GPUs by us; 0.7 is our goal on an H200 (benchmarks/README.md)",
            _SHARE,
        ),
        "attention_efficiency": Assumption(
            0.20, 0.35, 0.50, "share of the peak that attention reaches on the scores that it computes", "", _SHARE
        ),
        "memory_efficiency": Assumption(
            0.60, 0.75, 0.85, "share of the memory bandwidth that elementwise work and the optimizer reach", "", _SHARE
        ),
        "link_efficiency": Assumption(
            0.60, 0.75, 0.85, "share of a link's bandwidth that collectives reach", "", _SHARE
        ),
        "overlap": Assumption(
            0.0,
            0.0,
            0.5,
            "share of the data-parallel communication hidden behind products, ZeRO stages 0 to 2",
            "DeepSpeed's overlap_comm is off there by default",
            _SHARE,
        ),
        "overlap_stage_3": Assumption(
            0.0, 0.5, 0.8, "the same at ZeRO stage 3", "DeepSpeed's overlap_comm is on there by default", _SHARE
        ),
        "link_latency_us": Assumption(8.0, 4.0, 2.0, "microseconds of a hop inside of a node", ""),
        "network_latency_us": Assumption(20.0, 10.0, 5.0, "microseconds of a hop between nodes", ""),
        "launch_us": Assumption(
            8.0, 5.0, 3.0, "microseconds to launch an operation; on GPUs this hides behind the work", ""
        ),
        "topology_bytes": Assumption(
            600.0,
            300.0,
            100.0,
            "bytes of memory traffic per sparse weight of a rank's share in a topology update",
            "300 is what the CPU measurements in benchmarks/results amount to",
        ),
        "memory_reserve": Assumption(
            0.15, 0.10, 0.05, "share of the memory for libraries, communication buffers, fragments", "", _SHARE
        ),
        "pue": Assumption(1.5, 1.2, 1.1, "energy of the site over that of the chips; chips draw their full power", ""),
    }
)


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

    def with_value(self, name: str, value: float) -> Assumptions:
        return Assumptions({**self.given, name: value}, self.case)

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
