"""Sampling of text from a model, by plain re-evaluation of the context for each new token.

For looking at what a run has learned; there is no key-value cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megasparse.models.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    tokens_1T: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    end_token: int | None = None,
) -> torch.Tensor:
    """Continue a prompt of at least one token.

    Args:
        model: only its last `config.seq_length` tokens of context are used.
        tokens_1T: the prompt, int64 [1, T].
        max_new_tokens: tokens to add at most.
        temperature: divides the logits; 0 takes the most likely token always (greedy).
        top_k: sample among the k most likely tokens; None: all.
        top_p: sample among the fewest most likely tokens whose probabilities reach p together; None: all.
        generator: source of the random numbers, on any device; the result depends on it and the model alone.
        end_token: stop after this token; None: never.

    Returns:
        int64 [1, T + n], prompt and new tokens, n <= max_new_tokens.

    Raises:
        ValueError: the prompt is empty or not a single row, or an option is out of range.
    """
    _check_options(tokens_1T, temperature, top_k, top_p)
    for _ in range(max_new_tokens):
        context = tokens_1T[:, -model.config.seq_length :]
        # Tokens to the right change nothing to their left: attention is causal.
        padded = F.pad(context, (0, -context.shape[1] % model.token_multiple))
        logits_V = model(padded)[0, context.shape[1] - 1].float()
        token = _choose(logits_V, temperature, top_k, top_p, generator)
        tokens_1T = torch.cat((tokens_1T, token.to(tokens_1T.device).view(1, 1)), dim=1)
        if end_token is not None and token.item() == end_token:
            break
    return tokens_1T


def _choose(
    logits_V: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    if temperature == 0:
        return logits_V.argmax()
    # Sorted once, both cuts are prefixes: the k most likely, and those that the probability p is not reached before.
    probabilities, order = (logits_V / temperature).softmax(dim=0).sort(descending=True, stable=True)
    if top_k is not None:
        probabilities[top_k:] = 0
        probabilities /= probabilities.sum()
    if top_p is not None:
        before = probabilities.cumsum(0) - probabilities
        probabilities[before >= top_p] = 0
    if generator is not None:
        probabilities = probabilities.to(generator.device)
    rank = torch.multinomial(probabilities, 1, generator=generator)
    return order[rank.to(order.device)]


def _check_options(tokens_1T: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if tokens_1T.ndim != 2 or tokens_1T.shape[0] != 1 or tokens_1T.shape[1] == 0:
        raise ValueError(f"prompt: shape {tuple(tokens_1T.shape)}; legal values: [1, T] with at least one token")
    if temperature < 0:
        raise ValueError(f"temperature: {temperature} is negative; legal values: 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: {top_k} is too small; legal values: None, or 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p} is out of range; legal values: None, or above 0 and at most 1")
