"""Carries weights over, one of our tensors at a time, in either direction; shapes are checked before any is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megasparse.checkpoint.store import CheckpointError
from megasparse.checkpoint.tensor_files import TensorSpec
from megasparse.conversion.huggingface.architectures import IGNORED, Architecture, Entry, entries
from megasparse.conversion.sources import Tensors
from megasparse.parallel.shard_spec import ShardSpec

ROWS_AT_ONCE = 4096
"""Of a table of the vocabulary: 64 MiB in float32 at a hidden size of 4,096."""


class Importer:
    """Tensors of theirs as ours.

    expected: our tensors, see ``model_tensors``. Raises CheckpointError where one is missing, has another shape, or
    where there are tensors that the architecture does not know.
    """

    def __init__(self, source: Tensors, architecture: Architecture, expected: Mapping[str, ShardSpec]) -> None:
        self._source, self._expected = source, expected
        self._entries = {entry.ours: entry for entry in entries(architecture, expected)}
        self._found = _names_with_prefix(source.names, architecture.prefix)
        tied = set() if "head.weight" in expected else {"lm_head.weight"}
        known = {name for entry in self._entries.values() for name in entry.theirs} | tied
        unknown = sorted(name for name in set(self._found) - known if not IGNORED.fullmatch(name))
        if unknown:
            raise CheckpointError(f"{architecture.name} has no tensors {', '.join(unknown[:4])}")
        for name, entry in self._entries.items():
            self._check(name, entry)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._found[self._entries[name].theirs[0]])

    def tensor(self, name: str) -> Tensor:
        entry = self._entries[name]
        parts = [self._source.tensor(self._found[their]) for their in entry.theirs]
        if entry.transposed:
            parts = [part.t() for part in parts]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)

    def _check(self, name: str, entry: Entry) -> None:
        for their, shape in zip(entry.theirs, their_shapes(entry, self._expected[name]), strict=True):
            if their not in self._found:
                raise CheckpointError(f"{their} is missing")
            found = self._source.shape(self._found[their])
            if tuple(found) != shape:
                raise CheckpointError(f"{their} has shape {list(found)}, config.json asks for {list(shape)}")


def has_own_head(source: Tensors, architecture: Architecture) -> bool:
    """Whether the tensors hold a head that is not the table of the tokens.

    A configuration may say that both are one, and files that were saved under it hold the head once more, or none; one
    with other values is what transformers computes with.
    """
    (table,), (head,) = architecture.modules["embedding.tokens"], architecture.modules["head"]
    found = _names_with_prefix(source.names, architecture.prefix)
    table, head = f"{table}.weight", f"{head}.weight"
    if head not in found or table not in found:
        return False
    a, b = source.tensor(found[table]), source.tensor(found[head])
    # Both are mapped from their files: rows at a time, neither needs to be in memory whole.
    pairs = zip(a.split(ROWS_AT_ONCE), b.split(ROWS_AT_ONCE), strict=False)
    return a.shape != b.shape or not all(torch.equal(x.float(), y.float()) for x, y in pairs)


class Exporter:
    """Our tensors as theirs, in the order of the model.

    expected: our tensors, those included that are only in theirs and are zeros there. dtype: None keeps the dtypes.
    """

    def __init__(
        self,
        source: Tensors,
        architecture: Architecture,
        expected: Mapping[str, ShardSpec],
        dtype: torch.dtype | None = None,
    ) -> None:
        self._source, self._expected, self._dtype = source, expected, dtype
        self._entries = list(entries(architecture, expected))
        self._present = set(source.names)
        self._default = source.dtype("embedding.tokens.weight")

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Of their tensors, in the order of ``tensors``."""
        return {
            their: TensorSpec(shape, self._target(entry.ours))
            for entry in self._entries
            for their, shape in zip(entry.theirs, their_shapes(entry, self._expected[entry.ours]), strict=True)
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for entry in self._entries:
            partition = self._expected[entry.ours]
            if entry.ours in self._present:
                whole = self._source.tensor(entry.ours)
            else:
                whole = torch.zeros(partition.shape, dtype=self._default)
            whole = whole.to(self._target(entry.ours))
            parts = [whole] if len(entry.theirs) == 1 else whole.split(partition.parts)
            for their, part in zip(entry.theirs, parts, strict=True):
                yield their, (part.t() if entry.transposed else part).contiguous()

    def _target(self, name: str) -> torch.dtype:
        if self._dtype is not None:
            return self._dtype
        return self._source.dtype(name) if name in self._present else self._default


def their_shapes(entry: Entry, partition: ShardSpec) -> list[tuple[int, ...]]:
    """Shapes of the tensors that ours consists of."""
    rows = partition.parts if len(entry.theirs) > 1 else partition.shape[:1]
    shapes = [(number, *partition.shape[1:]) for number in rows]
    return [shape[::-1] if entry.transposed else shape for shape in shapes]


def _names_with_prefix(names: list[str], prefix: str) -> dict[str, str]:
    """Full names -> names in the file. Files of the bare model leave the prefix out."""
    if any(name.startswith(prefix) for name in names):
        return {name: name for name in names}
    return {name if name.startswith("lm_head.") else f"{prefix}{name}": name for name in names}
