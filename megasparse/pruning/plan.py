"""From settings to a plan: everything that a user can get wrong is refused here, before anything is written.

plan = make_plan(settings)
plan.layers["layers.0.mlp.up"].available(weight)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
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
    source = open_model(settings.model, settings.output)
    chosen = _chosen_layers(settings, ModelInBlocks(source, torch.device("cpu")))
    layers = _planned(settings, source, chosen)
    _check_budget(settings, [layer.units for layer in layers.values()])
    windows = None
    if settings.needs_calibration:
        drawn = {"samples": settings.samples, "window": settings.window, "seed": settings.seed}
        windows = folder_windows(source, settings.calibration, **drawn)
    return PrunePlan(settings, source, layers, windows, _fingerprint(settings, windows))


def open_model(model: Path, output: Path) -> FolderSource:
    """The folder of --model, whose layers will be changed. Raises ConfigError, also where --output is there already."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output: {output} is there already; must be a folder that is new or empty")
    if not is_model_folder(model):
        raise ConfigError(
            f"--model: {model}: no model folder there; must be one, such as tools/convert_checkpoint.py makes"
        )
    source = FolderSource(model)
    if source.config.sparsity.low_rank and source.config.sparsity.algorithm != "dense":
        raise ConfigError(
            f"--model: {model}: sparsity.low_rank is {source.config.sparsity.low_rank}; must be 0, low-rank branches "
            "cannot be changed with their layers"
        )
    return source


def layers_apart_from(option: str, patterns: Sequence[str], model: ModelInBlocks) -> dict[str, Linear]:
    """The linear layers of all blocks that no pattern of the option, such as --keep-dense, matches."""
    names = model.linear_layers()
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"{option}: no layer falls to {pattern!r}; must be patterns that match one of "
                f"{', '.join(list(names)[:4])}, ..."
            )
    kept = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if len(kept) == len(names):
        raise ConfigError(f"{option}: every layer stays as it is; must be patterns that leave some")
    return {name: layer for name, layer in names.items() if name not in kept}


def _chosen_layers(settings: PruneSettings, model: ModelInBlocks) -> dict[str, Linear]:
    chosen = layers_apart_from("--keep-dense", settings.keep_dense, model)
    for name, layer in chosen.items():
        settings.pattern.check(name, layer.partition)
    return chosen


def _planned(settings: PruneSettings, source: FolderSource, chosen: Mapping[str, Linear]) -> dict[str, PlannedLayer]:
    masks = earlier_masks(source)
    _check_extends(settings, masks)
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
            check_mask(source, name, weight, mask)
            free = int(pattern.units_of(_available(weight, mask, settings.keep_zeros)).sum())
        parts = layer.partition.parts or (layer.partition.shape[0],)
        block = int(name.split(".")[1])
        planned[name] = PlannedLayer(
            name, block, parts, LayerUnits(name, units, free), pattern, mask, settings.keep_zeros
        )
    return planned


def earlier_masks(source: FolderSource) -> dict[str, EarlierMask]:
    """By layer."""
    topology = source.topology()
    shapes = {name: source.shape(name) for name in source.names}
    found = sparse_parameters(source.config, shapes, layers_of(topology)).values()
    return {sparse.layer: EarlierMask(sparse, topology[f"{LIVE}{sparse.layer}"]) for sparse in found}


def _check_extends(settings: PruneSettings, masks: Mapping[str, EarlierMask]) -> None:
    for layer, mask in masks.items():
        if mask.sparse.block_size % settings.pattern.block_size:
            raise ConfigError(
                f"--pattern: {settings.pattern} cannot extend the mask of layer {layer}, whose block size is "
                f"{mask.sparse.block_size}; must be unstructured, or blocks whose size divides it"
            )


def _available(weight: Tensor, mask: EarlierMask | None, keep_zeros: bool) -> Tensor:
    found = torch.ones(weight.shape, dtype=torch.bool) if mask is None else mask.weights()
    found = found.to(weight.device)
    return found & (weight != 0) if keep_zeros else found


def check_mask(source: FolderSource, name: str, weight: Tensor, mask: EarlierMask | None) -> None:
    """Raise CheckpointError where a weight of layer `name` outside of its mask is not 0."""
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


def folder_windows(
    source: FolderSource, calibration: str | None, *, samples: int | None, window: int | None, seed: int | None
) -> Tensor:
    """Calibration tokens for a model, int64 [samples, window]; None: as is usual. Raises ConfigError."""
    longest, vocab_size = source.config.model.seq_length, source.config.model.vocab_size
    assert calibration is not None and vocab_size is not None
    window = min(longest, WINDOW) if window is None else window
    if window > longest:
        raise ConfigError(f"--window: {window}; must be at most {longest}, the seq_length of the model")
    samples = SAMPLES if samples is None else samples
    tokenizer = source_tokenizer(source)
    return calibration_windows(calibration, tokenizer, vocab_size, samples=samples, window=window, seed=seed or 0)


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
        "windows": None if windows is None else list(windows.shape),
    }
