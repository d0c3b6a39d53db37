"""The end of the model: logits whose vocabulary is divided over the tensor-parallel ranks, and their cross entropy.

``HeadInChunks`` computes the product of the head over one chunk of tokens after the other and gives each to a loss
(``ChunkLoss``), which is an objective's business; ``Vocabulary.next_token_losses`` is the usual one. Where a gradient
is wanted, it is computed in the forward pass, while the chunk's logits are there, and replaces them in place. So the
logits of all tokens, the largest tensor of a training step by far, never exist, and no product is done twice.

The rows that pad the vocabulary take no part: they are sliced off the logits, or their exponential and therefore their
gradient is exactly zero.
Tensor names: B samples, T tokens, N = B T, C hidden size, V entries of the vocabulary, W those rows of their table that
this rank holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megasparse.kernels.cross_entropy import cross_entropy_
from megasparse.layers.linear import Linear
from megasparse.parallel import TensorParallel

CHUNK_BYTES = 2**28
"""Of the logits of a chunk on a rank, at most. Each chunk but a lone one adds the gradient of the whole weight to a sum
in float32: with 50,304 entries of width 768 in bfloat16, two chunks of 1,024 tokens moved 1 GB for that."""

PIECE = 2**20
"""Elements that are scaled at once on a CPU: 4 MiB in float32, which stay in the cache."""


ChunkLoss = Callable[[torch.Tensor, slice, bool], torch.Tensor]
"""(logits of a chunk of tokens [n, W], which of all tokens they are, wants gradient) -> their losses, float32 [n], the
same on all ranks. Overwrites the logits: with the gradient of the losses' sum where it is wanted."""


def weighted(losses: ChunkLoss, weights_BT: torch.Tensor | None) -> ChunkLoss:
    """The same losses, each times its weight, float32; None: as they are."""
    if weights_BT is None:
        return losses
    weights_N = weights_BT.flatten()

    def weighted_losses(logits_NW: torch.Tensor, tokens: slice, wants_gradient: bool) -> torch.Tensor:
        losses_N = losses(logits_NW, tokens, wants_gradient)
        if wants_gradient:
            logits_NW.mul_(weights_N[tokens].unsqueeze(1))
        return losses_N * weights_N[tokens]

    return weighted_losses


