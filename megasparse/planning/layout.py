"""How a model may lie on the ranks: tensor-parallel size x ZeRO stage x micro-batch x recomputation.

for layout in possible_layouts(config, count=64, ranks_per_node=8):
    planned = layout.applied_to(config)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from operator import attrgetter
from typing import Any

from megasparse.config.checks import check_run
from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig, divisors

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
SETTINGS = {
    "tensor_parallel_size": "parallel.tensor_parallel_size",
    "zero_stage": "deepspeed.zero_stage",
    "micro_batch_size": "train.micro_batch_size",
    "recomputation": "train.activation_recomputation",
}
"""What the fields of a layout are called in a configuration, in their order."""


@dataclass(frozen=True)
class Layout:
    tensor_parallel_size: int
    zero_stage: int
    micro_batch_size: int
    recomputation: bool

    @classmethod
    def of(cls, config: RunConfig) -> Layout:
        return cls(*(attrgetter(setting)(config) for setting in SETTINGS.values()))

    def applied_to(self, config: RunConfig) -> RunConfig:
        update: dict[str, dict[str, Any]] = {}
        for name, setting in SETTINGS.items():
            section, _, field = setting.partition(".")
            update.setdefault(section, {})[field] = getattr(self, name)
        sections = {name: getattr(config, name).model_copy(update=fields) for name, fields in update.items()}
        return config.model_copy(update=sections)

    def words(self) -> str:
        """The settings as words of a command line."""
        return " ".join(f"{setting}={str(getattr(self, name)).lower()}" for name, setting in SETTINGS.items())


def tensor_parallel_sizes(config: RunConfig, largest: int) -> list[int]:
    """Sizes that divide heads and MLP."""
    model = config.model
    counts = [model.num_attention_heads, model.key_value_heads, model.mlp_width]
    return [size for size in divisors(min(largest, *counts)) if all(count % size == 0 for count in counts)]


def possible_layouts(config: RunConfig, count: int, sizes: Sequence[int]) -> Iterator[Layout]:
    """All layouts that the checks of a run accept, with these tensor-parallel sizes."""
    batch = config.train.global_batch_size
    for size in sizes:
        if count % size or batch % (count // size):
            continue
        samples = batch // (count // size)
        micro_batches = {n for n in (*MICRO_BATCHES, config.train.micro_batch_size) if samples % n == 0}
        for stage, micro_batch, recomputation in product((0, 1, 2, 3), sorted(micro_batches), (False, True)):
            layout = Layout(size, stage, micro_batch, recomputation)
            if not layout_fault(layout.applied_to(config), count):
                yield layout


def layout_fault(config: RunConfig, count: int) -> ConfigError | None:
    """What the checks of a run say against its layout on so many ranks; None: nothing."""
    try:
        check_run(config, count)
    except ConfigError as error:
        return error
    return None


def possible_counts(config: RunConfig, ranks_per_node: int, sizes: Sequence[int]) -> list[int]:
    """Numbers of ranks that divide the batch with some tensor-parallel size and fill whole nodes, ascending."""
    counts = {size * replicas for size, replicas in product(sizes, divisors(config.train.global_batch_size))}
    return sorted(count for count in counts if count <= ranks_per_node or count % ranks_per_node == 0)
