"""Random words and top-k written down plainly, for the references of several tests: unsigned integers, one big sort."""

from __future__ import annotations

import numpy as np


def hashed(indices: np.ndarray, *key: int) -> np.ndarray:
    """32 random bits per index: MurmurHash3's finaliser over the words of the key, on unsigned 32-bit numbers."""

    def mix(word: np.ndarray) -> np.ndarray:
        word = word ^ (word >> np.uint32(16))
        word = word * np.uint32(0x85EBCA6B)
        word = word ^ (word >> np.uint32(13))
        word = word * np.uint32(0xC2B2AE35)
        return word ^ (word >> np.uint32(16))

    def word(number: int) -> np.ndarray:
        return np.array([number & 0xFFFFFFFF], dtype=np.uint32)

    words = indices.astype(np.uint32)
    for part in key:
        words = mix(words ^ mix(word(part)) ^ mix(word((part >> 32) + 1)))
    return mix(words ^ mix((indices.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)))


def best(score: np.ndarray, tie: np.ndarray, allowed: np.ndarray, count: int) -> np.ndarray:
    """Bool: the `count` highest scores among the allowed ones, equal ones by the higher tie word."""
    order = np.lexsort((tie, score))
    order = order[allowed[order]]
    chosen = np.zeros(score.shape, dtype=bool)
    chosen[order[len(order) - count :]] = True
    return chosen
