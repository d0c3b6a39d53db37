"""Torch's generator for CPUs, far along its sequence, without the numbers before.

    generator = generator_at(seed, position)          # as manual_seed(seed) after `position` draws of 32 bits

A rank that holds a part of a parameter draws that part: 70 billion numbers take a thread 12 minutes.
The generator is the Mersenne Twister (Matsumoto and Nishimura 1998), which is linear over the field of two elements:
its state after n draws is a sum of the states after the draws i for which t^n modulo its characteristic polynomial has
the term t^i (Haramoto et al. 2008). Polynomials are integers here, of which bit i is the term t^i.
"""

from __future__ import annotations

from functools import cache, reduce

import numpy as np
import torch

N, M = 624, 397
MATRIX, UPPER, LOWER = 0x9908B0DF, 0x80000000, 0x7FFFFFFF
DEGREE = 19937
DISCARDED_AT_MOST = 2**20
"""So many draws take less time than a jump."""
STATE_OFFSET = 24
"""Bytes of the seed and of the place among the words, before the words, in torch's state of a generator."""


def generator_at(seed: int, position: int, discarded_at_most: int = DISCARDED_AT_MOST) -> torch.Generator:
    """The generator of a seed after `position` draws of 32 bits, such as float32 in [0, 1) take one each."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    if position <= discarded_at_most:
        torch.rand(position, generator=generator, dtype=torch.float32, device="cpu")
        return generator
    state = generator.get_state()
    # 64 bits for each word of 32.
    words = state[STATE_OFFSET : STATE_OFFSET + 8 * N].view(torch.int64)
    words.copy_(torch.from_numpy(_jumped(words.numpy().astype(np.uint32), position).astype(np.int64)))
    # As after the seed: the next draw makes new words from these.
    generator.set_state(state)
    return generator


def _jumped(words: np.ndarray, position: int) -> np.ndarray:
    """Words [position, position + N) of the sequence that begins with N words. position: 1 or more."""
    # Of word 0 the lower bits are never used, so that they are no part of the state: begin after it.
    power = _power(position - 1)
    sequence = _continued(words, 1 + DEGREE + N)[1:]
    terms = np.flatnonzero(np.unpackbits(_bytes(power), bitorder="little"))
    found = np.zeros(N, dtype=np.uint32)
    for some in np.array_split(terms, 8):
        found ^= np.bitwise_xor.reduce(np.lib.stride_tricks.sliding_window_view(sequence, N)[some], axis=0)
    return found


def _continued(words: np.ndarray, count: int) -> np.ndarray:
    """The first `count` words of the sequence, before tempering."""
    sequence = np.empty(count, dtype=np.uint32)
    sequence[:N] = words
    at = N
    while at < count:
        # A word needs the one N - M before it, so that so many can be made at once.
        some = min(N - M, count - at)
        old = sequence[at - N : at - N + some + 1]
        mixed = (old[:-1] & UPPER) | (old[1:] & LOWER)
        sequence[at : at + some] = sequence[at - N + M : at - N + M + some] ^ (mixed >> 1) ^ ((mixed & 1) * MATRIX)
        at += some
    return sequence


@cache
def _power(exponent: int) -> int:
    """t^exponent modulo the characteristic polynomial."""
    power = 1
    for bit in bin(exponent)[2:]:
        power = _remainder(_square(power) << int(bit))
    return power


def _remainder(polynomial: int) -> int:
    low, terms = (1 << DEGREE) - 1, _lower_terms()
    while high := polynomial >> DEGREE:
        polynomial &= low
        for term in terms:
            polynomial ^= high << term
    return polynomial


def _square(polynomial: int) -> int:
    """Terms do not mix: those of the square are twice as far apart."""
    return int.from_bytes(_spread_bytes()[_bytes(polynomial)].tobytes(), "little")


def _bytes(polynomial: int) -> np.ndarray:
    return np.frombuffer(polynomial.to_bytes(polynomial.bit_length() // 8 + 1, "little"), dtype=np.uint8)


@cache
def _spread_bytes() -> np.ndarray:
    """For each byte its bits with a 0 after each, little-endian."""
    return np.array([sum((byte >> bit & 1) << 2 * bit for bit in range(8)) for byte in range(256)], dtype="<u2")


@cache
def _lower_terms() -> tuple[int, ...]:
    """Exponents of the characteristic polynomial but for its degree (the paper's appendix A.1)."""
    one, other = (1 << N) | (1 << M), (1 << N - 1) | (1 << M - 1)
    powers = [1]
    for _ in range(31):
        powers.append(_product(powers[-1], other))
    terms = [_product(one, powers[31])]
    terms += [_product(one, powers[30 - bit]) for bit in range(31) if MATRIX >> bit & 1]
    terms += [1] if MATRIX >> 31 & 1 else []
    polynomial = reduce(int.__xor__, terms)
    assert polynomial.bit_length() == DEGREE + 1, polynomial.bit_length()
    return tuple(term for term in range(DEGREE) if polynomial >> term & 1)


def _product(polynomial: int, other: int) -> int:
    found = 0
    for term in range(other.bit_length()):
        if other >> term & 1:
            found ^= polynomial << term
    return found
