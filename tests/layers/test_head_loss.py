"""Head and cross entropy in chunks against the formula in float64, and what must not exist beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megasparse.layers.loss as loss_module
from megasparse.layers import HeadInChunks, Linear, SparseLinear, Vocabulary
from megasparse.layers.loss import CHUNK_BYTES, PIECE
from megasparse.parallel import CommunicationGroup, TensorParallel

V, ROWS, C, TOKENS = 43, 48, 16, (3, 7)


def make_head(kind: str, dtype: torch.dtype = torch.float32) -> Linear:
    if kind == "plain":
        head = Linear("head", C, ROWS, bias=False, init_std=0.5)
    elif kind == "bias":
        head = Linear("head", C, ROWS, bias=True, init_std=0.5)
    else:
        head = SparseLinear(
            "head", C, ROWS, bias=False, block_size=4, low_rank=3 if kind == "low-rank" else 0, init_std=0.5
        )
        head.mask.copy_(torch.rand(head.mask.shape) < 0.4)
        head.weight.data.mul_(active_entries_of(head))
        head.topology_changed()
    for parameter in head.parameters():
        if parameter is not head.weight:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return head.to(dtype)


def active_entries_of(head: SparseLinear) -> torch.Tensor:
    return head.mask.repeat_interleave(4, 0).repeat_interleave(4, 1)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(*TOKENS, C).to(dtype).requires_grad_(), torch.randint(V, TOKENS)


def head_loss(head: Linear, chunk_rows: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(x, targets) -> mean cross entropy."""
    chunked = HeadInChunks(head, Vocabulary(V, ROWS, TensorParallel()), chunk_elements=chunk_rows * ROWS)
    return lambda x, targets: chunked(x, chunked.vocabulary.next_token_losses(targets))


