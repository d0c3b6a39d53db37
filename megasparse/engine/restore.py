"""Puts saved state into an engine of any layout: its ZeRO stage, its ranks, its tensor-parallel size.

    staged = read_state(engine, Checkpoint(folder))       # reads what this rank needs; changes nothing
    apply_state(engine, staged)                           # every rank, once all of them have read

Every rank reads the pieces of master weights and moments that it owns. The weights that the model computes with are put
together from the ranks' pieces. DeepSpeed's own loaders are not used: they unpickle whatever the files hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megasparse.engine.fragments import optimized_tensors
from megasparse.engine.training_engine import TrainingEngine
from megasparse.layers import PackedLinear
from megasparse.parallel.shard_spec import ShardSpec, shard_spec_of
from megasparse.sparsity.state import Ranks, StateFragment

WEIGHT = "fp32"
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class StateSource(Protocol):
    """Saved tensors by parameter name and kind."""

    step: int
    """Optimizer steps done; 0: there are no moments."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the whole parameters, by name."""
        ...

    def kinds(self, name: str) -> list[str]:
        """`fp32` and the moments that are kept of a parameter."""
        ...

    def fragment(self, name: str, kind: str, spec: ShardSpec, rank: int, start: int, numel: int) -> Tensor:
        """Entries [start, start + numel) of the shard of a tensor-parallel rank, flattened. All ranks ask for all
        parameters in the same order."""
        ...

    def blocks(self, name: str, kind: str, grid: ShardSpec, rank: int, numbers: Tensor) -> Tensor:
        """Blocks of the shard of a tensor-parallel rank, by their numbers (int64 [n], -1: zeros) on its part of the
        grid: [n, block_size, block_size]. All ranks ask for all of them in the same order."""
        ...

    def loss_scaler(self) -> Mapping[str, float]:
        """Numbers of the loss scaler of float16 training."""
        ...


@dataclass(frozen=True)
class StagedState:
    """What a rank has read."""

    step: int
    tensors: Mapping[tuple[str, str], Tensor]
    """This rank's entries by parameter and kind; a parameter of which it owns none has none."""
    loss_scaler: Mapping[str, float]
    slots: Mapping[str, Tensor] = field(default_factory=dict)
    """By layer with packed storage: int32 [capacity], the block in each slot."""


def read_state(engine: TrainingEngine, source: StateSource, slots: Mapping[str, Tensor] | None = None) -> StagedState:
    """Read this rank's pieces of weights and moments to the host; every rank calls it.

    slots: the block in each slot of the layers with packed storage, by layer; None: as the layers have them now.
    Raises ValueError where the source is of another model or lacks moments or per-weight steps that the optimizer
    needs.
    """
    parameters = dict(engine.model.named_parameters())
    _check_fits(engine, parameters, source)
    rank = engine.mesh.tensor_parallel.rank
    tensors = {}
    layers = engine.packed_layers
    if slots is None:
        slots = {layer.name: layer.slot_blocks.cpu().clone() for layer in layers.values()}
    for name, parameter in parameters.items():
        kinds = [WEIGHT, *(engine.moment_kinds(parameter) if source.step > 0 else [])]
        fragment = engine.access({name: parameter}).fragments().get(name)
        start, numel = (0, 0) if fragment is None else (fragment.start, fragment.numel)
        for kind in kinds:
            if name in layers:
                layer = layers[name]
                entries = _entries_of_slots(source, name, kind, layer, slots[layer.name], start, numel)
            else:
                entries = source.fragment(name, kind, shard_spec_of(parameter), rank, start, numel)
            if numel:
                tensors[name, kind] = entries
    return StagedState(source.step, tensors, dict(source.loss_scaler()), slots)


def _entries_of_slots(
    source: StateSource, name: str, kind: str, layer: PackedLinear, slot_blocks: Tensor, start: int, numel: int
) -> Tensor:
    """Entries [start, start + numel) of a flat packed weight, or of a moment of it."""
    size = layer.block_size**2
    first, last = start // size, -(-(start + numel) // size)
    blocks = source.blocks(name, kind, layer.grid, layer.tensor_parallel.rank, slot_blocks[first:last].long())
    return blocks.reshape(-1)[start - first * size :][:numel]


@torch.no_grad()
def apply_state(engine: TrainingEngine, staged: StagedState) -> None:
    """Take over weights, moments, step count and loss scale; every rank calls it, with what it has read."""
    parameters = dict(engine.model.named_parameters())
    for layer in engine.packed_layers.values():
        layer.slot_blocks.copy_(staged.slots[layer.name])
    if staged.step > 0:
        for flat, group in _optimized(engine):
            _create_moments(engine, flat, group, staged.step)
    persistent = _persistent_parameters(engine)
    if persistent:
        # Whole copies of small parameters, which would keep their old values.
        persistent[0].partition(persistent)
    for name, parameter in parameters.items():
        access = engine.access({name: parameter})
        fragment = access.fragments().get(name)
        for kind in (WEIGHT, *(fragment.moments if fragment is not None and staged.step > 0 else ())):
            if fragment is not None and (name, kind) in staged.tensors:
                (fragment.master if kind == WEIGHT else fragment.moments[kind]).copy_(staged.tensors[name, kind])
        _set_model_weight(parameter, fragment, access.shard)
    if persistent:
        persistent[0].all_gather(persistent)
    restore_loss_scale(getattr(_zero_optimizer(engine), "loss_scaler", None), staged.loss_scaler)


