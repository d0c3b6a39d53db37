"""Text from a model: what a run shows at its end, and what ``launch/generate.py`` prints."""

from __future__ import annotations

from collections.abc import Collection

import torch

from megasparse.config.loader import ConfigError
from megasparse.data.tokenizer import Tokenizer
from megasparse.inference.generation import generate
from megasparse.models.gpt import GPT


def sample_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int,
    *,
    seed: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    end_tokens: Collection[int] | None = None,
    begin_token: int | None = None,
) -> str:
    """Prompt and continuation, up to the end of the document or `num_tokens`.

    end_tokens: those that end a text, which are not shown; begin_token: what an empty prompt means, the beginning of a
    document. None: the tokenizer's end of a document, for either. Only tokens that the tokenizer has are drawn. The
    text depends on the model and these arguments alone. Raises ValueError for an option that is out of range, and for a
    prompt that the model cannot read as a whole.
    """
    end = tokenizer.end_of_document_id
    ends = {end} if end_tokens is None else set(end_tokens)
    prompt_ids = tokenizer.encode(prompt) or [end if begin_token is None else begin_token]
    check_prompt("prompt", len(prompt_ids), model.config.seq_length)
    out = generate(
        model,
        torch.tensor([prompt_ids], device=next(model.parameters()).device),
        num_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator().manual_seed(seed),
        end_tokens=ends,
        num_ids=tokenizer.vocab_size,
    )
    tokens = out[0].tolist()
    shown = tokens[:-1] if len(tokens) > len(prompt_ids) and tokens[-1] in ends else tokens
    return tokenizer.decode(shown)


def check_prompt(field: str, num_tokens: int, seq_length: int) -> None:
    """Raise ConfigError for a prompt that is longer than the context: its beginning would not be read."""
    if num_tokens > seq_length:
        raise ConfigError(f"{field}: {num_tokens:,} tokens; must be at most {seq_length:,}, the model's seq_length")
