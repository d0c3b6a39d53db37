"""Predicted seconds of a training step on one rank, by part.

    steps = StepModel(config, cluster, rates, assumptions, shard, controller)
    step = steps.step(moment)
    step.seconds, step.parts, step.topology_extra

Products and attention are counted in FLOPs, everything else in bytes of memory traffic; data-parallel communication
counts as far as products do not hide it, tensor-parallel communication in full. Ranks are taken to be alike and never
to wait for one another, for data, or for a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from megasparse.config.schema import RunConfig
from megasparse.cost.layer_kernels import LayerKernels
from megasparse.cost.resources import BUCKET, BYTES, communication_per_rank, data_parallel_bytes
from megasparse.kernels.hybrid_attention import executed_entries
from megasparse.models.gpt import GPT
from megasparse.planning.assumptions import Assumptions
from megasparse.planning.cluster import Cluster
from megasparse.planning.rates import Rates
from megasparse.planning.workload import Moment, Product, Shards, dense_products
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.schedule import settings_at
from megasparse.utils.activations import ACTIVATIONS

PARTS = (
    *("sparse_products", "dense_products", "attention", "elementwise", "launches"),
    *("optimizer", "tensor_parallel", "data_parallel"),
)
OPTIMIZER_BYTES = 40
"""Traffic per weight of a rank's share: gradient, master weight and two moments read, three of them written, the weight
written in the model's precision, and the passes for norm and clipping."""
LOSS_BYTES = 36
"""Traffic per logit of the float32 passes of the softmax and its gradient, besides the logits in the model's type."""
LAUNCHES_PER_BLOCK = 90
"""Operations of a block, forward and backward."""
TOPOLOGY_COLLECTIVES = 12


