"""A cluster: so many ranks of one chip, the nodes that they are in, and the links between them.

cluster = make_cluster("h100", 64, network="400Gb")
cluster = read_cluster(Path("cluster.yaml"))         # the same words as keys: chip, count, gpus_per_node, network
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megasparse.config.loader import ConfigError
from megasparse.planning.chips import Chip, find_chip

KEYS = ("chip", "count", "gpus_per_node", "network")
_UNITS = {"": 1e0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Cluster:
    chip: Chip
    count: int
    """Ranks, one per chip."""
    ranks_per_node: int
    network_bandwidth: float
    """Bytes a second, one direction, of one rank's share of the node's network adapters."""

    @property
    def nodes(self) -> int:
        return -(-self.count // self.ranks_per_node)

    def bandwidth(self, size: int, stride: int = 1) -> float:
        """Bytes a second that each of `size` ranks sends in a collective; neighbours in it lie `stride` ranks apart.

        Between nodes, the ranks of one collective that share a node use all of their adapters, and another collective's
        ranks use the rest.
        """
        members = max(self.ranks_per_node // stride, 1)
        if size <= members:
            return self.chip.link_bandwidth
        return min(self.chip.link_bandwidth, members * self.network_bandwidth)

    def spans_nodes(self, size: int, stride: int = 1) -> bool:
        return size > max(self.ranks_per_node // stride, 1)


def make_cluster(chip: Chip | str, count: int, gpus_per_node: int | None = None, network: str | None = None) -> Cluster:
    """Raises ConfigError for an unknown chip, an unreadable bandwidth, or counts that fill no whole nodes."""
    chip = find_chip(chip) if isinstance(chip, str) else chip
    for name, value in (("--count", count), ("--gpus-per-node", gpus_per_node)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: {value} is out of range; must be 1 and above")
    per_node = gpus_per_node or min(chip.ranks_per_node, count)
    if count > per_node and count % per_node:
        raise ConfigError(
            f"--count: {count} fills no whole nodes of {per_node} (--gpus-per-node); must be up to {per_node}, "
            f"and multiples of it, such as {count // per_node * per_node} and {(count // per_node + 1) * per_node}"
        )
    bandwidth = chip.network_bandwidth if network is None else parse_bandwidth(network)
    return Cluster(chip, count, per_node, bandwidth)


def read_cluster(path: Path) -> dict[str, Any]:
    """The settings of a cluster file, checked for names and types. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"--cluster: no such file: {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--cluster: {path} is not readable as YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"--cluster: {path} must hold keys and values; must be one of {', '.join(KEYS)}")
    for key, value in content.items():
        kind = int if key in ("count", "gpus_per_node") else str
        if key not in KEYS:
            raise ConfigError(f"--cluster: {path}: {key!r} is unknown; must be one of {', '.join(KEYS)}")
        if not isinstance(value, kind) or isinstance(value, bool):
            what = "a whole number" if kind is int else "a text such as h100, or 400Gb"
            raise ConfigError(f"--cluster: {path}: {key}: {value!r} is not allowed; it must be {what}")
    return dict(content)


def parse_bandwidth(text: str) -> float:
    """Bytes a second: `400Gb` are bits, `50GB` bytes; `/s` may follow. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)([bB])(?:/s|ps)?", text.strip())
    if found is None or float(found[1]) == 0.0:
        raise ConfigError(f"--network: {text!r} is no bandwidth; must be such as 400Gb (bits) or 50GB (bytes)")
    return float(found[1]) * _UNITS[found[2]] / (8 if found[3] == "b" else 1)
