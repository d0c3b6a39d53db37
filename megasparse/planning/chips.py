"""The roofline constants: what one rank's chip can do at most, from vendors' data sheets.

    chip = find_chip("h100")

The table stands in ``chips.yaml``. A chip is what one rank drives: a GPU, or one of the two dies of an MI250X. Peaks
are those of dense products; the doubled numbers that data sheets give for 2:4 sparsity are not used. Bandwidths of
links count one direction. The share of all this that a run reaches is an assumption (``assumptions.py``). The processor
of this machine is measured instead (``probe.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import yaml

from megasparse.config.loader import ConfigError

HERE = "here"
"""Name of this machine's processor, which is in no table."""

TERA, GIGA = 1e12, 1e9
IN_GIGABYTES = ("memory", "memory_bandwidth", "link_bandwidth", "network_bandwidth")


@dataclass(frozen=True)
class Chip:
    """Constants of one rank's chip. Bytes, bytes a second, FLOPs a second, watts."""

    name: str
    title: str
    peak: Mapping[str, float]
    """FLOPs a second of dense products, by `train.precision`; a precision that is missing is not supported."""
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    """To the other ranks of the node, one direction."""
    network_bandwidth: float
    """A rank's share of the node's network adapters in the vendor's own system, one direction."""
    ranks_per_node: int
    watts: float
    source: str
    device: str = "cuda"


def _read_table() -> tuple[str, Mapping[str, Chip]]:
    """The date of ``chips.yaml``, and its chips by name."""
    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    chips = {}
    for name, row in table["chips"].items():
        peak = MappingProxyType({precision: value * TERA for precision, value in row.pop("peak").items()})
        sizes = {field: row.pop(field) * GIGA for field in IN_GIGABYTES}
        chips[name] = Chip(name=name, peak=peak, **sizes, **row)
    return table["as_of"], MappingProxyType(chips)


AS_OF, CHIPS = _read_table()


def find_chip(name: str) -> Chip:
    """Raises ConfigError for a name that is not in the table."""
    if name not in CHIPS:
        raise ConfigError(f"--chip: {name!r} is unknown; must be one of {', '.join([HERE, *CHIPS])}")
    return CHIPS[name]
