"""2:4 sparsity of activations (Haziza et al. 2025, arXiv 2503.16672): which entries are kept, and the products of them.

    kept = keep_features(h_BTF)                     # forward pass, input gradients: a product sums over the features
    kept = keep_tokens(h_BTF, order_T)              # weight gradients: it sums over the tokens
    y_NO = product(pruned_NI, weight_IO, kernel)    # pruned: at most two of four consecutive entries of a row

Kernels: `reference`, dense products of tensors with zeros, everywhere; `semi_structured`, torch's
``SparseSemiStructuredTensor`` on sparse tensor cores, by cuSPARSELt or CUTLASS. The latter has never run here: no such
device was at hand, and nothing of its speed is known.
Names: B samples, T tokens, F features, N rows, I inner width, O outer width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megasparse.kernels.activation_sparsity import semi_structured

KERNELS = ("reference", "semi_structured")
GROUP = 16
"""Of so many consecutive features one has weight gradients without 2:4, the one with most entries in a sample: 6 %,
near the densest 5 % of the paper, and the same ones however features lie on ranks and samples in batches."""


def two_of_four(x: Tensor) -> Tensor:
    """True at the two largest of every four consecutive entries of the last dimension, the earlier ones where some are
    equal; entries after the last four are kept. x: entries of 0 or more."""
    whole = x.shape[-1] // 4 * 4
    four = x[..., :whole].unflatten(-1, (-1, 4)).unbind(-1)
    kept = torch.ones_like(x, dtype=torch.bool)
    columns = []
    for i, own in enumerate(four):
        ahead = [(other >= own if j < i else other > own) for j, other in enumerate(four) if j != i]
        columns.append(torch.stack(ahead).sum(0) < 2)
    if columns:
        kept[..., :whole] = torch.stack(columns, -1).flatten(-2)
    return kept


def keep_features(h_BTF: Tensor) -> Tensor:
    """Bool [B, T, F]: two of four along the features."""
    return two_of_four(h_BTF)


def keep_tokens(h_BTF: Tensor, order_T: Tensor) -> Tensor:
    """Bool [B, T, F]: two of four along the tokens of a sample in the order given, as neighbours are alike; all entries
    of one feature in each group of `GROUP`."""
    kept_BFT = two_of_four(h_BTF.index_select(1, order_T).transpose(1, 2))
    kept = torch.empty_like(h_BTF, dtype=torch.bool)
    kept[:, order_T] = kept_BFT.transpose(1, 2)
    return kept | is_dense(h_BTF)[:, None]


def is_dense(h_BTF: Tensor) -> Tensor:
    """Bool [B, F]: the feature of each group of `GROUP` with most entries that are not 0; the first of equal ones."""
    counts = h_BTF.count_nonzero(1)
    whole = counts.shape[1] // GROUP * GROUP
    groups = counts[:, :whole].unflatten(1, (-1, GROUP))
    dense = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.argmax(2, keepdim=True), True)
    rest = torch.ones_like(counts[:, whole:], dtype=torch.bool)
    return torch.cat([dense.flatten(1), rest], 1)


def token_order(tokens: int, device: torch.device) -> Tensor:
    """A fixed random order of the tokens of a sample, int64 [T]."""
    generator = torch.Generator(device="cpu").manual_seed(tokens)
    return torch.randperm(tokens, generator=generator, device="cpu").to(device)


def product(pruned_NI: Tensor, weight_IO: Tensor, kernel: str) -> Tensor:
    """pruned weight, [N, O]. Raises ValueError where a kernel cannot take it."""
    return semi_structured.product(pruned_NI, weight_IO) if kernel == "semi_structured" else pruned_NI @ weight_IO


def weight_gradient(sparse_BTF: Tensor, other_BTC: Tensor, order_T: Tensor, dense_BF: Tensor, kernel: str) -> Tensor:
    """sparse^T other, [F, C], of a tensor that is 2:4 along the tokens in the order given, but for the features of
    `dense_BF`, whose products are dense ones."""
    if kernel == "reference":
        return sparse_BTF.flatten(0, 1).t() @ other_BTC.flatten(0, 1)
    total = None
    for sparse_TF, other_TC, dense_F in zip(sparse_BTF, other_BTC, dense_BF, strict=True):
        # One of every group, so that shapes are the same in each call.
        columns = dense_F.nonzero(as_tuple=True)[0]
        thin_TF = sparse_TF.masked_fill(dense_F, 0).index_select(0, order_T)
        own = semi_structured.product(thin_TF.t().contiguous(), other_TC.index_select(0, order_T))
        own.index_add_(0, columns, sparse_TF.index_select(1, columns).t() @ other_TC)
        total = own if total is None else total + own
    assert total is not None, "no sample"
    return total
