"""Sampling of text from a model.

Keys and values of the tokens so far are kept, and a new token reads those that its attention patterns show to it. So a
token costs a forward pass of one token, and attention costs the active entries. A context that outgrows the model's
`seq_length` slides, and with it every position changes: from there on it is evaluated anew for each token.
Tensor names: B samples, T tokens, V entries of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F

from megasparse.layers import KeyValueCache
from megasparse.models.gpt import GPT

SMALLEST_TEMPERATURE = 1e-30
"""Below it logits divided by the temperature leave float32, where the most likely token is certain long before."""


@torch.no_grad()
def generate(
    model: GPT,
    tokens_BT: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    end_tokens: Collection[int] = (),
    num_ids: int | None = None,
    use_cache: bool = True,
) -> torch.Tensor:
    """Continue prompts of equal length, of at least one token.

    Args:
        model: only its last `config.seq_length` tokens of context are used.
        tokens_BT: the prompts, int64 [B, T].
        max_new_tokens: tokens to add at most.
        temperature: divides the logits, finite; 0 takes the most likely token always (greedy).
        top_k: sample among the k most likely tokens; None: all.
        top_p: sample among the fewest most likely tokens whose probabilities reach p together; None: all.
        generator: source of the random numbers, on any device; the result depends on it and the model alone.
        end_tokens: stop after any of these tokens; a row that ends before others is filled up with the one that ended
            it. Empty: never.
        num_ids: new tokens are below it, such as the entries of a tokenizer smaller than the model's vocabulary; None:
            all entries.
        use_cache: keep keys and values; False: evaluate the whole context for each token.

    Returns:
        int64 [B, T + n], prompts and new tokens, n <= max_new_tokens.

    Raises:
        ValueError: a prompt is empty, or an option is out of range.
    """
    if tokens_BT.ndim != 2 or tokens_BT.numel() == 0:
        raise ValueError(f"prompt: shape {tuple(tokens_BT.shape)}; must be [B, T] with at least one token each")
    check_sampling(temperature, top_k, top_p)
    evaluate = LastLogits(model, tokens_BT.shape[1] + max_new_tokens, use_cache)
    ends = torch.tensor(sorted(end_tokens), dtype=torch.int64, device=tokens_BT.device)
    ended_B = torch.zeros(len(tokens_BT), dtype=torch.bool, device=tokens_BT.device)
    for _ in range(max_new_tokens):
        logits_BV = evaluate(tokens_BT)[:, :num_ids]
        chosen_B = choose(logits_BV, temperature, top_k, top_p, generator).to(tokens_BT.device)
        chosen_B = torch.where(ended_B, tokens_BT[:, -1], chosen_B)
        ended_B |= torch.isin(chosen_B, ends)
        tokens_BT = torch.cat((tokens_BT, chosen_B.unsqueeze(1)), dim=1)
        if ended_B.all():
            break
    return tokens_BT


class LastLogits:
    """The logits of the last token of a text that grows from call to call, float32 [B, V].

    max_tokens: length that the text may reach. use_cache: keep keys and values as long as the text fits into the
    model's `seq_length`.
    """

    def __init__(self, model: GPT, max_tokens: int, use_cache: bool = True) -> None:
        self.model, self.seq_length, self._multiple = model, model.config.seq_length, model.token_multiple
        capacity = min(max_tokens + self._multiple, self.seq_length)
        self._cache = KeyValueCache(model.config.num_layers, capacity) if use_cache else None

    def __call__(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        T, start = tokens_BT.shape[1], 0 if self._cache is None else self._cache.length
        assert start < T, f"{start} tokens are known already"
        if self._cache is None or start + self._padded(T - start) > self.seq_length:
            # The context slides, or the padding would not fit.
            self._cache, start = None, max(T - self.seq_length, 0)
        new = T - start
        # Tokens to the right change nothing to their left: attention is causal.
        padded = F.pad(tokens_BT[:, start:], (0, self._padded(new) - new))
        if self._multiple == 1:
            logits_BTV = self.model(padded, cache=self._cache, last_only=True)
        else:
            logits_BTV = self.model(padded, cache=self._cache)[:, new - 1 :]
        if self._cache is not None:
            self._cache.advance(new)
        return logits_BTV[:, 0].float()

    def _padded(self, num_tokens: int) -> int:
        return num_tokens + -num_tokens % self._multiple


def choose(
    logits_BV: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """A token for each row of logits, int64 [B], drawn as ``generate`` does it; the cuts are named there."""
    if temperature < SMALLEST_TEMPERATURE:
        return logits_BV.argmax(dim=1)
    # Clients say 1 where they mean all tokens, whose order does not matter.
    top_p = None if top_p == 1 else top_p
    probabilities, order = (logits_BV / temperature).softmax(dim=1), None
    # In order both cuts are prefixes: the k most likely, and those that the probability p is not reached before. To
    # sort a vocabulary of 50,000, and to draw among all of it, takes longer than a small model.
    if top_k is not None and top_k < probabilities.shape[1]:
        probabilities, order = probabilities.topk(top_k, dim=1)
        probabilities /= probabilities.sum(dim=1, keepdim=True)
    elif top_p is not None:
        probabilities, order = probabilities.sort(dim=1, descending=True, stable=True)
    if top_p is not None:
        before = probabilities.cumsum(dim=1) - probabilities
        probabilities[before >= top_p] = 0
    if generator is not None:
        probabilities = probabilities.to(generator.device)
    rank = torch.multinomial(probabilities, 1, generator=generator)
    rank = rank.to(logits_BV.device)
    return (rank if order is None else order.gather(1, rank)).squeeze(1)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for an option of ``generate`` that is out of range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: {temperature}; must be 0 (greedy) or more, and finite")
    if top_k is not None and not (top_k >= 1 and top_k == int(top_k)):
        raise ValueError(f"top_k: {top_k}; must be unset (all tokens), or a whole number of at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p}; must be unset (all tokens), or above 0 and at most 1")