class Vocabulary:
    """What a rank knows of the vocabulary: `size` entries in a table of `rows` rows, divided evenly."""

    def __init__(self, size: int, rows: int, tensor_parallel: TensorParallel, kernel: str = "auto") -> None:
        """kernel: of `kernels.loss`."""
        self.size, self.tensor_parallel, self.kernel = size, tensor_parallel, kernel
        self.share = rows // tensor_parallel.size
        """Rows on each rank, padding included."""
        self.first = tensor_parallel.rank * self.share
        self.width = min(max(size - self.first, 0), self.share)
        """Entries on this rank that are no padding; 0 where it holds padding only."""

    def logits(self, logits_BTW: torch.Tensor) -> torch.Tensor:
        """Logits of all entries, [B, T, V], on every rank."""
        return self.tensor_parallel.gather_from_tensor_parallel_region(logits_BTW)[..., : self.size]

    def next_token_losses(self, targets_BT: torch.Tensor) -> ChunkLoss:
        """``cross_entropy_`` of each chunk. Raises RuntimeError for a target that is no entry."""
        targets_N = targets_BT.flatten()
        known_N = (targets_N >= 0) & (targets_N < self.size)
        torch._assert_async(known_N.all(), "a target is no entry of the vocabulary")

        def losses(logits_NW: torch.Tensor, tokens: slice, wants_gradient: bool) -> torch.Tensor:
            return self.cross_entropy_(logits_NW, targets_N[tokens], wants_gradient)

        return losses

    def cross_entropy_(self, logits_NW: torch.Tensor, targets_N: torch.Tensor, wants_gradient: bool) -> torch.Tensor:
        """-log softmax(logits)[target] of each token, [N], float32, in nats, the same on every rank.

        Overwrites the logits, of any floating dtype; `wants_gradient`: with the gradient of the losses' sum. Computed
        in float32.
        """
        local_N = targets_N - self.first
        local_N = local_N.masked_fill((local_N < 0) | (local_N >= self.width), -1)
        joined = None if self.tensor_parallel.size == 1 else self._joined
        return cross_entropy_(logits_NW, local_N, self.width, wants_gradient, joined=joined, kernel=self.kernel)

    def _joined(self, largest_N: Tensor, sums_N: Tensor, picked_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of whole rows, from what the ranks know of their parts; sums are of exp(logit - largest)."""
        axis = self.tensor_parallel.axis
        whole_N = axis.max_(largest_N.clone())
        sums_N, picked_N = axis.sum_(torch.stack([sums_N * (largest_N - whole_N).exp(), picked_N]))
        return whole_N, sums_N, picked_N

    def divergence(
        self, logits_NW: torch.Tensor, teacher_NW: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """KL(p || q) of each token, float32 [N], in nats, the same on every rank, and its gradient by the logits of q,
        float32 [N, W]; p = softmax(teacher / temperature), q = softmax(logits / temperature). Both stay as they are."""
        p_NW, q_NW = (self._log_probabilities(x, temperature) for x in (teacher_NW, logits_NW))
        gradient_NW = q_NW.exp().sub_(p_NW.exp()).div_(temperature)
        held = slice(0, self.width)
        # Padding has -inf on both sides, and no part in the sum.
        terms_NW = p_NW[:, held].exp() * (p_NW[:, held] - q_NW[:, held])
        return self.tensor_parallel.axis.sum_(terms_NW.sum(1)), gradient_NW

    def _log_probabilities(self, logits_NW: torch.Tensor, temperature: float) -> torch.Tensor:
        """log softmax over the whole vocabulary, this rank's part of it, float32 [N, W]; -inf where it is padded."""
        axis = self.tensor_parallel.axis
        scores_NW = logits_NW.to(torch.float32) / temperature
        scores_NW[:, self.width :] = -torch.inf
        scores_NW.sub_(axis.max_(scores_NW.amax(1)).unsqueeze(1))
        return scores_NW.sub_(axis.sum_(scores_NW.exp().sum(1)).log_().unsqueeze(1))


class HeadInChunks(nn.Module):
    """The mean of a loss of the head's logits. The head stays where it is in the model; nothing is registered here.

    Under ZeRO stage 3 DeepSpeed must be told of `head_parameters`, which this module uses and does not own.
    """

    def __init__(self, head: Linear, vocabulary: Vocabulary, chunk_elements: int | None = None) -> None:
        """chunk_elements: logits of a chunk on a rank, at most; None: as many as are `CHUNK_BYTES`."""
        super().__init__()
        assert head.division == "column", f"{head.name} divides its inputs"
        # In a tuple the head does not become a submodule, so its parameters keep their one place and name.
        self._head = (head,)
        self.vocabulary, self.chunk_elements = vocabulary, chunk_elements

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        return list(self._head[0].parameters())

    def forward(self, x_BTC: torch.Tensor, chunk_loss: ChunkLoss) -> torch.Tensor:
        """Mean of the losses of all B T tokens, a float32 scalar. x_BTC lies between layers, as the head's input."""
        (head,), ranks = self._head, self.vocabulary.tensor_parallel
        inputs = [ranks.copy_to_region(x_BTC)]
        # A frozen head has no gradient.
        parameters = [tensor for tensor in head.product_parameters() if tensor.requires_grad]
        if head.low_rank:
            inputs.append(ranks.copy_to_region(F.linear(x_BTC, ranks.shared(head.side_in))))
            parameters.append(head.side_out)
        inputs = [x.flatten(0, 1) for x in inputs]
        return _ChunkedLoss.apply(self, chunk_loss, torch.is_grad_enabled(), len(inputs), *inputs, *parameters)

    def local_logits(self, x_NC: torch.Tensor, side_NR: torch.Tensor | None = None) -> torch.Tensor:
        """[N, W] from what has entered the head: the activation and the middle of its low-rank branch."""
        (head,) = self._head
        logits_NW = head.product(x_NC, head.bias)
        return logits_NW if side_NR is None else logits_NW + F.linear(side_NR, head.side_out)

    def chunk_rows(self, num_tokens: int, dtype: torch.dtype) -> int:
        """Tokens of a chunk, the same on every rank: as few chunks as the size allows, all alike. dtype: of logits."""
        most = self.chunk_elements or CHUNK_BYTES // dtype.itemsize
        chunks = -(-num_tokens * self.vocabulary.share // most)
        return -(-num_tokens // chunks)


class _ChunkedLoss(torch.autograd.Function):
    """(head, loss, wants gradients, number of inputs, *inputs [N, *], *parameters of the head) -> mean loss.

    Gradients are kept without the factor dloss / N until the backward pass brings it: with float16 that factor holds
    the loss scale, without which small gradients would be lost. Those of the parameters are summed over the chunks in
    float32 (float64 for float64), where there are several: one rounding per chunk and one at the end, as far from exact
    as a single product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: HeadInChunks,
        chunk_loss: ChunkLoss,
        wants_gradient: bool,
        num_inputs: int,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        inputs, parameters = tensors[:num_inputs], tensors[num_inputs:]
        num_tokens = len(inputs[0])
        rows = head.chunk_rows(num_tokens, inputs[0].dtype)
        losses, input_gradients = [], []
        totals: list[torch.Tensor] = []
        for first in range(0, num_tokens, rows):
            tokens = slice(first, min(first + rows, num_tokens))
            chunk = [x[tokens] for x in inputs]
            if wants_gradient:
                chunk_losses, *gradients = _losses_and_gradients(head, chunk_loss, tokens, chunk, parameters, totals)
                input_gradients.append(gradients)
            else:
                chunk_losses = chunk_loss(head.local_logits(*chunk), tokens, False)
            losses.append(chunk_losses)
        if wants_gradient:
            ctx.gradients = [*map(torch.cat, zip(*input_gradients, strict=True)), *totals]
            ctx.dtypes = [tensor.dtype for tensor in tensors]
        return torch.cat(losses).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients of the head are given out once"
        gradients, ctx.gradients = ctx.gradients, None
        scale = dloss / gradients[0].shape[0]
        scaled = [_scaled(*pair, scale) for pair in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, None, None, *scaled


def _losses_and_gradients(
    head: HeadInChunks,
    chunk_loss: ChunkLoss,
    tokens: slice,
    inputs: list[torch.Tensor],
    parameters: tuple[torch.Tensor, ...],
    totals: list[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Losses of a chunk and the gradients of its inputs; those of the parameters are added up in `totals`.

    A function of its own, so that nothing large of one chunk is still there when the next one begins.
    """
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        logits_NW = head.local_logits(*inputs)
    gradient_NW = logits_NW.detach()
    losses_N = chunk_loss(gradient_NW, tokens, True)
    gradients = torch.autograd.grad(logits_NW, [*inputs, *parameters], gradient_NW)
    of_parameters = gradients[len(inputs) :]
    if not totals:
        totals.extend(of_parameters)
    else:
        for i, gradient in enumerate(of_parameters):
            totals[i] = totals[i].to(_wide(gradient)).add_(gradient)
    return losses_N, *gradients[: len(inputs)]


def _scaled(gradient: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    """gradient * scale, computed in float32 or wider and rounded once; in place where the dtype is right already."""
    wide = _wide(gradient)
    if dtype == wide or gradient.device.type != "cpu" or not gradient.is_contiguous():
        return gradient.to(wide).mul_(scale).to(dtype)
    result = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    for source, target in zip(gradient.view(-1).split(PIECE), result.view(-1).split(PIECE), strict=True):
        target.copy_(source.to(wide) * scale)
    return result


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