@dataclass(frozen=True)
class Step:
    parts: dict[str, float]
    """Seconds of a step without a topology update."""
    topology_extra: float
    """Seconds that a topology update takes on top."""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class StepModel:
    """What is needed to predict the steps of one layout."""

    config: RunConfig
    cluster: Cluster
    rates: Rates
    assumptions: Assumptions
    shard: GPT
    controller: Controller
    shards: Shards | None = None
    """Where storage and micro-batch differ between the steps of the run, the source of ``at``; None: they are those of
    `stored` and `config` throughout."""
    stored: GPT | None = None
    """The shard with packed storage; None: whole matrices."""
    _others: dict[tuple[int, int], StepModel] = field(default_factory=dict, compare=False, repr=False)

    def at(self, moment: Moment) -> StepModel:
        """With the storage and the micro-batch of a moment."""
        if self.shards is None:
            return self
        step = moment.decision.step
        own, stored = settings_at(self.config, self.controller.schedule, step), self.shards.stored(self.config, step)
        key = own.train.micro_batch_size, id(stored)
        if key not in self._others:
            self._others[key] = replace(self, config=own, shards=None, stored=stored, _others={})
        return self._others[key]

    @property
    def whole(self) -> StepModel:
        """With whole matrices and the usual micro-batch, as dense training has them."""
        return self if self.shards is None else replace(self, shards=None, _others={})

    @property
    def micro_batches(self) -> int:
        return self.config.train.accumulation_steps(self.replicas)

    @property
    def replicas(self) -> int:
        return self.cluster.count // self.config.parallel.tensor_parallel_size

    @cached_property
    def kernels(self) -> LayerKernels:
        return LayerKernels(self.config, self.shard, self.cluster.chip.device, planned=True)

    @cached_property
    def _weights(self) -> int:
        return sum(parameter.numel() for parameter in self._stored.parameters())

    @property
    def _stored(self) -> GPT:
        return self.shard if self.stored is None else self.stored

    @cached_property
    def sent(self) -> dict[str, float]:
        """Bytes that a rank sends, by kind."""
        every = communication_per_rank(self.config, self._stored, self.controller, self.cluster.count)
        parts = data_parallel_bytes(self.config, self._stored, self.cluster.count)
        names = ("gradient_reduce", "weight_gather", "tensor_parallel", "topology_step")
        return {name: {**every, **parts}[name] for name in names}

    def step(self, moment: Moment) -> Step:
        if self.shards is not None:
            return self.at(moment).step(moment)
        products = moment.products(self.kernels)
        micro = {
            "sparse_products": sum(map(self._product_seconds, products)),
            "dense_products": self._dense_seconds,
            "attention": self._attention_seconds(moment),
            "elementwise": self._elementwise_seconds,
        }
        micro["launches"] = self._launch_seconds(sum(micro.values()), products)
        parts = {name: seconds * self.micro_batches for name, seconds in micro.items()}
        parts["optimizer"] = self._weights / self._sharing * OPTIMIZER_BYTES / self.rates.streaming
        parts["tensor_parallel"] = self._tensor_parallel_seconds
        parts["data_parallel"] = self._exposed(parts["sparse_products"] + parts["dense_products"])
        return Step(parts, self._topology_extra(products) if moment.evolves else 0.0)

    def _topology_extra(self, products: tuple[Product, ...]) -> float:
        gradients = sum(
            product.count * self._one_product(product) * (1.0 - self.rates.relative_time(product))
            for product in products
            if product.wants_dense_gradient
        )
        return gradients * self.micro_batches + self._decision_seconds

    @cached_property
    def _decision_seconds(self) -> float:
        """Of choosing the units in a topology update."""
        weights = sum(layer.weight.numel() for layer in self.controller.layers.values()) / self._sharing
        memory = weights * self.assumptions["topology_bytes"] / self.rates.streaming
        sent = self.sent["topology_step"]
        return memory + self.rates.send_seconds(self.cluster, sent, TOPOLOGY_COLLECTIVES, self.cluster.count)

    @cached_property
    def _dense_seconds(self) -> float:
        return sum(map(self._product_seconds, dense_products(self.config, self.shard)))

    @property
    def _sharing(self) -> int:
        return self.replicas if self.config.deepspeed.zero_stage >= 1 else 1

    @property
    def _tokens(self) -> int:
        return self.config.train.micro_batch_size * self.config.model.seq_length

    @property
    def _passes(self) -> int:
        return 4 if self.config.train.activation_recomputation else 3

    def _one_product(self, product: Product) -> float:
        """Seconds of one of the three products of a layer when dense, over a micro-batch."""
        first, second = product.shape.widths
        return 2 * self._tokens * first * second / self.rates.dense_rate(product.shape.widths)

    def _product_seconds(self, product: Product) -> float:
        # The head is not computed again.
        passes = 3 if product.is_head else self._passes
        return product.count * passes * self._one_product(product) * self.rates.relative_time(product)

    def _attention_seconds(self, moment: Moment) -> float:
        model, config, ranks = self.config.model, self.config, self.config.parallel.tensor_parallel_size
        kernel, device = config.kernels.hybrid_attention, self.cluster.chip.device
        seconds = 0.0
        for pattern, heads in moment.patterns.items():
            entries = executed_entries(kernel, pattern, model.seq_length, config.attention.stride, device)
            forward = 4 * config.train.micro_batch_size * entries * model.head_dim * heads / ranks
            seconds += self._passes * forward / self.rates.attention_rate(pattern)
        return seconds

    @cached_property
    def _elementwise_seconds(self) -> float:
        """Of a micro-batch: blocks at the rate of elementwise work, the loss at that of streaming."""
        size = BYTES[self.config.train.precision]
        blocks = self.config.model.num_layers * block_elements(self.config) * self._tokens * size * self._unfused
        loss = self._tokens * self.shard.vocabulary.share * (LOSS_BYTES + 3 * size)
        accumulated = 3 * self._weights * size if self.micro_batches > 1 else 0
        return self._passes * blocks / self.rates.elementwise + (loss + accumulated) / self.rates.streaming

    @property
    def _unfused(self) -> float:
        """Share of the elementwise work of a block that torch.compile leaves."""
        return self.assumptions["compiled_elementwise"] if self.config.train.compile == "blocks" else 1.0

    def _launch_seconds(self, work: float, products: tuple[Product, ...]) -> float:
        sparse_layers = sum(product.count for product in products if product.executed_density < 1.0)
        usual = self.config.model.num_layers * LAUNCHES_PER_BLOCK * self._unfused * self.rates.launch_seconds
        launches = (usual + sparse_layers * self.rates.sparse_layer_seconds) * self._passes / 3
        return max(launches - work, 0.0) if self.rates.launches_hidden else launches

    @cached_property
    def _tensor_parallel_seconds(self) -> float:
        size = self.config.parallel.tensor_parallel_size
        sums = (5 if self.config.train.activation_recomputation else 4) * self.config.model.num_layers + 5
        return self.rates.send_seconds(self.cluster, self.sent["tensor_parallel"], self.micro_batches * sums, size)

    @cached_property
    def _data_parallel_seconds(self) -> float:
        """Of a step, hidden or not."""
        sent = self.sent["gradient_reduce"] + self.sent["weight_gather"]
        stride = self.config.parallel.tensor_parallel_size
        buckets = -(-self._weights // BUCKET)
        collectives = 2 * buckets * (self.micro_batches if self.config.deepspeed.zero_stage == 2 else 1)
        if self.config.deepspeed.zero_stage == 3:
            collectives = 3 * self.config.model.num_layers * self.micro_batches
        return self.rates.send_seconds(self.cluster, sent, collectives, self.replicas, stride)

    def _exposed(self, products: float) -> float:
        name = "overlap_stage_3" if self.config.deepspeed.zero_stage == 3 else "overlap"
        seconds = self._data_parallel_seconds
        return seconds - min(self.assumptions[name] * seconds, products)


def block_elements(config: RunConfig) -> int:
    """Elements per token that the elementwise work of a block reads and writes on a rank in the forward pass; the
    backward pass moves about twice as many."""
    model, ranks = config.model, config.parallel.tensor_parallel_size
    # Two norms read and write; two sums of the residual stream read two and write one.
    between = 10 * model.hidden_size // (ranks if config.parallel.sequence_parallel else 1)
    activation = ACTIVATIONS[model.activation].inner_tensors * model.mlp_width
    rotary = 2 * (model.hidden_size + model.key_value_heads * model.head_dim)
    return between + (activation + (rotary if model.position_embedding == "rope" else 0)) // ranks
