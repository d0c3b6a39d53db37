"""Puts whole tensors into an engine of any layout: its ZeRO stage, its ranks, its tensor-parallel size.

    restore_state(engine, UniversalReader(folder))

Every rank takes its shard of each parameter, writes it into the weights that the model computes with, and the part that
it owns into master weight and moments. Nothing is sent between ranks: each reads what it needs.
DeepSpeed's own loader of its universal format is not used: it unpickles whatever the files hold, and needs to be told
in its own terms how each parameter is divided.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megasparse.engine.fragments import state_access
from megasparse.engine.training_engine import TrainingEngine
from megasparse.parallel.shard_spec import shard_spec_of

WEIGHT = "fp32"
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class StateSource(Protocol):
    """Whole tensors by parameter name and kind."""

    step: int
    """Optimizer steps done; 0: there are no moments."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the whole parameters, by name."""

    def kinds(self, name: str) -> list[str]:
        """`fp32` and the moments that are kept of a parameter."""
        ...

    def tensor(self, name: str, kind: str) -> Tensor: ...

    def loss_scaler(self) -> Mapping[str, float]:
        """Numbers of the loss scaler of float16 training."""
        ...


@torch.no_grad()
def restore_state(engine: TrainingEngine, source: StateSource) -> None:
    """Take weights, moments, step count and loss scale from `source`; every rank calls it.

    Raises ValueError, before anything is changed, where the source is of another model or lacks moments or
    per-weight steps that the optimizer needs.
    """
    parameters = dict(engine.model.named_parameters())
    _check_fits(engine, parameters, source)
    if source.step > 0:
        for flat, group in _optimized(engine):
            _create_moments(engine, flat, group, source.step)
    persistent = _persistent_parameters(engine)
    if persistent:
        # Whole copies of small parameters, which would keep their old values.
        persistent[0].partition(persistent)
    for name, parameter in parameters.items():
        _restore_parameter(engine, name, parameter, source)
    if persistent:
        persistent[0].all_gather(persistent)
    restore_loss_scale(getattr(_zero_optimizer(engine), "loss_scaler", None), source.loss_scaler())


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
        expected = shard_spec_of(parameter).shape
        if tuple(source.shapes[name]) != expected:
            raise ValueError(f"saved parameter {name} has shape {tuple(source.shapes[name])}, here it has {expected}")
        missing = {"exp_avg", "exp_avg_sq"} - set(source.kinds(name))
        if source.step > 0 and missing:
            raise ValueError(f"saved parameter {name} lacks {', '.join(sorted(missing))}")
    # A tied head goes by the name of the embedding.
    sparse = {id(layer.weight) for layer in engine.model.sparse_layers().values()}
    counted = [name for name, parameter in parameters.items() if id(parameter) in sparse]
    needs_weight_steps = engine.optimizer.keeps_weight_steps and source.step > 0
    if needs_weight_steps and any("weight_steps" not in source.kinds(name) for name in counted):
        raise ValueError(
            "sparsity.per_weight_step_counts, sparsity.regrowth_warmup_steps: the saved run kept no per-weight steps; "
            "must be false and 0"
        )


def _restore_parameter(engine: TrainingEngine, name: str, parameter: nn.Parameter, source: StateSource) -> None:
    access = state_access(engine._engine, engine.optimizer, {name: parameter}, engine.mesh)
    fragment = access.fragments().get(name)
    moments = fragment.moments if fragment is not None and source.step > 0 else ()
    for kind in (WEIGHT, *moments):
        whole = source.tensor(name, kind)
        shard = shard_spec_of(parameter).shard(whole, engine.mesh.tensor_parallel.rank).reshape(-1)
        if kind == WEIGHT:
            _set_model_weight(parameter, shard, engine.mesh.data_parallel.rank)
        if fragment is not None:
            target = fragment.master if kind == WEIGHT else fragment.moments[kind]
            target.copy_(shard[fragment.start : fragment.start + fragment.numel])


def _set_model_weight(parameter: Any, shard: Tensor, data_rank: int) -> None:
    """Write the weights that the forward pass uses, in whatever precision they are."""
    if not hasattr(parameter, "ds_tensor"):
        parameter.data.copy_(shard.view(parameter.shape))
        return
    # ZeRO-3: equal shares, the last one padded.
    share = parameter.ds_tensor.numel()
    mine = shard[data_rank * share : (data_rank + 1) * share]
    parameter.ds_tensor.data.view(-1)[: mine.numel()].copy_(mine)


def _create_moments(engine: TrainingEngine, flat: Tensor, group: Mapping[str, Any], step: int) -> None:
    """Optimizers make them in their first step, which is over."""
    state = engine.optimizer.state[flat]
    state["step"] = torch.tensor(float(step), dtype=torch.float32, device=flat.device)
    state["exp_avg"] = torch.zeros_like(flat)
    state["exp_avg_sq"] = torch.zeros_like(flat)
    if engine.optimizer.keeps_weight_steps and group["masked"]:
        state["weight_steps"] = torch.zeros_like(flat, dtype=torch.int16)


def _optimized(engine: TrainingEngine) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """The tensors that the optimizer updates, flat pieces or parameters, each with its group."""
    groups, zero = engine.optimizer.param_groups, _zero_optimizer(engine)
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        # ZeRO-3 fills the groups for the time of a step only.
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            yield flat, groups[zero.sub_group_to_group_id[number]]
        return
    for group in groups:
        for tensor in group["params"]:
            yield tensor, group


def _zero_optimizer(engine: TrainingEngine) -> Any:
    """DeepSpeed's optimizer around ours; ours itself at stage 0."""
    return engine._engine.optimizer


def _persistent_parameters(engine: TrainingEngine) -> list[Any]:
    return list(getattr(_zero_optimizer(engine), "persistent_parameters", []))
