"""Counter-based random numbers: known values, a bijection, even, and independent of how indices are cut."""

from __future__ import annotations

import torch

from megasparse.sparsity.random import _mixed_with_key, random_scores, random_words


def plain_word(index: int, *key: int) -> int:
    """The same numbers with Python's own integers."""

    def mix(word: int) -> int:
        word ^= word >> 16
        word = word * 0x85EBCA6B % 2**32
        word ^= word >> 13
        word = word * 0xC2B2AE35 % 2**32
        return word ^ (word >> 16)

    word = index % 2**32
    for part in key:
        word = mix(word ^ mix(part % 2**32) ^ mix((part >> 32) + 1))
    return mix(word ^ mix(index >> 32))


def random_uniform(indices: torch.Tensor, *key: int) -> torch.Tensor:
    """Numbers in [0, 1) of the upper 24 bits of the words."""
    return (random_words(indices, *key) >> 8).to(torch.float32) / 2**24


def test_words_equal_plain_integer_arithmetic() -> None:
    indices = torch.tensor([0, 1, 2, 12345, 2**31, 2**32 - 1, 2**32, 2**40 + 7])
    for key in [(1234, 100, 7, 2), (0,), (2**40 + 3, 5)]:
        expected = [plain_word(int(i), *key) for i in indices]
        assert random_words(indices, *key).tolist() == expected
        # As on devices, where words are int64.
        assert _mixed_with_key(indices & (2**32 - 1), indices >> 32, key).tolist() == expected


def test_narrow_indices_give_the_same_words() -> None:
    indices = torch.cat([torch.arange(70_000), torch.tensor([2**31 - 1])])
    assert torch.equal(random_words(indices.to(torch.int32), 3, 2**40), random_words(indices, 3, 2**40))


def test_scores_have_the_order_and_the_ties_of_uniform_numbers() -> None:
    indices = torch.arange(2**17)
    scores, uniform = random_scores(indices, 1, 2), random_uniform(indices, 1, 2)
    assert scores.dtype == torch.float32 and 0.0 <= float(scores.min()) and float(scores.max()) < 2.0
    order = scores.sort(stable=True).indices
    assert torch.equal(order, uniform.sort(stable=True).indices)
    in_order, uniform_in_order = scores[order], uniform[order]
    ties = uniform_in_order.diff() == 0
    assert torch.equal(in_order.diff() == 0, ties) and ties.any()


def test_murmur_finaliser_has_its_known_value() -> None:
    """fmix32(1) = 0x514E28B7, fmix32(0) = 0: published test values; with no key only the finaliser is left."""
    assert random_words(torch.tensor([0, 1])).tolist() == [0, 0x514E28B7]


def test_words_are_a_bijection_of_32_bits() -> None:
    indices = torch.cat([torch.arange(2**20), torch.randint(2**20, 2**32, (2**20,)).unique()])
    words = random_words(indices, 17, 3, 99, 1)
    assert words.unique().numel() == indices.numel()
    assert int(words.min()) >= 0 and int(words.max()) < 2**32


def test_numbers_are_even_and_uncorrelated() -> None:
    n = 2**18
    uniform = random_uniform(torch.arange(n), 5, 200, 31, 2)
    assert uniform.dtype == torch.float32 and 0.0 <= float(uniform.min()) and float(uniform.max()) < 1.0
    counts = torch.histc(uniform, bins=64, min=0.0, max=1.0)
    # Chi-squared with 63 degrees of freedom: mean 63, standard deviation 11; six of them.
    assert float(((counts - n / 64) ** 2 / (n / 64)).sum()) < 63 + 6 * 11.3
    for other in (
        uniform.roll(1),
        random_uniform(torch.arange(n), 5, 200, 31, 3),
        random_uniform(torch.arange(n), 5, 201, 31, 2),
        random_uniform(torch.arange(n), 6, 200, 31, 2),
    ):
        correlation = torch.corrcoef(torch.stack([uniform.double(), other.double()]))[0, 1]
        assert abs(float(correlation)) < 6 / n**0.5


def test_numbers_do_not_depend_on_the_cut() -> None:
    indices = torch.arange(1000)
    whole = random_words(indices, 1, 2, 3)
    pieces = [random_words(piece, 1, 2, 3) for piece in indices.split([1, 500, 0, 250, 249])]
    assert torch.equal(whole, torch.cat(pieces))
    order = torch.randperm(1000)
    assert torch.equal(whole[order], random_words(indices[order], 1, 2, 3))


def test_scores_do_not_depend_on_how_new_floats_are_made(monkeypatch) -> None:
    """While a model is built at ZeRO stage 3, DeepSpeed turns new floating tensors into the model's dtype."""
    indices, make = torch.arange(100), torch.empty
    expected = random_scores(indices, 3)

    def as_deepspeed(*size, **options) -> torch.Tensor:
        made = make(*size, **options)
        return made.to(torch.bfloat16) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", as_deepspeed)
    assert torch.equal(random_scores(indices, 3), expected)
