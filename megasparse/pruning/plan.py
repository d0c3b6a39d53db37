"""From settings to a plan: everything that a user can get wrong is refused here, before anything is written.

plan = make_plan(settings)
plan.layers["layers.0.mlp.up"].available(weight)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from megasparse.checkpoint.model_folder import CHECKSUMS, is_model_folder
from megasparse.checkpoint.saved_state import LIVE, SparseParameter, layers_of, sparse_parameters
from megasparse.checkpoint.store import CheckpointError
from megasparse.config.loader import ConfigError
from megasparse.conversion.sources import FolderSource, source_tokenizer
from megasparse.layers import Linear
from megasparse.pruning.budget import LayerUnits, check_density, uniform_counts
from megasparse.pruning.calibration import calibration_windows
from megasparse.pruning.model_in_blocks import ModelInBlocks
from megasparse.pruning.patterns import Pattern
from megasparse.pruning.settings import SAMPLES, WINDOW, PruneSettings, check_settings


@dataclass(frozen=True)
class EarlierMask:
    """A layer's mask in the folder's topology, packed as it is there."""

    sparse: SparseParameter
    bits: Tensor

    def weights(self) -> Tensor:
        """Active weights, bool in the shape of the weight."""
        return ~self.sparse.inactive_entries(self.sparse.mask(self.bits))


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that will be pruned."""

    name: str
    block: int
    parts: tuple[int, ...]
    """Rows of the matrices that are fused in it."""
    units: LayerUnits
    pattern: Pattern
    mask: EarlierMask | None
    """None: the layer is dense so far."""
    keep_zeros: bool

    @property
    def parameter(self) -> str:
        return f"{self.name}.weight"

    def available(self, weight: Tensor) -> Tensor:
        """Units that may be kept, bool."""
        return self.pattern.units_of(_available(weight, self.mask, self.keep_zeros))


@dataclass(frozen=True)
class PrunePlan:
    settings: PruneSettings
    source: FolderSource
    layers: Mapping[str, PlannedLayer]
    """By name, in the order of the model."""
    windows: Tensor | None
    """Calibration tokens, int64 [samples, window]; None: the method needs none."""
    fingerprint: dict[str, Any]

    @property
    def units(self) -> list[LayerUnits]:
        return [layer.units for layer in self.layers.values()]


def make_plan(settings: PruneSettings) -> PrunePlan:
    """Raises ConfigError and CheckpointError for what cannot be pruned so."""
    check_settings(settings)
    output = settings.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output: {output} is there already; must be a folder that is new or empty")
    if not is_model_folder(settings.model):
        raise ConfigError(
            f"--model: {settings.model}: no model folder there; must be one, such as tools/convert_checkpoint.py makes"
        )
    source = FolderSource(settings.model)
    if source.config.sparsity.low_rank and source.config.sparsity.algorithm != "dense":
        raise ConfigError(
            f"--model: {settings.model}: sparsity.low_rank is {source.config.sparsity.low_rank}; must be 0, pruning "
            "does not know low-rank branches"
        )
    chosen = _chosen_layers(settings, ModelInBlocks(source, torch.device("cpu")))
    layers = _planned(settings, source, chosen)
    _check_budget(settings, [layer.units for layer in layers.values()])
    windows = _windows(settings, source) if settings.needs_calibration else None
    return PrunePlan(settings, source, layers, windows, _fingerprint(settings, windows))


def _chosen_layers(settings: PruneSettings, model: ModelInBlocks) -> dict[str, Linear]:
    """The linear layers of all blocks that no pattern of --keep-dense matches."""
    names = model.linear_layers()
    for pattern in settings.keep_dense:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"--keep-dense: no layer falls to {pattern!r}; must be patterns that match one of "
                f"{', '.join(list(names)[:4])}, ..."
            )
    kept = [name for name in names if any(fnmatchcase(name, pattern) for pattern in settings.keep_dense)]
    if len(kept) == len(names):
        raise ConfigError("--keep-dense: every layer stays dense; must be patterns that leave some")
    chosen = {name: layer for name, layer in names.items() if name not in kept}
    for name, layer in chosen.items():
        settings.pattern.check(name, layer.partition)
    return chosen


