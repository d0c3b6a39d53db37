"""Counter-based random numbers: the value at a place depends on (seed, step, stream, index) and on nothing else.

No rank keeps a random state, so random growth is the same however the weights are divided. The mixing function is the
finaliser of MurmurHash3 on 32-bit words, applied to counter words in turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megasparse.sparsity.chunks import chunks

WORD = 0xFFFFFFFF


def random_words(indices: Tensor, *key: int) -> Tensor:
    """32 random bits per index, as int64 in [0, 2^32). indices: integers, 0 or more.

    A bijection of the low 32 bits of the indices.
    """
    words = torch.empty(indices.shape, dtype=torch.int64, device=indices.device)
    for source, target in chunks(indices, words):
        target.copy_(_hashed(source, *key)).bitwise_and_(WORD)
    return words


def random_uniform(indices: Tensor, *key: int) -> Tensor:
    """Random float32 in [0, 1), 24 bits deep."""
    return (random_words(indices, *key) >> 8).to(torch.float32) / 2**24


def random_scores(indices: Tensor, *key: int) -> Tensor:
    """Random float32 in [0, 2) that order, and tie, like ``random_uniform``, but are even over the bit patterns.

    A radix select looks at bit patterns: even ones leave it few units at the threshold.
    """
    scores = torch.empty(indices.shape, dtype=torch.float32, device=indices.device)
    for source, target in chunks(indices, scores.view(torch.int32)):
        # The upper 24 of 32 bits; the sign and the highest bit of the exponent stay 0.
        torch.bitwise_right_shift(_hashed(source, *key), 2, out=target).bitwise_and_(0x3FFFFFC0)
    return scores


def _hashed(indices: Tensor, *key: int) -> Tensor:
    """32 random bits per index, as int32: half the bytes of int64, and products that wrap around by themselves."""
    words = indices.to(torch.int32, copy=True)
    spare = torch.empty_like(words)
    for part in key:
        _mix_(words.bitwise_xor_(_signed(_mix_int(part & WORD) ^ _mix_int((part >> 32) + 1))), spare)
    if indices.dtype == torch.int64:
        words.bitwise_xor_(_mix_((indices >> 32).to(torch.int32), spare))
    return _mix_(words, spare)


def _mix_(words: Tensor, spare: Tensor) -> Tensor:
    _shift_xor_(words, 16, spare).mul_(_signed(0x85EBCA6B))
    _shift_xor_(words, 13, spare).mul_(_signed(0xC2B2AE35))
    return _shift_xor_(words, 16, spare)


def _shift_xor_(words: Tensor, shift: int, spare: Tensor) -> Tensor:
    """words ^= words >> shift, as unsigned numbers."""
    torch.bitwise_right_shift(words, shift, out=spare).bitwise_and_(WORD >> shift)
    return words.bitwise_xor_(spare)


def _signed(word: int) -> int:
    """The int32 with the bits of a 32-bit word."""
    return word - 2**32 if word >= 2**31 else word


def _mix_int(word: int) -> int:
    word ^= word >> 16
    word = (word * 0x85EBCA6B) & WORD
    word ^= word >> 13
    word = (word * 0xC2B2AE35) & WORD
    return word ^ (word >> 16)
