"""Text from a model: what a run shows at its end, and what ``launch/generate.py`` prints."""

from __future__ import annotations

import torch

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
) -> str:
    """Prompt and continuation, up to the end of the document or `num_tokens`.

    The text depends on the model and these arguments alone. Raises ValueError for an option that is out of range.
    """
    # An empty prompt means the beginning of a document.
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.end_of_document_id]
    out = generate(
        model,
        torch.tensor([prompt_ids], device=next(model.parameters()).device),
        num_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator().manual_seed(seed),
        end_token=tokenizer.end_of_document_id,
    )
    return tokenizer.decode(out[0].tolist())
