"""The model that a server offers: its name, and how the prompts of requests become tokens.

served = open_served(Path("models/gpt2-50"))
served.prompts("Once upon")                 # [[7454, 2402]]
served.conversation([{"role": "user", "content": "2 + 2?"}])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megasparse.data.chat import load_template
from megasparse.data.supervised import ExampleEncoder, ExampleOptions
from megasparse.inference.trained import TrainedModel, open_trained
from megasparse.serving.errors import RequestError


@dataclass(frozen=True)
class Served:
    """name: what clients call the model. chat: encodes conversations; None, and why not."""

    name: str
    trained: TrainedModel
    chat: ExampleEncoder | None = None
    no_chat: str = "the model's tokenizer has no chat template"

    @property
    def context(self) -> int:
        """Tokens that the model reads at most."""
        return self.trained.config.model.seq_length

    @property
    def end_tokens(self) -> tuple[int, ...]:
        own = self.trained.end_tokens
        return (self.trained.tokenizer.end_of_document_id,) if own is None else own

    def prompts(self, prompt: Any) -> list[list[int]]:
        """Token ids of the prompts of a completion: one, or one for each of a list.

        An empty text, or none, is the beginning of a document. Raises RequestError for what is no prompt.
        """
        if prompt is None or isinstance(prompt, str):
            return [self._encoded(prompt or "")]
        if _is_list_of(prompt, str):
            return [self._encoded(text) for text in prompt]
        if _is_list_of(prompt, int):
            return [self._checked(prompt)]
        if isinstance(prompt, list) and prompt and all(_is_list_of(ids, int) for ids in prompt):
            return [self._checked(ids) for ids in prompt]
        raise RequestError(
            f"prompt: {prompt!r:.80}; must be text, a list of texts, token ids, or a list of lists of token ids",
            param="prompt",
            code="invalid_value",
        )

    def conversation(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a chat up to the answer. Raises RequestError where there is no template, or it refuses."""
        if self.chat is None:
            message = f"{self.no_chat}; must be asked at /v1/completions"
            raise RequestError(message, param="messages", code="no_chat_template")
        if not messages:
            raise RequestError("messages: must be at least one", param="messages", code="invalid_value")
        for number, entry in enumerate(messages):
            if unknown := set(entry) - {"role", "content"}:
                what = f"messages[{number}]: {sorted(unknown)[0]}: this server knows role and content only"
                raise RequestError(what, param="messages", code="unknown_parameter")
        try:
            return self.chat.prompt(messages)
        except ValueError as error:
            raise RequestError(f"messages: {error}", param="messages", code="invalid_value") from None

    def _encoded(self, text: str) -> list[int]:
        if any("\ud800" <= character <= "\udfff" for character in text):
            message = "prompt: holds half of a surrogate pair, which is no character; must be text"
            raise RequestError(message, param="prompt", code="invalid_value")
        begin = self.trained.begin_token
        beginning = self.trained.tokenizer.end_of_document_id if begin is None else begin
        return self.trained.tokenizer.encode(text) or [beginning]

    def _checked(self, ids: list[int]) -> list[int]:
        entries = self.trained.model.vocab_size
        wrong = next((token for token in ids if not 0 <= token < entries), None)
        if wrong is not None:
            message = f"prompt: token id {wrong}; must be 0 to {entries - 1}"
            raise RequestError(message, param="prompt", code="invalid_value")
        return list(ids)


def open_served(folder: Path, name: str | None = None, device: torch.device | str = "cpu") -> Served:
    """Open a model folder, or a run at its newest good checkpoint. Raises ValueError naming what is missing.

    name: for clients; None: the folder's.
    """
    trained = open_trained(folder, device=device)
    name = name or folder.resolve().name
    path, tokenizer = trained.config.data.tokenizer_path, trained.tokenizer
    if path is None:
        return Served(name, trained)
    special: dict[str, int] = getattr(tokenizer, "special_tokens", {})
    try:
        template = load_template(path, list(special))
    except ValueError as error:
        return Served(name, trained, no_chat=f"the model's chat template cannot be used: {error}")
    if template is None:
        return Served(name, trained)
    return Served(name, trained, ExampleEncoder(tokenizer, ExampleOptions(), template, special))


def _is_list_of(value: Any, kind: type) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in value)
    )
