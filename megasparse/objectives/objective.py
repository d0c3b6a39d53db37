"""What a model is trained to do: an objective turns a model and a batch into a loss and named parts of it.

    class Mine:
        def __call__(self, model, batch):
            hidden = model.hidden_states(batch.inputs, batch.documents)
            ...
            return ObjectiveResult(loss, {"z_loss": z})

    pretrain(config, environment, objective=Mine())

The engine calls it inside its own forward pass, so that weights which ZeRO stage 3 keeps in pieces are gathered by the
layers that use them. The parts are averaged like the loss and stand beside it in the metrics; no gradient follows them.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from megasparse.data import Batch
from megasparse.layers.loss import weighted
from megasparse.models.gpt import GPT


class ObjectiveResult(NamedTuple):
    """The loss, a scalar with graph and the mean over the batch, and scalars to be logged under their names."""

    loss: Tensor
    parts: dict[str, Tensor]


class Objective(Protocol):
    def __call__(self, model: GPT, batch: Batch) -> ObjectiveResult:
        """The same names of parts in every call and on every rank."""


class NextTokenCrossEntropy:
    """Mean of -log p(next token), in nats, with the weights of the batch; the logits exist for one chunk of the tokens
    at a time."""

    def __call__(self, model: GPT, batch: Batch) -> ObjectiveResult:
        hidden_BTC = model.hidden_states(batch.inputs, batch.documents)
        losses = weighted(model.vocabulary.next_token_losses(batch.targets), batch.weights)
        return ObjectiveResult(model.head_in_chunks(hidden_BTC, losses), {})