def _planned(settings: PruneSettings, source: FolderSource, chosen: Mapping[str, Linear]) -> dict[str, PlannedLayer]:
    masks = _earlier_masks(settings, source)
    odd = sorted(set(masks) - set(chosen))
    if odd:
        raise ConfigError(
            f"--keep-dense: layer {odd[0]} is sparse in {settings.model} already; must be patterns of layers that are "
            "dense there, and no head that is sparse"
        )
    planned = {}
    for name, layer in chosen.items():
        mask, pattern = masks.get(name), settings.pattern
        units = layer.partition.shape[0] * layer.partition.shape[1] // pattern.block_size**2
        free = units
        if mask is not None or settings.keep_zeros:
            weight = source.tensor(f"{name}.weight")
            _check_mask(source, name, weight, mask)
            free = int(pattern.units_of(_available(weight, mask, settings.keep_zeros)).sum())
        parts = layer.partition.parts or (layer.partition.shape[0],)
        block = int(name.split(".")[1])
        planned[name] = PlannedLayer(
            name, block, parts, LayerUnits(name, units, free), pattern, mask, settings.keep_zeros
        )
    return planned


def _earlier_masks(settings: PruneSettings, source: FolderSource) -> dict[str, EarlierMask]:
    """By layer."""
    topology = source.topology()
    shapes = {name: source.shape(name) for name in source.names}
    masks = {}
    for sparse in sparse_parameters(source.config, shapes, layers_of(topology)).values():
        if sparse.block_size % settings.pattern.block_size:
            raise ConfigError(
                f"--pattern: {settings.pattern} cannot extend the mask of layer {sparse.layer}, whose block size is "
                f"{sparse.block_size}; must be unstructured, or blocks whose size divides it"
            )
        masks[sparse.layer] = EarlierMask(sparse, topology[f"{LIVE}{sparse.layer}"])
    return masks


def _available(weight: Tensor, mask: EarlierMask | None, keep_zeros: bool) -> Tensor:
    found = torch.ones(weight.shape, dtype=torch.bool) if mask is None else mask.weights()
    found = found.to(weight.device)
    return found & (weight != 0) if keep_zeros else found


def _check_mask(source: FolderSource, name: str, weight: Tensor, mask: EarlierMask | None) -> None:
    if mask is None:
        return
    wrong = int(weight[~mask.weights()].count_nonzero())
    if wrong:
        raise CheckpointError(
            f"--model: {source.folder}: layer {name} has {wrong:,} weights outside of its mask that are not 0; must be "
            "a folder whose topology.safetensors belongs to its weights"
        )


def _check_budget(settings: PruneSettings, units: list[LayerUnits]) -> None:
    if settings.pattern.group:
        return
    check_density(units, settings.target_density)
    if settings.distribution == "uniform":
        uniform_counts(units, settings.target_density)


def _windows(settings: PruneSettings, source: FolderSource) -> Tensor:
    longest, vocab_size = source.config.model.seq_length, source.config.model.vocab_size
    assert settings.calibration is not None and vocab_size is not None
    window = min(longest, WINDOW) if settings.window is None else settings.window
    if window > longest:
        raise ConfigError(f"--window: {window}; must be at most {longest}, the seq_length of the model")
    samples = SAMPLES if settings.samples is None else settings.samples
    tokenizer = source_tokenizer(source)
    return calibration_windows(
        settings.calibration, tokenizer, vocab_size, samples=samples, window=window, seed=settings.seed or 0
    )


def _fingerprint(settings: PruneSettings, windows: Tensor | None) -> dict[str, Any]:
    """What must be equal for an unfinished pruning to go on."""
    try:
        files = (settings.model / CHECKSUMS).read_bytes()
    except OSError as error:
        raise CheckpointError(f"--model: {settings.model}: {CHECKSUMS}: {error.strerror}") from None
    return {
        "model": hashlib.sha256(files).hexdigest(),
        "method": settings.method,
        "pattern": str(settings.pattern),
        "density": settings.target_density,
        "distribution": settings.distribution,
        "spread": settings.spread_or_default if settings.distribution == "alpha" else None,
        "keep_dense": list(settings.keep_dense),
        "keep_zeros": settings.keep_zeros,
        "damping": settings.damping_or_default if settings.method == "sparsegpt" else None,
        "columns": settings.columns_or_default if settings.method == "sparsegpt" else None,
        "sds_penalty": settings.sds_penalty_or_default if settings.sds else None,
        "calibration": None if windows is None else hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
    }
