"""How the parameters of a run were divided over its ranks, saved as ``layout.json`` beside DeepSpeed's files.

    layout = describe_layout(model, optimizer, mesh, zero_stage=1)
    write_layout(layout, folder)
    ...
    partition = read_layout(folder).parameters["layers.0.attention.qkv.weight"]

DeepSpeed's files hold flat pieces; with this they can be put together again without the model and without its ranks.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megasparse.checkpoint.store import CheckpointError
from megasparse.parallel import Mesh
from megasparse.parallel.shard_spec import ShardSpec, shard_spec_of
from megasparse.utils.files import write_json

LAYOUT = "layout.json"


@dataclass(frozen=True)
class Layout:
    """The division of one run."""

    zero_stage: int
    data_parallel_size: int
    tensor_parallel_size: int
    parameters: dict[str, ShardSpec]
    """By name, in the order of the model."""
    aliases: dict[str, str]
    """Further names of shared parameters in the model's state dict, and the names that they go by above."""
    groups: list[list[str]]
    """ZeRO stage 0: names of the optimizer's parameters by group, in the order of their numbers in its state."""


def describe_layout(model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, zero_stage: int) -> Layout:
    """The layout of a model as DeepSpeed has divided it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return Layout(
        zero_stage=zero_stage,
        data_parallel_size=mesh.data_parallel.size,
        tensor_parallel_size=mesh.tensor_parallel.size,
        parameters={name: shard_spec_of(parameter) for parameter, name in names.items()},
        aliases={
            alias: names[parameter]
            for alias, parameter in model.named_parameters(remove_duplicate=False)
            if alias != names[parameter]
        },
        # In the other stages DeepSpeed has put flat pieces in place of the parameters.
        groups=[[names[p] for p in group["params"]] for group in optimizer.param_groups] if zero_stage == 0 else [],
    )


def write_layout(layout: Layout, folder: Path) -> None:
    write_json(folder / LAYOUT, asdict(layout))


def read_layout(folder: Path) -> Layout:
    """Raises CheckpointError where the file is missing or not of this kind."""
    try:
        values: dict[str, Any] = json.loads((folder / LAYOUT).read_text(encoding="utf-8"))
        partitions = {_file_name(name): _partition(fields) for name, fields in values.pop("parameters").items()}
        return Layout(parameters=partitions, **values)
    except OSError:
        raise CheckpointError(f"checkpoint {folder}: {LAYOUT} is missing, so its files cannot be told apart") from None
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise CheckpointError(f"checkpoint {folder}: {LAYOUT} is not readable: {error}") from None


def _partition(fields: dict[str, Any]) -> ShardSpec:
    return ShardSpec(tuple(fields["shape"]), fields["dim"], fields["size"], tuple(fields["parts"]))


def _file_name(name: str) -> str:
    """Names of parameters become names of folders."""
    if not name or Path(name).name != name:
        raise ValueError(f"{name!r} is no name of a parameter")
    return name
