"""What fine-tuning methods that train a few entries of frozen matrices have in common (Sparse Matrix Tuning, SpIEL).

All weights of `train.init_from` become frozen buffers, whole on every data-parallel rank in each ZeRO stage; a single
parameter, ``layers.delta.Adapter``, is trained, and all that the engine, ZeRO and checkpoints know of. A checkpoint
holds it and which units it belongs to, and a run that goes on reads the base from its folder again, which must be the
same. At its end a run writes ``adapter.safetensors`` into its folder, for tools/merge_adapter.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megasparse.checkpoint.adapter_file import ADAPTER, Adaptation, folder_digest, write_adapter
from megasparse.checkpoint.model_folder import ModelFolder, fitted
from megasparse.config.schema import RunConfig
from megasparse.engine.optimizer import ParameterGroup
from megasparse.layers import Adapter, DeltaLinear, freeze, frozen_buffers
from megasparse.methods.callback import Engine, TrainingMethod
from megasparse.models.gpt import GPT
from megasparse.parallel import Mesh
from megasparse.sparsity.state import StateFragment

PARAMETER = "adapter.values"
"""Name of the trained parameter."""


class AdapterTuning(TrainingMethod):
    """total: trained entries. model: all its parameters are frozen; on the meta device for a plan."""

    def __init__(self, config: RunConfig, model: GPT, layers: Mapping[str, DeltaLinear], total: int) -> None:
        self.config, self.layers = config, layers
        freeze(model)
        self._frozen = frozen_buffers(model)
        self.adapter = Adapter(layers, total)
        model.add_module("adapter", self.adapter)
        # The first module of every forward pass.
        model.embedding.register_forward_pre_hook(lambda module, inputs: self.adapter.hand_out())
        self.engine: Engine | None = None
        self.mesh: Mesh | None = None
        self.digest = ""

    def attach(self, engine: Engine, mesh: Mesh) -> None:
        self.engine, self.mesh = engine, mesh
        for places in self._frozen.values():
            # The engine has cast each by itself.
            first = getattr(*places[0])
            for module, attribute in places[1:]:
                setattr(module, attribute, first)

    def start_from(self, folder: ModelFolder) -> None:
        self.digest = folder_digest(folder)
        self.load_base(folder)

    @torch.no_grad()
    def load_base(self, folder: ModelFolder) -> None:
        """Put the folder's weights into all frozen buffers."""
        for name, ((module, attribute), *_) in self._frozen.items():
            buffer = getattr(module, attribute)
            buffer.copy_(fitted(name, folder.tensor(name), tuple(buffer.shape)))

    def base_folder(self) -> ModelFolder:
        """That of `train.init_from`."""
        return ModelFolder(Path(self.config.train.init_from or ""))

    def groups(self) -> Sequence[tuple[ParameterGroup, Sequence[nn.Parameter]]]:
        """Every entry counts its own steps, from when it was chosen. No weight decay: it would pull to the base."""
        return [(ParameterGroup("adapter", masked=True), [self.adapter.values])]

    def fragment(self) -> StateFragment | None:
        """This rank's piece of the trained parameter, to be edited between the backward passes and the step."""
        assert self.engine is not None
        return self.engine.access({PARAMETER: self.adapter.values}).fragments().get(PARAMETER)

    @torch.no_grad()
    def whole(self, kind: str | None = None) -> Tensor:
        """All trained values, or a moment of them, float32 [total], on every rank, which all call it."""
        assert self.engine is not None
        access = self.engine.access({PARAMETER: self.adapter.values})
        fragment = access.fragments().get(PARAMETER)
        total = sum(self.adapter.sizes().values())
        found = torch.zeros(total, device=next(iter(self.layers.values())).weight.device)
        if fragment is not None:
            piece = fragment.master if kind is None else fragment.moments[kind]
            found[fragment.start : fragment.start + fragment.numel] = piece.to(found)
        # As integers, so that adding keeps every bit.
        access.shard.sum_(found.view(torch.int32))
        return found

    def base(self) -> dict[str, Tensor]:
        """Weights that take the place of the folder's, by layer; empty where there are none."""
        return {}

    def chosen(self) -> dict[str, Tensor]:
        """Numbers of the trained units by layer; empty before they are chosen."""
        return {name: layer.numbers for name, layer in self.layers.items() if layer.numbers is not None}

    def adaptation(self) -> Adaptation:
        """What has been trained; every rank calls it."""
        pieces = dict(zip(self.layers, self.whole().split(list(self.adapter.sizes().values())), strict=True))
        unit = next(iter(self.layers.values())).unit
        numbers = self.chosen()
        values = {name: pieces[name].view(-1, unit, unit) for name in numbers}
        return Adaptation(self.name, unit, self.digest, numbers, values, self.base())

    def end_run(self, reason: str) -> None:
        assert self.mesh is not None
        if self.chosen():
            adaptation = self.adaptation()
            if self.mesh.is_first:
                write_adapter(Path(self.config.run.folder) / self.config.run.name / ADAPTER, adaptation)

    def state(self) -> dict[str, Tensor]:
        numbers = {f"numbers/{name}": tensor.cpu() for name, tensor in self.chosen().items()}
        base = {f"base/{name}": tensor.cpu() for name, tensor in self.base().items()}
        return {"digest": torch.tensor(list(bytes.fromhex(self.digest)), dtype=torch.uint8), **numbers, **base}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError where the base is another one than the run began with."""
        if "digest" not in state:
            raise ValueError(f"{self.name}: the checkpoint holds no part of it; must be of a run with {self.name}")
        folder = self.base_folder()
        self.digest = folder_digest(folder)
        if list(bytes.fromhex(self.digest)) != state["digest"].tolist():
            raise ValueError(
                f"train.init_from: {folder.folder} holds other weights than the run began with; must be the same"
            )
        self.load_base(folder)
        for name, layer in self.layers.items():
            if f"numbers/{name}" in state:
                if f"base/{name}" in state:
                    layer.weight.copy_(state[f"base/{name}"])
                layer.choose(state[f"numbers/{name}"])


def tuned_layers(model: GPT) -> dict[str, DeltaLinear]:
    """By name, in the order of the forward pass."""
    return {module.name: module for module in model.modules() if isinstance(module, DeltaLinear)}
