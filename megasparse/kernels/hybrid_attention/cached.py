"""Attention of new tokens to the keys and values of all tokens before them, at the cost of the active entries.

Tensor names: B samples, H query heads, G key-value heads (H is a multiple of G), N new tokens, L tokens kept, D head
dimension; K keys that a query sees, R query heads that share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F

from megasparse.kernels.hybrid_attention.patterns import PATTERNS, visible_keys


def attend_cached(
    q_BHND: torch.Tensor,
    k_BGLD: torch.Tensor,
    v_BGLD: torch.Tensor,
    patterns: Sequence[str],
    stride: int,
    first: int,
    offsets: Sequence[int] | None = None,
) -> torch.Tensor:
    """What `hybrid_attention` gives for the last N of first + N tokens.

    Args:
        q_BHND: queries of the positions first .. first + N - 1.
        k_BGLD, v_BGLD: keys and values by position; what lies behind the queries is not looked at.
        patterns: one name per query head.
        stride: as in `hybrid_attention`.
        offsets: offset of the stride for each query head, see `visible_keys`; None: 0 for all.

    Returns:
        [B, H, N, D] in the dtype of the queries.
    """
    H, N, G = q_BHND.shape[1], q_BHND.shape[2], k_BGLD.shape[1]
    assert len(patterns) == H and first + N <= k_BGLD.shape[2]
    kinds = _kinds(tuple(patterns), tuple(offsets or (0,) * H))
    different = dict.fromkeys(kinds)
    if len(different) == 1:
        return _attend_alike(q_BHND, k_BGLD, v_BGLD, kinds[0], stride, first)
    out_BHND = torch.empty_like(q_BHND)
    for kind in different:
        heads = torch.tensor([head for head in range(H) if kinds[head] == kind], device=q_BHND.device)
        # Heads picked from many get keys of their own.
        own = heads // (H // G)
        out_BHND[:, heads] = _attend_alike(q_BHND[:, heads], k_BGLD, v_BGLD, kind, stride, first, own)
    return out_BHND


@lru_cache(maxsize=256)
def _kinds(patterns: tuple[str, ...], offsets: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    """Pattern and offset of each head. Offsets that play no part must not keep heads apart."""
    pairs = zip(patterns, offsets, strict=True)
    return tuple((name, offset if PATTERNS[name].has_offset else 0) for name, offset in pairs)


def _attend_alike(
    q_BHND: torch.Tensor,
    k_BGLD: torch.Tensor,
    v_BGLD: torch.Tensor,
    kind: tuple[str, int],
    stride: int,
    first: int,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attend_cached` where all heads have one pattern and offset, `kind`; groups: key-value head of each head."""
    # Query heads that share keys lie together as rows of one product.
    q_BGNRD = q_BHND.unflatten(1, (k_BGLD.shape[1] if groups is None else len(groups), -1)).transpose(2, 3)
    found = []
    for number, q_BGRD in enumerate(q_BGNRD.unbind(2)):
        ranges = visible_keys(kind[0], first + number, stride, kind[1])
        k_BGKD, v_BGKD = (_seen(x, groups, ranges) for x in (k_BGLD, v_BGLD))
        found.append(F.scaled_dot_product_attention(q_BGRD, k_BGKD, v_BGKD).flatten(1, 2))
    return torch.stack(found, dim=2) if len(found) > 1 else found[0].unsqueeze(2)


def _seen(x_BGLD: torch.Tensor, groups: torch.Tensor | None, ranges: Sequence[range]) -> torch.Tensor:
    """The tokens of `ranges`, of all heads (None) or of `groups`; a view where it is one range of all heads."""
    pieces = [x_BGLD[:, :, keys.start : keys.stop : keys.step] for keys in ranges]
    if groups is not None:
        pieces = [piece[:, groups] for piece in pieces]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
