"""Sparse Matrix Tuning as a training method (He et al. 2025, arXiv 2405.15525).

In the first `smt.warmup_steps` all attention and MLP matrices are trained, while their gradients are added up. Then
blocks are chosen by that sum, over all layers at once, and from there on nothing but these blocks is trained, with an
optimizer of their own; the base is what it was before the warm-up, or what it became (`restore_base_after_warmup`).

The warm-up needs the memory of full fine-tuning: this module holds, whole on every rank, float32 weights, both moments,
gradient and sum of the matrices, and makes their steps itself. After it nothing of that is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor

from megasparse.config.schema import RunConfig
from megasparse.engine.lr_schedule import decay_start, learning_rate
from megasparse.layers import DeltaLinear
from megasparse.methods.adapter import AdapterTuning, tuned_layers
from megasparse.methods.callback import Step
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup, Mesh
from megasparse.sparsity.selection import select_top_k
from megasparse.utils.format import format_bytes

MOMENTS = ("exp_avg", "exp_avg_sq")
WARMUP_BYTES = 20
"""Of each weight: float32 master, moments, gradient, sum of gradients."""


class SparseMatrixTuning(AdapterTuning):
    """model: rank 0's on the meta device will do for a plan."""

    name = "smt"

    def __init__(self, config: RunConfig, model: GPT) -> None:
        layers = tuned_layers(model)
        self.pools = block_budget(layers, config)
        total = sum(count for _, count in self.pools) * config.smt.block_size**2
        super().__init__(config, model, layers, total)
        self._warmup: WarmUp | None = None
        self._kept: dict[str, Tensor] = {}

    def begin_run(self, step: Step) -> None:
        if not self.chosen() and self._warmup is None:
            self._warmup = WarmUp(self.config, self._masters())

    def begin_step(self, step: Step) -> None:
        if self._warmup is not None:
            # Of a step that was skipped something may be left.
            self._warmup.gradients.clear()
        for name, layer in self.layers.items():
            warmup = self._warmup
            layer.dense_gradient_ready = None if warmup is None else (lambda g, n=name, w=warmup: w.add(n, g))
        if self.mesh is not None:
            step.metrics["smt_warmup"] = int(self._warmup is not None)

    def after_backward(self, step: Step) -> None:
        if self._warmup is None:
            return
        assert self.mesh is not None
        self._warmup.step(step.index, self.mesh)
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.weight.copy_(self._warmup.masters[name])
        if step.number >= self.config.smt.warmup_steps:
            self._choose(step)

    def _choose(self, step: Step) -> None:
        """The blocks, and a fresh optimizer for them; the step itself is left out."""
        assert self._warmup is not None and self.mesh is not None
        scores = {
            n: block_scores(total, self.layers[n], self.config.smt.score) for n, total in self._warmup.sums.items()
        }
        chosen = choose_blocks(scores, self.pools)
        if self.config.smt.restore_base_after_warmup:
            self.load_base(self.base_folder())
        else:
            self._kept = {name: master.detach().clone() for name, master in self._warmup.masters.items()}
        for name, layer in self.layers.items():
            # Equal scores on all ranks: one decides all the same.
            layer.choose(self.mesh.from_first(chosen[name].to("cpu", torch.uint8)).nonzero().view(-1))
        self._warmup = None
        fragment = self.fragment()
        if fragment is not None:
            for moment in fragment.moments.values():
                moment.zero_()
        step.skip_update = True
        counts = [layer.numbers.numel() for layer in self.layers.values() if layer.numbers is not None]
        step.notes.append(
            f"step {step.number:,}: {sum(counts):,} blocks of {self.config.smt.block_size} chosen, "
            f"in {sum(count > 0 for count in counts)} of {len(counts)} matrices"
        )

    def plan_lines(self) -> list[str]:
        settings, blocks = self.config.smt, sum(count for _, count in self.pools)
        weights = sum(layer.weight.numel() for layer in self.layers.values())
        base = "the base as it was" if settings.restore_base_after_warmup else "the base of the warm-up"
        return [
            f"Sparse Matrix Tuning: {settings.warmup_steps:,} steps with all of {len(self.layers)} matrices, then "
            f"{blocks:,} blocks of {settings.block_size} ({settings.density:.2%}) on {base}",
            f"the warm-up needs {format_bytes(WARMUP_BYTES * weights)} more on every rank than what is counted below",
        ]

    def base(self) -> dict[str, Tensor]:
        return self._kept

    def state(self) -> dict[str, Tensor]:
        return super().state() | ({} if self._warmup is None else self._warmup.state())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self._kept = {
            name: state[f"base/{name}"].to(w.weight.device)
            for name, w in self.layers.items()
            if f"base/{name}" in state
        }
        if not self.chosen():
            self._warmup = WarmUp(self.config, self._masters())
            self._warmup.load_state(state)
            with torch.no_grad():
                for name, layer in self.layers.items():
                    layer.weight.copy_(self._warmup.masters[name])

    def _masters(self) -> dict[str, Tensor]:
        folder = self.base_folder()
        return {
            name: folder.tensor(f"{name}.weight").to(layer.weight.device, torch.float32, copy=True)
            for name, layer in self.layers.items()
        }


