"""Switchable sparse-dense learning as a training method (Zhang et al. 2024, arXiv 2410.03440).

While MLPs are dense, their neurons are clustered every `switching.interval` steps. Once the clusters stay the same from
one time to the next, the neurons of a cluster are moved side by side, with gradients and moments, which changes nothing
of what the model computes; for `switching.period` steps each token then passes through the nearest clusters only
(``layers.clustered_mlp``). Afterwards MLPs are dense again, as they are in validation, samples and exported models.

A checkpoint holds the clusters, the routers and where the run is. A plan assumes that clusters stay the same: it counts
the smallest work that a run may come to.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from megasparse.config.schema import RunConfig
from megasparse.layers import MLP
from megasparse.layers.clustered_mlp import ClusteredMLP
from megasparse.methods.callback import Engine, Step, TrainingMethod
from megasparse.methods.neuron_clusters import adjusted_rand_index, centroids, cluster_neurons
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup, Mesh, shard_spec_of
from megasparse.sparsity.controller import stream_number
from megasparse.sparsity.random import random_words
from megasparse.sparsity.state import StateAccess

KINDS = ("master", "gradient", "exp_avg", "exp_avg_sq")


class PhaseController:
    """When MLPs are mixtures. Counts are of finished steps."""

    def __init__(self, config: RunConfig) -> None:
        settings, steps = config.switching, config.train.steps
        self.threshold, self.share = settings.threshold, settings.share
        self.interval, self.period = settings.interval_of(steps), settings.period_of(steps)
        self.last = steps - round(settings.dense_end * steps)
        self.is_sparse, self.since, self.sparse_steps, self.next_check = False, 0, 0, self.interval

    def is_due(self, number: int) -> bool:
        """Something may change with the end of a step."""
        return number >= self.next_check and (self.is_sparse or number < self.last)

    def decide(self, number: int, similarity: float) -> None:
        """At a step that is due. similarity: of the last two clusterings, 0 without an earlier one; of no meaning while
        MLPs are mixtures."""
        if self.is_sparse:
            self.is_sparse, self.next_check = False, number + self.interval
            self.sparse_steps += number - self.since
        elif similarity >= self.threshold and self.sparse_steps < self.share * number:
            self.is_sparse, self.since, self.next_check = True, number, min(number + self.period, self.last)
        else:
            self.next_check = number + self.interval

    def numbers(self) -> Tensor:
        return torch.tensor([int(self.is_sparse), self.since, self.sparse_steps, self.next_check])

    def load(self, numbers: Tensor) -> None:
        is_sparse, self.since, self.sparse_steps, self.next_check = numbers.tolist()
        if is_sparse:
            # The end may have been moved.
            self.next_check = min(self.next_check, max(self.last, self.since + 1))
        self.is_sparse = bool(is_sparse)


class Switching(TrainingMethod):
    """model: rank 0's shard on the meta device will do for a plan."""

    name = "switching"

    def __init__(self, config: RunConfig, model: GPT, tensor_parallel: CommunicationGroup) -> None:
        self.config, self.model = config, model
        self.controller = PhaseController(config)
        self.shards = config.switching.shards // tensor_parallel.size
        assert config.switching.clusters is not None
        self.clusters = config.switching.clusters // config.switching.shards
        """In a shard."""
        self.active_share = config.switching.active / config.switching.clusters
        self.mlps: dict[str, MLP] = {f"layers.{n}.mlp": block.mlp for n, block in enumerate(model.layers)}
        self.labels: dict[str, Tensor] = {}
        """int64 [shards of this rank, neurons of a shard], of the last clustering; empty before the first."""
        self.routers: dict[str, Tensor] = {}
        """float32 [clusters of this rank, C], of the last change to mixtures."""
        self.forms: dict[str, ClusteredMLP] = {}
        self._is_clustered = False
        self._engine: Engine | None = None
        self._mesh: Mesh | None = None

    def attach(self, engine: Engine, mesh: Mesh) -> None:
        self._engine, self._mesh = engine, mesh

    def begin_step(self, step: Step) -> None:
        if self._engine is None and self.controller.is_due(step.index):
            self.controller.decide(step.index, float(self._is_clustered))
            self._is_clustered = True
        is_sparse = self.controller.is_sparse
        for name, mlp in self.mlps.items():
            mlp.in_training = self.forms.get(name) if is_sparse else None
            if is_sparse:
                parts = (f"{name}.up", f"{name}.down")
                step.work.computed |= {part: self.active_share * step.work.computed.get(part, 1.0) for part in parts}
        step.metrics["mlp_share"] = self.active_share if is_sparse else 1.0

    def after_backward(self, step: Step) -> None:
        """What is due in a step that is skipped is done in the next one."""
        if not self.controller.is_due(step.number):
            return
        was_sparse, similarity = self.controller.is_sparse, 0.0
        if not was_sparse:
            similarity = step.metrics["cluster_similarity"] = self._cluster(step.number)
        self.controller.decide(step.number, similarity)
        if self.controller.is_sparse == was_sparse:
            return
        step.notes.append(
            f"step {step.number:,}: MLPs are {'dense' if was_sparse else 'mixtures'} from the next step on"
        )
        if not was_sparse:
            for name in self.mlps:
                self._group(name)

    def after_step(self, step: Step) -> None:
        """Between steps MLPs are dense, also where the model stays in training mode: the closing sample."""
        for mlp in self.mlps.values():
            mlp.in_training = None

    def next_change(self, index: int, steps: int) -> int:
        return min(max(self.controller.next_check, index + 1), steps)

    def plan_lines(self) -> list[str]:
        settings = self.config.switching
        return [
            f"MLPs pass each token through {settings.active} of {settings.clusters} clusters of neurons in periods of "
            f"{self.controller.period:,} steps, up to step {self.controller.last:,}; counted as if clusters stayed"
        ]

    def state(self) -> dict[str, Tensor]:
        """Clusters and routers of whole layers, shard after shard."""
        assert self._mesh is not None
        ranks, state = self._mesh.tensor_parallel, {"phase": self.controller.numbers()}
        for kind, tensors in (("labels", self.labels), ("router", self.routers)):
            state |= {f"{kind}/{name}": ranks.gather(tensor).flatten(0, 1).cpu() for name, tensor in tensors.items()}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError for the state of another model."""
        assert self._mesh is not None
        ranks, device = self._mesh.tensor_parallel, self._mesh.device
        if "phase" not in state:
            raise ValueError("the checkpoint holds no state of switching: it is of a run without, or lost it")
        self.controller.load(state["phase"])
        for name, mlp in self.mlps.items():
            for kind, tensors in (("labels", self.labels), ("router", self.routers)):
                if f"{kind}/{name}" in state:
                    tensors[name] = state[f"{kind}/{name}"].to(device).chunk(ranks.size)[ranks.rank].contiguous()
            neurons = mlp.up.partition.local_shape[0] // self.shards
            if name in self.labels and self.labels[name].shape != (self.shards, neurons):
                raise ValueError(f"clusters of {name} are those of another model or other settings of switching")
        if self.routers:
            self._use_routers()

    @torch.no_grad()
    def _cluster(self, number: int) -> float:
        """Cluster the neurons of all layers, each layer on one of the ranks that hold it. Returns the mean similarity
        with the clusters before, 0 without any."""
        assert self._mesh is not None
        ranks, found = self._mesh.data_parallel, []
        for place, (name, mlp) in enumerate(self.mlps.items()):
            rows = self._whole(self._access(mlp), "up", "master").view(self.shards, -1, mlp.up.in_features)
            labels = torch.zeros(rows.shape[:2], dtype=torch.int64, device=rows.device)
            before = self.labels.get(name)
            for shard in range(self.shards) if place % ranks.size == ranks.rank else ():
                whole_shard = self._mesh.tensor_parallel.rank * self.shards + shard
                seed = int(random_words(torch.tensor([whole_shard]), self.config.run.seed, number, stream_number(name)))
                previous = None if before is None else before[shard]
                labels[shard] = cluster_neurons(rows[shard], self.clusters, previous, seed)
            self.labels[name] = ranks.sum_(labels)
            pairs = () if before is None else zip(before, labels, strict=True)
            found.append(sum(adjusted_rand_index(*pair) for pair in pairs) / self.shards)
        similarity = torch.tensor(sum(found) / len(found), dtype=torch.float64, device=self._mesh.device)
        return float(self._mesh.tensor_parallel.sum_(similarity)) / self._mesh.tensor_parallel.size

    @torch.no_grad()
    def _group(self, name: str) -> None:
        """Move the neurons of a cluster side by side, and make its router. All ranks call it."""
        mlp, labels = self.mlps[name], self.labels[name]
        first = torch.arange(self.shards, device=labels.device)[:, None] * labels.shape[1]
        order = (labels.argsort(dim=1, stable=True) + first).flatten()
        access = self._access(mlp)
        for part, dim in (("up", 0), ("bias", 0), ("down", 1)):
            if part in self._parameters(mlp):
                for kind in KINDS:
                    self._write(access, part, kind, self._whole(access, part, kind).index_select(dim, order))
        access.gradients_changed(list(self._parameters(mlp)))
        self.labels[name] = labels.sort(dim=1).values
        rows = self._whole(access, "up", "master").view(self.shards, -1, mlp.up.in_features)
        routers = [centroids(*pair, self.clusters) for pair in zip(rows, self.labels[name], strict=True)]
        self.routers[name] = torch.cat(routers)
        self._use_routers()

    def _use_routers(self) -> None:
        settings = self.config.switching
        active = settings.active * self.shards // settings.shards
        self.forms = {name: ClusteredMLP(router, active, self.shards) for name, router in self.routers.items()}

    def _parameters(self, mlp: MLP) -> dict[str, nn.Parameter]:
        """Those with a side of neurons."""
        bias = {} if mlp.up.bias is None else {"bias": mlp.up.bias}
        return {"up": mlp.up.weight, "down": mlp.down.weight, **bias}

    def _access(self, mlp: MLP) -> StateAccess:
        assert self._engine is not None
        self._shapes = {name: shard_spec_of(weight).local_shape for name, weight in self._parameters(mlp).items()}
        return self._engine.access(self._parameters(mlp))

    def _whole(self, access: StateAccess, part: str, kind: str) -> Tensor:
        """This rank's tensor-parallel shard, put together by the ranks that share it; float32."""
        assert self._mesh is not None
        flat = torch.zeros(prod(self._shapes[part]), device=self._mesh.device)
        for start, own in _pieces(access, part, kind):
            flat[start : start + own.numel()] = own.to(flat.device)
        return access.shard.sum_(flat).view(self._shapes[part])

    def _write(self, access: StateAccess, part: str, kind: str, whole: Tensor) -> None:
        for start, own in _pieces(access, part, kind):
            own.copy_(whole.reshape(-1)[start : start + own.numel()])


def _pieces(access: StateAccess, part: str, kind: str) -> list[tuple[int, Tensor]]:
    """(first entry, piece) where this rank holds one; there are no moments before the first optimizer step."""
    fragment = access.fragments().get(part)
    if fragment is None:
        return []
    tensors = {"master": fragment.master, "gradient": fragment.gradient, **fragment.moments}
    return [(fragment.start, tensors[kind])] if kind in tensors else []


def switching(config: RunConfig, model: GPT, tensor_parallel: CommunicationGroup) -> Switching | None:
    """None where it is not asked for."""
    return None if config.switching.clusters is None else Switching(config, model, tensor_parallel)