def optimizer_step(engine: TrainingEngine) -> int:
    """Updates that the optimizer has made."""
    states = (
        engine.optimizer.state.get(flat, {}) for flat, _ in optimized_tensors(_zero_optimizer(engine), engine.optimizer)
    )
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def loss_scaler_state(engine: TrainingEngine) -> dict[str, float]:
    """Numbers of the loss scaler (float16 training); empty where there is none."""
    scaler = getattr(_zero_optimizer(engine), "loss_scaler", None)
    values = vars(scaler) if hasattr(scaler, "__dict__") else {}
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def restore_loss_scale(scaler: Any, saved: Mapping[str, float]) -> None:
    """Go on with the saved loss scale where both runs adapt theirs (float16)."""
    if getattr(scaler, "dynamic", False) and saved.get("dynamic", False):
        for key in SCALER_STATE:
            setattr(scaler, key, saved[key])


def _check_fits(engine: TrainingEngine, parameters: Mapping[str, nn.Parameter], source: StateSource) -> None:
    odd = sorted(set(parameters) ^ set(source.shapes))
    if odd:
        raise ValueError(f"saved parameters are of another model: they differ at {', '.join(odd[:4])}")
    for name, parameter in parameters.items():
        layer = engine.packed_layers.get(name)
        expected = shard_spec_of(parameter).shape if layer is None else layer.partition.shape
        if tuple(source.shapes[name]) != expected:
            raise ValueError(f"saved parameter {name} has shape {tuple(source.shapes[name])}, here it has {expected}")
        missing = {"exp_avg", "exp_avg_sq"} & set(engine.moment_kinds(parameter)) - set(source.kinds(name))
        if source.step > 0 and missing:
            raise ValueError(f"saved parameter {name} lacks {', '.join(sorted(missing))}")
    counted = _counted(engine, parameters)
    needs_weight_steps = engine.optimizer.keeps_weight_steps and source.step > 0
    if needs_weight_steps and any("weight_steps" not in source.kinds(name) for name in counted):
        raise ValueError(
            "sparsity.per_weight_step_counts, sparsity.regrowth_warmup_steps: the saved run kept no per-weight steps; "
            "must be false and 0"
        )


def _counted(engine: TrainingEngine, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Parameters whose weights count steps of their own. A tied head goes by the name of the embedding."""
    return {name for name, parameter in parameters.items() if engine.counts_weight_steps(parameter)}


def _set_model_weight(parameter: Any, fragment: StateFragment | None, owners: Ranks) -> None:
    """Write the weights that the forward pass uses, in whatever precision they are.

    owners: the ranks whose fragments make up the shard.
    """
    if hasattr(parameter, "ds_tensor"):  # ZeRO stage 3 keeps a rank's piece, padded
        if fragment is not None:
            parameter.ds_tensor.data.view(-1)[: fragment.numel].copy_(fragment.master)
        return
    shard = torch.zeros(parameter.numel(), device=parameter.device)
    if fragment is not None:
        shard[fragment.start : fragment.start + fragment.numel] = fragment.master
    # As integers, so that adding keeps every bit, that of -0.0 too.
    owners.sum_(shard.view(torch.int32))
    parameter.data.copy_(shard.view(parameter.shape))


def _create_moments(engine: TrainingEngine, flat: Tensor, group: Mapping[str, Any], step: int) -> None:
    """Optimizers make them in their first step, which is over."""
    state = engine.optimizer.state[flat]
    by_weight = engine.optimizer.keeps_weight_steps and group["masked"]
    # Where each weight has its own count, the host asks for that of all.
    device = torch.device("cpu") if by_weight or group["update"] is not None else flat.device
    state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
    if group["update"] is not None:
        return
    state["exp_avg"] = torch.zeros_like(flat)
    state["exp_avg_sq"] = torch.zeros_like(flat)
    if by_weight:
        state["weight_steps"] = torch.zeros_like(flat, dtype=torch.int16)


def _optimized(engine: TrainingEngine) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    return optimized_tensors(_zero_optimizer(engine), engine.optimizer)


def _zero_optimizer(engine: TrainingEngine) -> Any:
    """DeepSpeed's optimizer around ours; ours itself at stage 0."""
    return engine._engine.optimizer


def _persistent_parameters(engine: TrainingEngine) -> list[Any]:
    return list(getattr(_zero_optimizer(engine), "persistent_parameters", []))
