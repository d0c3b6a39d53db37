"""Learning from a teacher: cross entropy of the next token, divergence from the teacher's distribution, SquareHead.

    objective = Distillation(config.distillation, open_teacher(config, vocab_size, mesh))

    loss = cross_entropy_weight * CE
         + logits_weight * temperature^2 * KL(teacher || student)
         + hidden_weight * SquareHead

All three are aligned with the targets: position i of the inputs predicts target i, and the weights of the batch, which
say what of supervised data is learned, are those of both CE and KL. In evaluation mode the loss is the cross entropy
alone, without the teacher, so that validation losses compare with those of other runs.
Tensor names: B samples, T tokens, N = B T, C hidden size, W entries of the vocabulary on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megasparse.config.distillation import DistillationConfig
from megasparse.data import Batch
from megasparse.layers.loss import ChunkLoss, Vocabulary, weighted
from megasparse.models.gpt import GPT
from megasparse.objectives.objective import NextTokenCrossEntropy, ObjectiveResult
from megasparse.objectives.square_head import square_head


class TeacherStates(NamedTuple):
    """Of one micro-batch, without graph, as they lie between layers: [B, T, C]."""

    outputs: list[Tensor]
    """Of each block."""
    normed: Tensor
    """What the head reads."""


class Teacher(Protocol):
    """A frozen model, in the layout of the student."""

    def states(self, batch: Batch) -> TeacherStates: ...

    def logits(self, normed_BTC: Tensor) -> AbstractContextManager[Callable[[slice], Tensor]]:
        """Within the context: this rank's part of the logits, [n, W], of some of the N tokens."""
        ...


class Distillation:
    """See the module header. Its parts are `cross_entropy` and, where they have a weight, `divergence` and
    `square_head`, each without its weight."""

    def __init__(self, config: DistillationConfig, teacher: Teacher) -> None:
        self.config, self.teacher = config, teacher
        self._next_token = NextTokenCrossEntropy()

    def __call__(self, model: GPT, batch: Batch) -> ObjectiveResult:
        if not model.training:
            return self._next_token(model, batch)
        config = self.config
        theirs = self.teacher.states(batch)
        outputs: list[Tensor] = []
        hidden_BTC = model.hidden_states(batch.inputs, batch.documents, outputs=outputs)
        loss, parts = self._of_logits(model, hidden_BTC, theirs, batch)
        if config.hidden_weight:
            parts["square_head"] = self._of_states(model, TeacherStates(outputs, hidden_BTC), theirs, batch)
            loss = loss + config.hidden_weight * parts["square_head"]
        return ObjectiveResult(loss, parts)

    def _of_logits(
        self, model: GPT, hidden_BTC: Tensor, theirs: TeacherStates, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy and divergence, which share the logits of each chunk."""
        config, vocabulary = self.config, model.vocabulary
        entropies = vocabulary.next_token_losses(batch.targets)
        if not config.logits_weight:
            mean = model.head_in_chunks(hidden_BTC, weighted(entropies, batch.weights))
            return config.cross_entropy_weight * mean, {"cross_entropy": mean}
        with self.teacher.logits(theirs.normed) as teacher_logits:
            both = _BothLosses(config, vocabulary, entropies, teacher_logits)
            mean = model.head_in_chunks(hidden_BTC, weighted(both, batch.weights))
        return mean, both.parts(batch.weights)

    def _of_states(self, model: GPT, ours: TeacherStates, theirs: TeacherStates, batch: Batch) -> Tensor:
        config = self.config
        pairs = config.layer_map or [(block, block) for block in range(len(ours.outputs))]
        tokens = {"all": None, "non_padding": batch.is_example, "response": batch.is_learned}[config.tokens]
        return square_head(
            [self._state(ours, block) for block, _ in pairs],
            [self._state(theirs, block) for _, block in pairs],
            tokens,
            epsilon=config.epsilon,
            reduction=config.reduction,
            ratio_over=config.ratio_over,
            ranks=model.vocabulary.tensor_parallel,
        )

    def _state(self, states: TeacherStates, block: int) -> Tensor:
        is_last = block == len(states.outputs) - 1
        return states.normed if is_last and self.config.last_state == "post_norm" else states.outputs[block]


class _BothLosses:
    """A ``ChunkLoss``: weighted sum of cross entropy and divergence. Remembers both, for ``parts``."""

    def __init__(
        self,
        config: DistillationConfig,
        vocabulary: Vocabulary,
        entropies: ChunkLoss,
        teacher_logits: Callable[[slice], Tensor],
    ) -> None:
        self._config, self._vocabulary = config, vocabulary
        self._entropies, self._teacher_logits = entropies, teacher_logits
        self._cross_entropy: list[Tensor] = []
        self._divergence: list[Tensor] = []

    def __call__(self, logits_NW: Tensor, tokens: slice, wants_gradient: bool) -> Tensor:
        config, temperature = self._config, self._config.temperature
        divergence_N, gradient_NW = self._vocabulary.divergence(logits_NW, self._teacher_logits(tokens), temperature)
        entropy_N = self._entropies(logits_NW, tokens, wants_gradient)
        if wants_gradient:
            logits_NW.mul_(config.cross_entropy_weight).add_(gradient_NW, alpha=config.logits_weight * temperature**2)
        self._cross_entropy.append(entropy_N)
        self._divergence.append(divergence_N * temperature**2)
        return config.cross_entropy_weight * entropy_N + config.logits_weight * self._divergence[-1]

    def parts(self, weights_BT: Tensor | None) -> dict[str, Tensor]:
        """Means over the tokens, with the weights of the batch."""
        parts = {"cross_entropy": torch.cat(self._cross_entropy), "divergence": torch.cat(self._divergence)}
        factors = 1.0 if weights_BT is None else weights_BT.flatten()
        return {name: (losses_N * factors).mean() for name, losses_N in parts.items()}
