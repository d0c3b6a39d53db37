"""Dense causal attention, the pattern `full`: torch's causal kernel (flash where there is one), document by document.

A document is a causal sequence of its own, so nothing needs a T x T mask. Positions play no role under `full`.

Tensor names: B samples, H query heads, G key-value heads (H is a multiple of G), T tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megasparse.kernels.hybrid_attention import operators

# Tokens of an average document below which the calls cost more than tiles over all of them.
SHORT_DOCUMENTS = 16


def attend(
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTD: torch.Tensor,
    patterns: Sequence[str],
    stride: int,
    documents_BT: torch.Tensor | None,
    offsets: Sequence[int],
) -> torch.Tensor:
    """Softmax attention of all heads under `full`. Returns [B, H, T, D] in the dtype of `q_BHTD`."""
    assert set(patterns) == {"full"}, patterns
    options = {"is_causal": True, "enable_gqa": q_BHTD.shape[1] != k_BGTD.shape[1]}
    if documents_BT is None:
        return F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, **options)
    # A compiler cannot cut by numbers that it does not know yet.
    lengths = None if torch.compiler.is_compiling() else document_lengths(documents_BT)
    if lengths is None or SHORT_DOCUMENTS * sum(map(len, lengths)) > documents_BT.numel():
        return operators.attend("tiled", q_BHTD, k_BGTD, v_BGTD, patterns, stride, documents_BT, offsets)
    samples = []
    for sample, cuts in enumerate(lengths):
        # Cut at once: the gradient of each cut by itself would be as long as the sequence.
        pieces = zip(*(x[sample].split(cuts, dim=1) for x in (q_BHTD, k_BGTD, v_BGTD)), strict=True)
        attended = [F.scaled_dot_product_attention(q[None], k[None], v[None], **options)[0] for q, k, v in pieces]
        samples.append(torch.cat([y_HTD.transpose(0, 1) for y_HTD in attended]))
    return torch.stack(samples).transpose(1, 2)


def document_lengths(documents_BT: torch.Tensor) -> list[list[int]]:
    """Tokens of each document of each sample."""
    return [torch.unique_consecutive(sample, return_counts=True)[1].tolist() for sample in documents_BT.cpu()]
