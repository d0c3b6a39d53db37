"""A model, its optimizer and DeepSpeed behind a handful of methods: the loop knows no more of DeepSpeed than these.

engine = TrainingEngine(model, rules, config, mesh, objective)
for inputs, targets in micro_batches:
    loss = engine.forward(inputs, targets)
    engine.backward(loss)
norm = engine.gradient_norm()                           # not finite: the step is to be skipped
...                                                     # engine.state: weights, moments, gradients, to be edited here
gradient_norm = engine.step(lr)
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import deepspeed
import deepspeed.comm
import deepspeed.ops
import torch
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from megasparse.config.deepspeed import deepspeed_dict
from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.data import Batch
from megasparse.engine.active_regions import ActiveRegions
from megasparse.engine.fragments import (
    finite_gradients,
    optimized_tensors,
    release,
    set_micro_batch_size,
    state_access,
    wait_for_reductions,
)
from megasparse.engine.gradient_norm import global_gradient_norm
from megasparse.engine.gradients_in_place import leave_gradients_in_place
from megasparse.engine.optimizer import GroupRule, MaskedAdamW, parameter_groups, set_learning_rates
from megasparse.engine.steps_in_place import steps_in_place
from megasparse.kernels import optimizer as optimizer_kernels
from megasparse.layers import PackedLinear
from megasparse.models.gpt import GPT
from megasparse.parallel import Mesh
from megasparse.sparsity.controller import OpenWeight
from megasparse.sparsity.dense_gradients import DenseGradients
from megasparse.sparsity.state import StateAccess
from megasparse.sparsity.topology import Topology

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


RECOMPILE_LIMIT = 64
DIVIDED_OTHERWISE = {"offload_param", "zero_hpz_partition_size", "mics_shard_size"}
"""Expert settings of ZeRO stage 3 under which pieces may have left the memory when a parameter has been divided, or lie
on other ranks, too."""

Objective = Callable[[GPT, Batch], tuple[Tensor, dict[str, Tensor]]]
Answer = TypeVar("Answer")


class ModelWithObjective(nn.Module):
    """Model and objective as the one module whose forward pass DeepSpeed wraps.

    It takes over the model's own submodules, so that parameters keep their names in checkpoints.
    """

    def __init__(self, model: GPT, objective: Objective) -> None:
        super().__init__()
        for name, module in model.named_children():
            self.add_module(name, module)
        # In a tuple the model does not become a submodule.
        self._model, self._objective = (model,), objective

    def forward(
        self,
        inputs: Tensor | None,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        question: Callable[[GPT], Any] | None = None,
    ) -> Any:
        """Loss and its parts; or what a question, in place of a batch, finds out."""
        if question is not None:
            return question(self._model[0])
        assert inputs is not None and targets is not None
        loss, parts = self._objective(self._model[0], Batch(inputs, targets, documents, weights))
        return loss, {name: part.detach() for name, part in parts.items()}


class TrainingEngine:
    """One rank's share of the training state. The mesh's process group must exist.

    rules: say which parameters have learning rates of their own.
    objective: gives the loss of a batch and its named parts, see ``objectives.objective``.
    """

    def __init__(
        self, model: GPT, rules: Sequence[GroupRule], config: RunConfig, mesh: Mesh, objective: Objective
    ) -> None:
        check_precision(config, mesh.device)
        self.config, self.rules, self.mesh = config, rules, mesh
        prepare_deepspeed(mesh)
        self.model = model.to(mesh.device)
        self._with_objective = ModelWithObjective(self.model, objective)
        self.parts: dict[str, Tensor] = {}
        """Named parts of the loss of the last micro-batch, without graph."""
        self._losses: Tensor | float = 0.0
        self._known_norm: Tensor | None = None
        """Of the gradients of the present step as they are, on the device; None where anybody may have changed them."""
        self._is_finite = False
        """Gradients of the present step, as far as is known."""
        self._is_copied = False
        """The model's weights are the master weights, as nobody has been handed these since the last step."""
        groups = parameter_groups(self.model, rules, config.optimizer.weight_decay)
        self._masked = {parameter for group in groups if group["masked"] for parameter in group["params"]}
        self._without_moments = {p for group in groups if group["update"] is not None for p in group["params"]}
        # Entries of an adapter are chosen anew as those of a topology are.
        counts = config.adapter_field is not None
        self.optimizer = MaskedAdamW(groups, config.optimizer, config.sparsity, per_weight_step_counts=counts)
        self._engine, *_ = deepspeed.initialize(
            model=self._with_objective,
            optimizer=self.optimizer,
            config=deepspeed_dict(config, mesh.data_parallel.size, mesh.device.type),
            mpu=mesh,
            dist_init_required=False,
        )
        if config.deepspeed.zero_stage == 3:
            for parameter in self.model.head_in_chunks.head_parameters:
                deepspeed.zero.register_external_parameter(self.model.head_in_chunks, parameter)
        if mesh.data_parallel.size == 1:
            leave_gradients_in_place(self._engine)
        self._state = self._access({name: layer.weight for name, layer in self.model.sparse_layers().items()})
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.packed_layers: dict[str, PackedLinear] = {
            names[id(layer.weight)]: layer
            for layer in self.model.sparse_layers().values()
            if isinstance(layer, PackedLinear)
        }
        """Layers with packed storage, by the name of their weight."""
        of_layers = {layer.name: layer for layer in self.packed_layers.values()}
        self._dense_gradients = DenseGradients(of_layers, mesh.data_parallel, self._state.shard)
        self._state.dense_gradients = self._dense_gradients.shares
        if config.train.compile == "blocks":
            compile_blocks(self.model)
        if optimizer_kernels.takes_cpu(config.kernels.optimizer, mesh.device.type):
            self.optimizer.regions = self._active_regions()

    def access(self, weights: Mapping[str, nn.Parameter]) -> StateAccess:
        """This rank's pieces of parameters, which may be edited between the last ``backward`` and ``step``."""
        self._known_norm, self._is_copied = None, False
        return self._access(weights)

    @property
    def state(self) -> StateAccess:
        """This rank's pieces of the sparse matrices, by name of the layer, which may be edited as those of ``access``;
        ask anew in each step."""
        self._known_norm, self._is_copied = None, False
        return self._state

    def _access(self, weights: Mapping[str, nn.Parameter]) -> StateAccess:
        return state_access(self._engine, self.optimizer, weights, self.mesh)

    def _active_regions(self) -> ActiveRegions:
        rank = self.mesh.tensor_parallel.rank
        topologies = {
            name: Topology(name, layer.mask, layer.block_size, layer.grid, rank)
            for name, layer in self.model.sparse_layers().items()
            # All of a packed weight is active, but for a few empty slots, which stay 0 by themselves.
            if not isinstance(layer, PackedLinear)
        }
        fragments = {name: fragment for name, fragment in self._state.fragments().items() if name in topologies}
        tensors = (tensor for tensor, _ in optimized_tensors(self._engine.optimizer, self.optimizer))
        return ActiveRegions(tensors, fragments, topologies)

    def counts_weight_steps(self, parameter: nn.Parameter) -> bool:
        """Whether the optimizer counts the steps of each of its weights."""
        return self.optimizer.keeps_weight_steps and parameter in self._masked

    def moment_kinds(self, parameter: nn.Parameter) -> list[str]:
        """What the optimizer keeps of each weight after its first step."""
        if parameter in self._without_moments:
            return []
        return ["exp_avg", "exp_avg_sq", *(["weight_steps"] if self.counts_weight_steps(parameter) else [])]

    @property
    def accumulation_steps(self) -> int:
        return self._engine.gradient_accumulation_steps()

    def set_micro_batch_size(self, size: int) -> None:
        """Of the steps that follow; the global batch stays. Between two steps only."""
        set_micro_batch_size(self._engine, size, self.config.train.global_batch_size)

    def forward(
        self, inputs: Tensor, targets: Tensor, documents: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Mean loss of a micro-batch, float32 scalar with graph. Arguments: as in ``Batch``, [micro_batch_size, T]."""
        loss, self.parts = self._engine(inputs, targets, documents, weights)
        self._losses = self._losses + loss.detach()
        return loss

    def backward(self, loss: Tensor) -> None:
        """Gradients; the last micro-batch of a step also averages them over the ranks."""
        self._engine.backward(loss)
        if self._engine.is_gradient_accumulation_boundary():
            wait_for_reductions(self._engine.optimizer)
        else:
            self._engine.step()

    def gradient_norm(self) -> float:
        """Global norm of the averaged gradients as the backward passes left them, before clipping; the same bits on
        every rank, which all call it. Not finite where a gradient or a loss of any rank is not."""
        return self.gradient_norm_and({})[0]

    def gradient_norm_and(
        self, values: Mapping[str, Tensor], *, asks: bool = False
    ) -> tuple[float, dict[str, float], bool]:
        """The norm, scalars of this rank, and whether any rank asks for something (see ``global_gradient_norm``): all
        that the host wants to know of a step, for one wait and one reduction."""
        losses, self._losses = self._losses + self._dense_gradients.total(), 0.0
        self._known_norm, asking = self._norm(losses, asks=asks)
        norm, number, *others = torch.stack([self._known_norm, asking, *values.values()]).tolist()
        self._is_finite = math.isfinite(norm)
        return norm, dict(zip(values, others, strict=True)), number > 0

    def _norm(self, losses: Tensor | float = 0.0, *, asks: bool = False) -> tuple[Tensor, Tensor]:
        access, active_only = self._access(dict(self.model.named_parameters())), self.optimizer.regions is not None
        return global_gradient_norm(access, self.model, self.mesh, losses, active_only=active_only, asks=asks)

    def step(self, lr: float, *, skip_update: bool = False) -> Tensor:
        """One optimizer step at a base learning rate. Returns the global norm of the gradients that it used, before
        clipping; a scalar on the device, which who reads it waits for.

        skip_update: leave weights, moments and step count as they are; only copy the master weights to the model.
        Raises RuntimeError where DeepSpeed leaves out a step by itself. It looks only where ``gradient_norm`` was not
        asked for or was not finite.
        """
        set_learning_rates(self.optimizer, lr, self.rules, self.config.optimizer.weight_decay)
        self.optimizer.skip_updates = skip_update
        norm = None
        if self.optimizer.regions is not None or self._engine.zero_optimization_stage() == 0:
            # At stage 0 DeepSpeed keeps it to itself.
            norm = self._norm()[0] if self._known_norm is None else self._known_norm
        with contextlib.ExitStack() as stack:
            if self.optimizer.regions is not None:
                assert norm is not None
                self._is_finite = math.isfinite(float(norm))
            # Of float16 DeepSpeed must know by itself whether it is to lower the loss scale.
            if self._is_finite and self.config.train.precision != "fp16":
                stack.enter_context(finite_gradients(self._engine.optimizer))
            if self._is_finite and self.optimizer.regions is not None:
                copies_all = skip_update or not self._is_copied
                stack.enter_context(steps_in_place(self._engine, self.optimizer, norm, copies_all=copies_all))
            self._engine.step()
        self._dense_gradients.clear()
        self._known_norm, self._is_copied = None, True
        self._is_finite = self.optimizer.skip_updates = False
        if not (skip_update or self._engine.was_step_applied()):
            raise RuntimeError("DeepSpeed found a gradient that is not finite and left out the optimizer step")
        return torch.as_tensor(self._engine.get_global_grad_norm() if norm is None else norm)

    def close(self) -> None:
        """Let go of the model, for another engine to come; this one is of no use any more."""
        release(self._engine)

    @torch.no_grad()
    def evaluate(
        self, inputs: Tensor, targets: Tensor, documents: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Mean loss without a graph."""
        with self._evaluating():
            return self._with_objective(inputs, targets, documents, weights)[0]

    @torch.no_grad()
    def ask(self, question: Callable[[GPT], Answer]) -> Answer:
        """What a question finds out from the model, in evaluation mode and without a graph. At ZeRO stage 3 all ranks
        must make as many forward passes, and weights be used by the model's own modules alone."""
        with self._evaluating():
            return self._with_objective(None, question=question)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.model.eval()
        # Batches of other sizes than in training would be traced anew.
        eager = self.config.train.compile != "none"
        with torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext():
            yield
        self.model.train()


def check_precision(config: RunConfig, device: torch.device) -> None:
    """Raise ConfigError for a precision that the device does not train in."""
    if config.train.precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision: fp16 needs a GPU; on this machine it must be fp32, bf16")


def compile_blocks(model: GPT) -> None:
    """Let torch.compile trace each block when it is first called, for `train.compile`. Blocks share what was traced."""
    # Here, as the import costs a second. Kernels of layers and patterns change with the density: the usual 8 traces of
    # a function are few, and what comes after them would not be compiled.
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for block in model.layers:
        block.compile()


class DividedAtOnce(deepspeed.zero.Init):
    """DeepSpeed's context that divides parameters as soon as their module is made, for `tensor_overrides=()`.

    By default it replaces torch's constructors, so that a parameter has its final dtype and device from the first; then
    whatever else is made meanwhile gets them too, and random scores of float32 came out as bfloat16 of half their
    length. Here constructors stay torch's own, and parameters are cast when their module is complete.

    A rank then draws initial weights for its piece alone (``layers.init``): DeepSpeed would send those of the first
    rank, all of them, to the others.
    """

    def __init__(self, *args: Any, rank: int, **settings: Any) -> None:
        self._own_rank = rank
        super().__init__(*args, **settings)

    def _post_init_method(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(self.dtype)
        super()._post_init_method(module)
        for parameter in module.parameters(recurse=False):
            initial = vars(parameter).pop("initial", None)
            if initial is not None:
                share = parameter.ds_tensor.numel()
                start = self._own_rank * share
                own = initial(start, max(min(share, parameter.ds_numel - start), 0))
                parameter.ds_tensor.data.view(-1)[: own.numel()].copy_(own)

    def _zero_init_param(self, parameter: Any) -> None:
        if not hasattr(parameter, "initial"):
            super()._zero_init_param(parameter)
            return
        self._convert_to_deepspeed_param(parameter)
        parameter.partition()


def divides_model(config: RunConfig) -> bool:
    """Whether parameters are divided as they are made. Where an adapter is trained all others become frozen buffers,
    which every rank holds."""
    return config.deepspeed.zero_stage == 3 and config.adapter_field is None


def draws_pieces(config: RunConfig) -> bool:
    """Whether initial weights are drawn when parameters have been divided, inside of ``model_construction``."""
    return divides_model(config) and not DIVIDED_OTHERWISE & set(config.deepspeed.extra.get("zero_optimization", {}))


@contextlib.contextmanager
def model_construction(config: RunConfig, mesh: Mesh) -> Iterator[OpenWeight]:
    """Build the model inside: at ZeRO stage 3 every layer is divided as soon as it is made, so that no rank ever holds
    the whole model. Gives the context that puts a weight together for a change."""
    if not divides_model(config):
        yield contextlib.nullcontext
        return
    prepare_deepspeed(mesh)
    settings = deepspeed_dict(config, mesh.data_parallel.size, mesh.device.type)
    with DividedAtOnce(
        rank=mesh.data_parallel.rank,
        data_parallel_group=mesh.data_parallel.group,
        config_dict_or_path=settings,
        mpu=mesh,
        tensor_overrides=(),
    ):
        yield lambda weight: deepspeed.zero.GatheredParameters(weight, modifier_rank=0)


def prepare_deepspeed(mesh: Mesh) -> None:
    """Let DeepSpeed adopt the process groups that exist, quietly and without a compiler.

    On CPUs it would otherwise compile a shared-memory all-reduce at its first start; gloo does the work as well.
    """
    # Besides start-up chatter this silences a warning that our optimizer is not on DeepSpeed's own list.
    deepspeed_logger.setLevel(logging.ERROR)
    # DeepSpeed 0.19 still gathers by a name that torch 2.13 has replaced.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed(verbose=False, auto_mpi_discovery=False)
