"""What benchmarks/adapters.py trains in its arms: LoRA of the library peft as a training method, and counted bytes.

    pretrain(config, environment, methods=[lora_method(folder, rank=4), CountedBytes])

Loop, optimizer, data and validation are those of every run, so that arms differ in what they train alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megasparse.checkpoint.model_folder import ModelFolder, fitted
from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.layers import Linear, freeze, frozen_buffers
from megasparse.methods.callback import Engine, MethodFactory, Step, TrainingMethod
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup, Mesh, ShardSpec
from megasparse.sparsity.controller import OpenWeight

COUNTED_EVERY = 3
"""Steps, besides the first ones: SpIEL has candidates at the start of an interval, SMT its warm-up at that of a run."""
OF_METHODS = ("warmup-", "candidate-", "sm3-")
"""What the methods of fine-tuning keep besides the optimizer, as their parts of checkpoints name it."""


def tuned_matrices(model: GPT) -> dict[str, Linear]:
    """Those that Sparse Matrix Tuning and SpIEL tune, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Linear) and (".attention." in name or ".mlp." in name)
    }


def low_rank_parameters(model: GPT, rank: int) -> int:
    """What LoRA of this rank trains in all of them."""
    return sum(rank * (layer.in_features + layer.out_features) for layer in tuned_matrices(model).values())


def lora_method(folder: Path, rank: int) -> MethodFactory:
    """LoRA with alpha = 2 rank, of all attention and MLP matrices. Raises ConfigError without peft."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("--arms: lora, but peft is not installed; must be installed (extra `peft`), or left out")
    return partial(LowRankAdaptation, folder, rank)


class LowRankAdaptation(TrainingMethod):
    """A run without `train.init_from`: this method reads the folder, for the run knows of its own parameters alone."""

    name = "lora"

    def __init__(
        self, folder: Path, rank: int, config: RunConfig, model: GPT, tensor_parallel: CommunicationGroup
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import Linear as LoraLinear

        self.folder, names = folder, list(tuned_matrices(model))
        freeze(model)
        self._frozen = frozen_buffers(model)
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
        settings._register_custom_module({Linear: LoraLinear})
        # peft asks the first parameter for its device, and all are buffers.
        device = next(model.buffers()).device
        model.register_parameter("first", nn.Parameter(torch.empty(0, device=device), requires_grad=False))
        with torch.random.fork_rng():
            torch.manual_seed(config.run.seed)
            inject_adapter_in_model(settings, model)
        del model.first
        for parameter in model.parameters():
            ShardSpec(tuple(parameter.shape)).declare(parameter)

    def start(self, opened: OpenWeight) -> None:
        self._load()

    @torch.no_grad()
    def _load(self) -> None:
        folder = ModelFolder(self.folder)
        for name, ((module, attribute), *_) in self._frozen.items():
            buffer = getattr(module, attribute)
            buffer.copy_(fitted(name, folder.tensor(name), tuple(buffer.shape)))


class CountedBytes(TrainingMethod):
    """The summary's `adapter_bytes`: gradients and optimizer state of the last step that was counted, and the most that
    they and what methods keep came to. At ZeRO stage 0, where gradients are whole."""

    name = "counted-bytes"

    def __init__(self, config: RunConfig, model: GPT, tensor_parallel: CommunicationGroup) -> None:
        self.config = config
        self.bytes = dict.fromkeys(("gradients", "optimizer", "peak"), 0)

    def attach(self, engine: Engine, mesh: Mesh) -> None:
        self.engine: Any = engine

    def after_backward(self, step: Step) -> None:
        is_counted = step.number < COUNTED_EVERY or step.number % COUNTED_EVERY == 0
        if not hasattr(self, "engine") or not (is_counted or step.number == self.config.train.steps):
            return
        optimizer = self.engine.optimizer
        states = [tensor for state in optimizer.state.values() for tensor in state.values()]
        self.bytes["gradients"] = sum(p.grad.nbytes for p in self.engine.model.parameters() if p.grad is not None)
        # Steps of whole parameters are a number each.
        of_optimizer = sum(tensor.nbytes for tensor in states if torch.is_tensor(tensor) and tensor.dim())
        kept = {key: value.nbytes for method in self._others() for key, value in method.state().items()}
        accumulators = sum(size for key, size in kept.items() if key.startswith("sm3-"))
        self.bytes["optimizer"] = of_optimizer + accumulators
        besides = sum(size for key, size in kept.items() if key.startswith(OF_METHODS)) - accumulators
        # Gradients of a warm-up, which is over for this step, were as large as their sums.
        besides += sum(size for key, size in kept.items() if key.startswith("warmup-sum/"))
        self.bytes["peak"] = max(self.bytes["peak"], self.bytes["gradients"] + self.bytes["optimizer"] + besides)

    def _others(self) -> list[TrainingMethod]:
        return [method for method in self.engine.rules if method.name in ("smt", "spiel")]

    def summary(self) -> dict[str, Any]:
        return {"adapter_bytes": dict(self.bytes)}

    def state(self) -> dict[str, Tensor]:
        return {kind: torch.tensor(count) for kind, count in self.bytes.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.bytes = {kind: int(count) for kind, count in state.items()}
