"""Counter-based random numbers: the value at a place depends on (seed, step, stream, index) and on nothing else.

No rank keeps a random state, so random growth is the same however the weights are divided. The mixing function is the
finaliser of MurmurHash3 on 32-bit words, applied to counter words in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from megasparse.sparsity.chunks import chunks

WORD = 0xFFFFFFFF

Words = TypeVar("Words", np.ndarray, Tensor)


def random_words(indices: Tensor, *key: int) -> Tensor:
    """32 random bits per index, as int64 in [0, 2^32). indices: integers, 0 or more.

    A bijection of the low 32 bits of the indices.
    """
    words = torch.empty(indices.shape, dtype=torch.int64, device=indices.device)
    for source, target in chunks(indices, words):
        target.copy_(_hashed(source, *key)).bitwise_and_(WORD)
    return words


def random_scores(indices: Tensor, *key: int) -> Tensor:
    """Random float32 in [0, 2) that order, and tie, like the upper 24 bits of ``random_words``: even over bit patterns.

    A radix select looks at bit patterns: even ones leave it few units at the threshold.
    """
    # Made as integers: while a model is built at ZeRO stage 3, DeepSpeed turns new floats into the model's dtype.
    bits = torch.empty(indices.shape, dtype=torch.int32, device=indices.device)
    for source, target in chunks(indices, bits):
        # The upper 24 of 32 bits; the sign and the highest bit of the exponent stay 0.
        target.copy_((_hashed(source, *key) >> 2) & 0x3FFFFFC0)
    return bits.view(torch.float32)


def _hashed(indices: Tensor, *key: int) -> Tensor:
    """32 random bits per index: the low ones of int32 or int64."""
    if indices.device.type != "cpu":
        indices = indices.to(torch.int64)
        return _mixed_with_key(indices & WORD, indices >> 32, key)
    # Unsigned words of 32 bits, which torch cannot shift, are half the bytes.
    words = indices.numpy().astype(np.uint32)
    high = (indices >> 32).numpy().astype(np.uint32) if indices.dtype == torch.int64 else None
    return torch.from_numpy(_mixed_with_key(words, high, key).view(np.int32))


def _mixed_with_key(words: Words, high: Words | None, key: Sequence[int]) -> Words:
    """high: the upper words of the indices; None: they are 0."""
    for part in key:
        words ^= _mix_int(part & WORD) ^ _mix_int((part >> 32) + 1)
        _mix_(words)
    if high is not None:
        words ^= _mix_(high)
    return _mix_(words)


def _mix_(words: Words) -> Words:
    """In place, on numpy's uint32 or torch's int64."""
    words ^= words >> 16
    words *= 0x85EBCA6B
    words &= WORD
    words ^= words >> 13
    words *= 0xC2B2AE35
    words &= WORD
    words ^= words >> 16
    return words


def _mix_int(word: int) -> int:
    word ^= word >> 16
    word = (word * 0x85EBCA6B) & WORD
    word ^= word >> 13
    word = (word * 0xC2B2AE35) & WORD
    return word ^ (word >> 16)
