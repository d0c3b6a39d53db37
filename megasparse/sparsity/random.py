"""Counter-based random numbers: the value at a place depends on (seed, step, stream, index) and on nothing else.

No rank keeps a random state, so random growth is the same however the weights are divided. The mixing function is the
finaliser of MurmurHash3 on 32-bit words, applied to counter words in turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


# Indices per pass on the CPU: the mixing makes some sixty passes over its words, which must stay in the cache.
CHUNK = 2**15


def random_words(indices: Tensor, *key: int) -> Tensor:
    """32 random bits per index, as int64 in [0, 2^32). indices: int64, 0 or more; a bijection of its low 32 bits."""
    if indices.device.type != "cpu" or indices.numel() <= CHUNK:
        return _random_words(indices, *key)
    words = torch.empty_like(indices)
    for source, target in zip(indices.split(CHUNK), words.split(CHUNK), strict=True):
        target.copy_(_random_words(source, *key))
    return words


def random_uniform(indices: Tensor, *key: int) -> Tensor:
    """Random float32 in [0, 1), 24 bits deep."""
    return (random_words(indices, *key) >> 8).to(torch.float32) / 2**24


def _random_words(indices: Tensor, *key: int) -> Tensor:
    words = indices & WORD
    for part in key:
        words = _mix(words ^ (_mix_int(part & WORD) ^ _mix_int((part >> 32) + 1)))
    return _mix(words ^ _mix(indices >> 32))


def _mix(words: Tensor) -> Tensor:
    words = words ^ (words >> 16)
    words = (words * 0x85EBCA6B) & WORD
    words = words ^ (words >> 13)
    words = (words * 0xC2B2AE35) & WORD
    return words ^ (words >> 16)


def _mix_int(word: int) -> int:
    word ^= word >> 16
    word = (word * 0x85EBCA6B) & WORD
    word ^= word >> 13
    word = (word * 0xC2B2AE35) & WORD
    return word ^ (word >> 16)
