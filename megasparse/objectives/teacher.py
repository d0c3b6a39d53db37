"""The teacher of a run: the model of a folder, frozen, divided over the ranks as the student is, without an optimizer.

    teacher = open_teacher(config, vocab_size, mesh)                # on every rank
    states = teacher.states(batch)

Tensor-parallel ranks hold its shards; at ZeRO stage 3 its weights are divided over the data-parallel ranks as well and
put together layer by layer, by DeepSpeed. It computes in the precision of the run, in inference mode.
``checks`` has looked at the folder before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed
import torch
from torch import Tensor, nn

from megasparse.checkpoint.model_folder import ModelFolder, fitted
from megasparse.config.deepspeed import deepspeed_dict
from megasparse.config.schema import RunConfig
from megasparse.data import Batch
from megasparse.engine.training_engine import DTYPES, model_construction
from megasparse.models.build import build_model
from megasparse.models.gpt import GPT
from megasparse.objectives.checks import teacher_config
from megasparse.objectives.distillation import TeacherStates
from megasparse.parallel import Mesh, shard_spec_of
from megasparse.sparsity.schedule import PatternSchedule, pattern_at


class _States(nn.Module):
    """The forward pass as a module, around which DeepSpeed puts weights together. Takes over the model's submodules."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        for name, module in model.named_children():
            self.add_module(name, module)
        self._model = (model,)

    def forward(self, inputs: Tensor, documents: Tensor | None) -> tuple[list[Tensor], Tensor]:
        outputs: list[Tensor] = []
        return outputs, self._model[0].hidden_states(inputs, documents, outputs=outputs)


class FrozenTeacher:
    """model: this rank's shard, with its weights. opened: puts weights together that stage 3 keeps in pieces."""

    def __init__(self, model: GPT, states: nn.Module, *, divided: bool) -> None:
        self.model, self._states, self._divided = model, states, divided

    @torch.inference_mode()
    def states(self, batch: Batch) -> TeacherStates:
        return TeacherStates(*self._states(batch.inputs, batch.documents))

    @contextlib.contextmanager
    def logits(self, normed_BTC: Tensor) -> Iterator[Callable[[slice], Tensor]]:
        head = self.model.head_in_chunks
        with contextlib.ExitStack() as stack:
            if self._divided:
                stack.enter_context(deepspeed.zero.GatheredParameters(head.head_parameters))
            with torch.inference_mode():
                entered_NC = self.model.vocabulary.tensor_parallel.copy_to_region(normed_BTC).flatten(0, 1)

            @torch.inference_mode()
            def of_tokens(tokens: slice) -> Tensor:
                return head.local_logits(entered_NC[tokens])

            yield of_tokens


def open_teacher(config: RunConfig, vocab_size: int, mesh: Mesh) -> FrozenTeacher:
    """The model of `distillation.teacher`; every rank calls it. Raises CheckpointError for one that is not whole."""
    folder = ModelFolder(Path(config.distillation.teacher or ""))
    own = teacher_config(config, folder)
    divided = config.deepspeed.zero_stage == 3
    with model_construction(own, mesh) as opened:
        model = build_model(own, vocab_size, mesh.tensor_parallel).to(mesh.device)
        for name, parameter in model.named_parameters():
            with torch.no_grad(), opened(parameter):
                spec = shard_spec_of(parameter)
                whole = fitted(name, folder.tensor(name), spec.shape)
                parameter.copy_(spec.shard(whole, mesh.tensor_parallel.rank))
    if not divided:
        # Weights in pieces were cast as they were made.
        model = model.to(DTYPES[config.train.precision])
    model.eval().requires_grad_(False)
    theirs = folder.config
    schedule = PatternSchedule(theirs.attention, theirs.model.num_layers, theirs.model.num_attention_heads)
    pattern = pattern_at(theirs, folder.facts.get("step", 0), schedule)
    model.set_attention_patterns(schedule.layer_patterns(pattern))
    states: nn.Module = _States(model).eval()
    if divided:
        settings = deepspeed_dict(own, mesh.data_parallel.size, mesh.device.type)
        engine, *_ = deepspeed.initialize(model=states, config=settings, mpu=mesh, dist_init_required=False)
        states = engine.module
    return FrozenTeacher(model, states, divided=divided)
