"""2:4 sparse activations as a training method (Haziza et al. 2025, arXiv 2503.16672): after some dense steps the
perceptrons are computed by ``layers.sparse_activation``, and lines of metrics tell what is lost.

Nothing of it is saved: whether a step is dense follows from its number, and the order of the tokens is fixed.
"""

from __future__ import annotations

import torch

from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.kernels.activation_sparsity import semi_structured
from megasparse.layers.sparse_activation import SparseActivation
from megasparse.methods.callback import Engine, Step, TrainingMethod
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup, Mesh

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ActivationSparsity(TrainingMethod):
    """model: rank 0's shard on the meta device will do for a plan."""

    name = "activation_sparsity"

    def __init__(self, config: RunConfig, model: GPT) -> None:
        self.config, self.model = config, model
        self.forms = [SparseActivation(config.activation_sparsity.kernel) for _ in model.layers]
        self._mesh: Mesh | None = None

    def attach(self, engine: Engine, mesh: Mesh) -> None:
        """Raises ConfigError where the kernel cannot run."""
        self._mesh = mesh
        reason = semi_structured.why_not(mesh.device, DTYPES[self.config.train.precision])
        if self.config.activation_sparsity.kernel == "semi_structured" and reason is not None:
            raise ConfigError(f"activation_sparsity.kernel: semi_structured cannot run: {reason}; must be reference")

    def begin_step(self, step: Step) -> None:
        is_sparse = step.index >= self.config.activation_sparsity.warmup_steps
        for block, form in zip(self.model.layers, self.forms, strict=True):
            form.forget()
            block.mlp.in_training = form if is_sparse else None

    def after_step(self, step: Step) -> None:
        """Shares of the activations that were lost in the step, over all layers and ranks: along the features, and of
        what was left along the tokens. All ranks call it. Not in each step, as the host waits for the device here."""
        for block in self.model.layers:
            # Between steps activations are whole, also where the model stays in training mode: the closing sample.
            block.mlp.in_training = None
        train = self.config.train
        is_due = step.number % train.log_interval == 0 or step.number == train.steps
        if self._mesh is None or not (is_due or step.line_due):
            return
        masses = [form.mass for form in self.forms if form.mass is not None]
        if not masses:
            return
        whole, by_features, by_tokens = self._mesh.world.sum_(torch.stack(masses).sum(0)).tolist()
        step.metrics["feature_drop_rate"] = 1.0 - by_features / whole if whole else 0.0
        step.metrics["token_drop_rate"] = 1.0 - by_tokens / by_features if by_features else 0.0

    def plan_lines(self) -> list[str]:
        first = self.config.activation_sparsity.warmup_steps + 1
        return [f"activations are 2:4 sparse from step {first:,} on; FLOPs are counted as if they were not"]


def activation_sparsity(
    config: RunConfig, model: GPT, tensor_parallel: CommunicationGroup
) -> ActivationSparsity | None:
    """None where it is not asked for."""
    return None if config.activation_sparsity.pattern == "none" else ActivationSparsity(config, model)
