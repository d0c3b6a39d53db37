"""Greedy answers to prompts of different lengths, several at once, on ranks that may hold pieces of the weights.

answers = greedy_answers(model, [[72, 105], [72]], 100, end=256)        # [(tokens, whether it has ended), ...]

A batch begins where its shortest prompt ends: where a row has a token of its prompt left, that is taken instead of the
likeliest one. So all rows stand at the same position, and keys and values are kept without padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megasparse.inference.generation import LastLogits
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup


@torch.no_grad()
def greedy_answers(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    end: int,
    num_ids: int | None = None,
    ranks: CommunicationGroup | None = None,
    ranks_device: torch.device | str = "cpu",
) -> list[tuple[list[int], bool]]:
    """Tokens of each answer without the end token, and whether it came.

    Args:
        model: in evaluation mode.
        prompts: of 1 to seq_length - 1 tokens; an empty list on a rank that has none while others have some.
        max_tokens: of an answer; one also ends where the model's seq_length is full.
        end: the token that ends an answer.
        num_ids: answers hold ids below it; None: all of the vocabulary.
        ranks: all of which call it, and go on until the last has ended: a model in pieces is put together in each
            forward pass.
        ranks_device: of tensors that their collectives take.
    """
    ranks, device, seq_length = ranks or CommunicationGroup(), next(model.parameters()).device, model.config.seq_length
    assert all(1 <= len(prompt) < seq_length for prompt in prompts), [len(prompt) for prompt in prompts]
    # A rank without prompts goes along with one of its own, whose answer nobody wants.
    asked = [list(prompt) for prompt in prompts] or [[end]]
    lengths = [len(prompt) for prompt in asked]
    stops = [min(length + max_tokens, seq_length) if prompts else length for length in lengths]
    tokens_BT = torch.zeros(len(asked), max(stops), dtype=torch.int64)
    for row, prompt in zip(tokens_BT, asked, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    tokens_BT = tokens_BT.to(device)
    prompt_B, stop_B = (torch.tensor(values, device=device) for values in (lengths, stops))
    end_B = stop_B.clone()
    evaluate, position = LastLogits(model, max(stops)), min(lengths)
    while _any(position < int(end_B.max()), ranks, ranks_device):
        if position >= int(end_B.max()):
            # Others go on.
            model(tokens_BT[:1, :1].expand(1, model.token_multiple))
            continue
        chosen_B = evaluate(tokens_BT[:, :position])[:, :num_ids].argmax(1)
        is_answer_B = (prompt_B <= position) & (position < end_B)
        tokens_BT[is_answer_B, position] = chosen_B[is_answer_B]
        end_B = torch.where(is_answer_B & (chosen_B == end), position, end_B)
        position += 1
    rows = zip(tokens_BT.tolist(), lengths, end_B.tolist(), stops, strict=True)
    answers = [(row[start:stop], stop < limit) for row, start, stop, limit in rows]
    return answers if prompts else []


def _any(flag: bool, ranks: CommunicationGroup, device: torch.device | str) -> bool:
    return flag if ranks.size == 1 else ranks.sum_(torch.tensor(int(flag), device=device)).item() > 0