class WarmUp:
    """AdamW over whole matrices, the same on every rank. masters: float32 weights by layer.

    Attributes:
        gradients: float32 by layer, of this rank's micro-batches of the step.
        sums: float32 by layer, of the averaged gradients of all steps.
    """

    def __init__(self, config: RunConfig, masters: Mapping[str, Tensor]) -> None:
        self.config, self.masters = config, dict(masters)
        self.gradients: dict[str, Tensor] = {}
        self.sums = {name: torch.zeros_like(master) for name, master in masters.items()}
        optimizer = config.optimizer
        self._optimizer = torch.optim.AdamW(
            list(self.masters.values()),
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
        )
        self._decay_start = decay_start(config)

    def add(self, name: str, gradient: Tensor) -> None:
        """Of one micro-batch, in a backward pass."""
        if name in self.gradients:
            self.gradients[name] += gradient
        else:
            self.gradients[name] = gradient.to(torch.float32, copy=True)

    @torch.no_grad()
    def step(self, index: int, mesh: Mesh) -> None:
        """One step of all matrices; gradients are averaged over the data-parallel ranks and clipped together."""
        config = self.config.optimizer
        for name, gradient in self.gradients.items():
            self.masters[name].grad = mesh.data_parallel.sum_(gradient).div_(mesh.data_parallel.size)
            self.sums[name] += gradient
        norm = sqrt(sum(float(gradient.double().square().sum()) for gradient in self.gradients.values()))
        if config.gradient_clipping and norm > config.gradient_clipping:
            for gradient in self.gradients.values():
                gradient.mul_(config.gradient_clipping / (norm + 1e-6))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(index, self.config.train.steps, config, self._decay_start)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.gradients.clear()

    def state(self) -> dict[str, Tensor]:
        """Empty before the first step."""
        found: dict[str, Tensor] = {}
        for name, master in self.masters.items() if self._optimizer.state else ():
            moments = self._optimizer.state[master]
            kinds = {"master": master, "sum": self.sums[name], **{kind: moments[kind] for kind in (*MOMENTS, "step")}}
            found |= {f"warmup-{kind}/{name}": tensor.detach().cpu() for kind, tensor in kinds.items()}
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` gave."""
        for name, master in self.masters.items() if any(key.startswith("warmup-") for key in state) else ():
            master.copy_(state[f"warmup-master/{name}"])
            self.sums[name].copy_(state[f"warmup-sum/{name}"])
            moments = {kind: state[f"warmup-{kind}/{name}"].to(master.device, copy=True) for kind in MOMENTS}
            self._optimizer.state[master] = {**moments, "step": state[f"warmup-step/{name}"].clone()}


def block_budget(layers: Mapping[str, DeltaLinear], config: RunConfig) -> list[tuple[list[str], int]]:
    """Layers that share a number of blocks, and the number: the asked share of their entries, at least one block."""
    pools = [[name] for name in layers]
    if config.smt.allocation == "kind":
        attention = [name for name in layers if ".attention." in name]
        pools = [attention, [name for name in layers if name not in attention]]
    counts = []
    for pool in pools:
        entries = sum(layers[name].out_features * layers[name].in_features for name in pool)
        most = sum(layers[name].num_units for name in pool)
        wanted = round((config.smt.density or 0.0) * entries / config.smt.block_size**2)
        counts.append(min(max(wanted, 1), most))
    return list(zip(pools, counts, strict=True))


def block_scores(total: Tensor, layer: DeltaLinear, score: str) -> Tensor:
    """float32 [units], from the sum of the gradients [out, in]: a factor that all blocks share changes no choice."""
    (rows, columns), unit = layer.grid, layer.unit

    def over_blocks(values: Tensor) -> Tensor:
        padded = torch.zeros(rows * unit, columns * unit, dtype=torch.float64, device=values.device)
        padded[: values.shape[0], : values.shape[1]] = values
        return padded.view(rows, unit, columns, unit).sum(dim=(1, 3)).view(-1)

    if score == "norm":
        return over_blocks(total.double().square()).sqrt().float()
    sums = over_blocks(total.abs() if score == "mean_of_magnitudes" else total).abs()
    return (sums / over_blocks(torch.ones_like(total))).float()


def choose_blocks(scores: Mapping[str, Tensor], pools: list[tuple[list[str], int]]) -> dict[str, Tensor]:
    """The highest of each pool: bool [units] by layer. Among equal ones the later."""
    joined = [torch.cat([scores[name] for name in names]) for names, _ in pools]
    marks = select_top_k(joined, [lambda where: where] * len(joined), [count for _, count in pools])
    return {
        name: part
        for (names, _), mark in zip(pools, marks, strict=True)
        for name, part in zip(names, mark.split([scores[name].numel() for name in names]), strict=True)
    }


def sparse_matrix_tuning(
    config: RunConfig, model: GPT, tensor_parallel: CommunicationGroup
) -> SparseMatrixTuning | None:
    """None where it is not asked for."""
    return None if config.smt.density is None else SparseMatrixTuning(config, model)
