"""Whether a run may start from the model folder that `train.init_from` names, and what the user should know of it.

    warnings = initial_warnings(config, vocab_size, controller)     # before any process group, for the plan

The model must be the folder's. Where the folder has a topology of the density that the schedule starts at, the run
starts from it. Plans ask here without importing DeepSpeed; ``initial_weights`` carries the weights over.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megasparse.checkpoint.model_folder import ModelFolder, fitted, is_model_folder, model_tensors
from megasparse.checkpoint.store import CHECKPOINTS, PREFIX
from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.methods.mixed_sparsity import is_used, topology_density
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.topology import unpack_bits

FREE_FIELDS = {"seq_length", "vocab_size", "vocab_size_multiple", "init_std", "rope_theta", "rope_scaling"}
"""Of the section `model`: may differ from the folder's; what changes shapes is found by its shapes."""
CONTEXT_FIELDS = ("rope_theta", "rope_scaling")


def initial_warnings(config: RunConfig, vocab_size: int, controller: Controller) -> list[str]:
    """What the user should know of the start; empty where `train.init_from` is unset, or the run goes on from a
    checkpoint and no longer needs the folder.

    Raises ValueError where there is no such folder, or where it is of another model.
    """
    if config.train.init_from is None or _goes_on(config):
        return []
    folder = open_initial(config)
    _check_model(config, vocab_size, folder)
    warnings = [
        f"model.{field}: {getattr(folder.config.model, field)} in train.init_from, {getattr(config.model, field)} here"
        for field in CONTEXT_FIELDS
        if getattr(folder.config.model, field) != getattr(config.model, field)
    ]
    window = folder.config.attention.sliding_window
    if window is not None and window != config.attention.sliding_window:
        warnings.append(f"train.init_from has a window of {window} tokens (attention.windows), this run has not")
    start = controller.start_density()
    found = topology_density(folder, controller)
    if folder.has_topology and not is_used(found, controller):
        if start < 1.0:
            density = "another grid of units" if found is None else f"density {found:.4f}"
            raise ConfigError(
                f"train.init_from: {folder.folder} has a topology of {density}, and the schedule starts at "
                f"{start:.4f}; must be a schedule that starts at the topology's density or at 1, or no "
                "topology.safetensors in the folder"
            )
        active = [bits for key, bits in folder.topology().items() if key.startswith("active/")]
        if not all(_all_active(bits) for bits in active):
            warnings.append(
                "the topology of train.init_from is not used: all weights are active at the start, zeros too"
            )
    elif folder.has_topology:
        _check_zeros(folder, controller)
        _check_activations(config, folder, controller)
    if not folder.has_topology and start < 1.0:
        warnings.append(
            f"train.init_from has no topology, and the schedule starts at density {start:.4f}: a random choice of its "
            "weights is dropped before the first step"
        )
    return warnings


def open_initial(config: RunConfig) -> ModelFolder:
    """The folder that `train.init_from` names. Raises ValueError where there is none."""
    path = Path(config.train.init_from or "")
    if not is_model_folder(path):
        raise ConfigError(
            f"train.init_from: {path}: no model folder there; must be unset, or a folder that "
            "tools/convert_checkpoint.py has made"
        )
    return ModelFolder(path)


def _goes_on(config: RunConfig) -> bool:
    """Whether the run has checkpoints to resume from; one whose checkpoints are all damaged is not started over."""
    checkpoints = Path(config.run.folder) / config.run.name / CHECKPOINTS
    return config.train.resume == "auto" and any(checkpoints.glob(f"{PREFIX}*"))


def _check_model(config: RunConfig, vocab_size: int, folder: ModelFolder) -> None:
    """Settings that shape results, then names and shapes of all tensors."""
    theirs, ours = folder.config.model, config.model
    if theirs.vocab_size != vocab_size:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} here, {theirs.vocab_size} in train.init_from {folder.folder}; must "
            f"be {theirs.vocab_size}, and a tokenizer of at most so many entries"
        )
    derived = ("key_value_heads", "head_dim", "mlp_width", "has_qkv_bias")
    unset = {"num_key_value_heads", "attention_head_dim", "ffn_hidden_size", "qkv_bias"}
    fields = [field for field in type(ours).model_fields if field not in FREE_FIELDS | unset]
    for field in [*fields, *derived]:
        if getattr(theirs, field) != getattr(ours, field):
            raise ConfigError(
                f"model.{field}: {getattr(ours, field)!r} here, {getattr(theirs, field)!r} in train.init_from "
                f"{folder.folder}; must be {getattr(theirs, field)!r}"
            )
    expected = model_tensors(config.model_copy(update={"model": ours.model_copy(update={"vocab_size": vocab_size})}))
    odd = sorted(set(expected) ^ set(folder.names))
    if odd:
        raise ConfigError(
            f"train.init_from: {folder.folder} is of another model: tensors differ at {', '.join(odd[:4])}"
        )
    for name, partition in expected.items():
        if folder.shape(name) != partition.shape:
            raise ConfigError(
                f"train.init_from: {name} has shape {list(folder.shape(name))} in {folder.folder} and "
                f"{list(partition.shape)} here"
            )


def _check_zeros(folder: ModelFolder, controller: Controller) -> None:
    """Raise ConfigError where a weight that the folder's topology says is inactive is not 0."""
    state = folder.topology()
    for layer, topology in controller.topologies.items():
        name = f"{layer}.weight" if f"{layer}.weight" in folder.names else "embedding.tokens.weight"
        side, (rows, columns) = topology.block_size, topology.whole_grid.shape
        mask = unpack_bits(state[f"active/{layer}"], topology.num_units).view(rows, columns)
        weight = fitted(name, folder.tensor(name), (rows * side, columns * side))
        occupied = (weight != 0).view(rows, side, columns, side).any(3).any(1)
        if wrong := int((occupied & ~mask).sum()):
            units = "weights" if side == 1 else "blocks"
            raise ConfigError(
                f"train.init_from: {folder.folder}: {wrong} {units} of layer {layer} are not 0 and inactive in its "
                "topology.safetensors; must be 0 there"
            )


def _check_activations(config: RunConfig, folder: ModelFolder, controller: Controller) -> None:
    """Raise ConfigError where weights and activations of an MLP are both 2:4: tensor cores take one sparse operand."""
    if config.activation_sparsity.pattern == "none":
        return
    for layer, topology in controller.topologies.items():
        mask = unpack_bits(folder.topology()[f"active/{layer}"], topology.num_units).view(topology.whole_grid.shape)
        is_alone = topology.block_size > 1 or ".mlp." not in layer or mask.shape[1] % 4 or bool(mask.all())
        if not is_alone and int(mask.unflatten(1, (-1, 4)).sum(2).max()) <= 2:
            raise ConfigError(
                f"activation_sparsity.pattern: 2:4, but the weights of layer {layer} in train.init_from "
                f"{folder.folder} are 2:4 already, and a product takes one such operand; must be none, or other weights"
            )


def _all_active(bits: Tensor) -> bool:
    """Whether packed bits have no inactive unit: ones up to the last, zeros to the end of its byte."""
    last = int(bits[-1])
    return bool((bits[:-1] == 255).all()) and last > 0 and last & (last + 1) == 0
