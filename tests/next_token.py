"""The loss of a model on given tokens, as training has it."""

from __future__ import annotations

from torch import Tensor

from megasparse.data import Batch
from megasparse.models.gpt import GPT
from megasparse.objectives.objective import NextTokenCrossEntropy


def next_token_loss(model: GPT, inputs: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
    """Mean cross entropy, a scalar with graph."""
    return NextTokenCrossEntropy()(model, Batch(inputs, targets, documents)).loss