def expected_results(head: Linear, x: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of input and parameters in float64; those of a sparse weight are dense."""
    wide = {name: parameter.detach().double().requires_grad_() for name, parameter in head.named_parameters()}
    x = x.detach().double().requires_grad_()
    logits = F.linear(x, wide["weight"], wide.get("bias"))
    if "side_in" in wide:
        logits = logits + x @ wide["side_in"].t() @ wide["side_out"].t()
    loss = F.cross_entropy(logits[..., :V].flatten(0, 1), targets.flatten())
    return loss.detach(), list(torch.autograd.grad(loss, [x, *wide.values()]))


@pytest.mark.parametrize("chunk_rows", [1, 5, 21, 1000])
@pytest.mark.parametrize("kind", ["plain", "bias", "sparse", "low-rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients(kind, dtype, chunk_rows) -> None:
    """bfloat16 logits carry 2^-9 of up to about 8, so a loss is off by 0.02 at most; its gradients by some roundings,
    of which each is 2^-9 of the largest value."""
    head, (x, targets) = make_head(kind, dtype), inputs(dtype)
    if isinstance(head, SparseLinear):
        head.collect_dense_gradient = True
    loss = head_loss(head, chunk_rows)(x, targets)
    loss.backward()
    expected, gradients = expected_results(head, x, targets)
    low = dtype == torch.bfloat16
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=0 if low else 1e-6, atol=2e-2 if low else 0)
    for ours, gradient in zip([x.grad, *(p.grad for p in head.parameters())], gradients, strict=True):
        bound = float(gradient.abs().max()) * (2**-5 if low else 1e-5)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), gradient, rtol=0, atol=bound)


def test_a_sparse_head_follows_its_mask_in_every_chunk() -> None:
    head, (x, targets) = make_head("sparse"), inputs()
    head_loss(head, 4)(x, targets).backward()
    active = active_entries_of(head)
    assert (head.weight.grad[~active] == 0).all()
    _, (_, gradient) = expected_results(head, x, targets)
    torch.testing.assert_close(head.weight.grad.double(), gradient * active, rtol=0, atol=1e-6)


def test_padded_rows_get_no_gradient() -> None:
    head, (x, targets) = make_head("plain"), inputs()
    head.weight.data[V:] = 50.0
    head_loss(head, 4)(x, targets).backward()
    assert (head.weight.grad[V:] == 0).all() and x.grad.isfinite().all()


class LargestRows(TorchDispatchMode):
    """Number of rows of the largest matrix as wide as the vocabulary that any operator returned."""

    rows = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2 and tensor.shape[-1] in (V, ROWS):
                self.rows = max(self.rows, tensor.numel() // tensor.shape[-1])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_all_tokens_never_exist(dtype) -> None:
    """x^T, [C, N], and the transposed weight, [C, ROWS], are no logits: a chunk has more rows than C."""
    x = torch.randn(5, 20, C).to(dtype).requires_grad_()
    head, targets = make_head("plain", dtype), torch.randint(V, (5, 20))
    with LargestRows() as seen:
        head_loss(head, 20)(x, targets).backward()
    assert seen.rows == 20
    with LargestRows() as seen:
        F.cross_entropy(head(x)[..., :V].flatten(0, 1), targets.flatten()).backward()
    assert seen.rows == 100, "the check sees nothing"


def test_without_a_gradient_the_loss_is_the_same_and_nothing_is_kept() -> None:
    head, (x, targets) = make_head("sparse"), inputs()
    module = head_loss(head, 4)
    with torch.no_grad():
        loss = module(x, targets)
    assert not loss.requires_grad and torch.equal(loss, module(x, targets).detach())
    assert x.grad is None and head.weight.grad is None


def test_a_frozen_backbone_still_trains_the_head() -> None:
    head, (x, targets) = make_head("plain"), inputs()
    head_loss(head, 4)(x.detach(), targets).backward()
    torch.testing.assert_close(head.weight.grad.double(), expected_results(head, x, targets)[1][1], rtol=0, atol=1e-6)


def test_the_loss_scale_saves_small_float16_gradients() -> None:
    """The smallest float16 number is 6e-8; unscaled, all gradients of this input lie below it."""
    head, (x, targets) = make_head("plain", torch.float16), inputs(torch.float16)
    scale = 2.0**24
    x = (x.detach() * 1e-3).requires_grad_()
    head.weight.data.mul_(1e-3)
    (head_loss(head, 5)(x, targets) * scale).backward()
    _, gradients = expected_results(head, x, targets)
    for ours, gradient in zip([x.grad, head.weight.grad], gradients, strict=True):
        bound = float(gradient.abs().max()) * 2**-8
        torch.testing.assert_close(ours.double() / scale, gradient, rtol=0, atol=bound)


def test_gradients_are_given_out_once() -> None:
    head, (x, targets) = make_head("plain"), inputs()
    loss = head_loss(head, 4)(x, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="once"):
        loss.backward()


@pytest.mark.parametrize("target", [-1, -100, V])
@pytest.mark.parametrize("rank", [0, 1])
def test_no_target_is_skipped_silently(target, rank) -> None:
    ranks = TensorParallel(CommunicationGroup(rank, 2))
    with pytest.raises(RuntimeError, match="no entry of the vocabulary"):
        Vocabulary(V, ROWS, ranks).next_token_losses(torch.tensor([[3, target]]))


def test_chunks_are_few_and_alike() -> None:
    module = HeadInChunks(make_head("plain"), Vocabulary(V, ROWS, TensorParallel()), chunk_elements=10 * ROWS)
    assert [module.chunk_rows(tokens, torch.float32) for tokens in (1, 10, 11, 40, 41)] == [1, 10, 6, 10, 9]


def test_chunks_hold_as_many_bytes_in_every_dtype() -> None:
    module = HeadInChunks(make_head("plain"), Vocabulary(V, ROWS, TensorParallel()))
    most = CHUNK_BYTES // ROWS
    assert (
        module.chunk_rows(most // 4, torch.float32) == module.chunk_rows(most // 4 + 1, torch.bfloat16) - 1 == most // 4
    )
    assert module.chunk_rows(most // 2, torch.bfloat16) == most // 2 > module.chunk_rows(most // 2 + 1, torch.bfloat16)


@pytest.mark.parametrize("chunk_rows", [4, 1000])
def test_the_factor_from_outside_is_taken_in_float32(chunk_rows, monkeypatch) -> None:
    """A gradient of bfloat16 is rounded once more for it, whether it goes through in one piece or in many."""
    head, (x, targets) = make_head("plain", torch.bfloat16), inputs(torch.bfloat16)
    found = []
    for piece, factor in ((PIECE, 1.0), (PIECE, 0.3), (7, 0.3)):
        monkeypatch.setattr(loss_module, "PIECE", piece)
        loss = head_loss(head, chunk_rows)(x, targets)
        found.append(torch.autograd.grad(loss * factor * targets.numel(), [x, head.weight]))
    for whole, scaled, in_pieces in zip(*found, strict=True):
        assert torch.equal(scaled, in_pieces)
        if chunk_rows > targets.numel():
            # Before the factor, 1 here, gradients were rounded to bfloat16 already.
            factor = torch.tensor(float(targets.numel())) * 0.3 / targets.numel()
            assert torch.equal(scaled, (whole.float() * factor).bfloat16())


def test_a_loss_of_ones_own_sees_every_chunk() -> None:
    """A z-loss: the squared logarithm of the normaliser, with a gradient of its own making."""
    head, (x, _) = make_head("plain"), inputs()
    chunked = HeadInChunks(head, Vocabulary(V, ROWS, TensorParallel()), chunk_elements=4 * ROWS)
    seen = []

    def z_losses(logits: torch.Tensor, tokens: slice, wants_gradient: bool) -> torch.Tensor:
        seen.append(tokens)
        logs = logits[:, :V].logsumexp(-1)
        if wants_gradient:
            gradient = 2 * logs.unsqueeze(1) * logits[:, :V].softmax(-1)
            logits.zero_()[:, :V] = gradient
        return logs.square()

    loss = chunked(x, z_losses)
    loss.backward()
    assert [(tokens.start, tokens.stop) for tokens in seen] == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 21)]
    wide, weight = (tensor.detach().double().requires_grad_() for tensor in (x, head.weight))
    expected = F.linear(wide, weight)[..., :V].logsumexp(-1).square().mean()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    for ours, gradient in ((x.grad, wide.grad), (head.weight.grad, weight.grad)):
        torch.testing.assert_close(ours.double(), gradient, rtol=0, atol=float(gradient.abs().max()) * 1e-5)
