"""The section `task`: a supervised task on which a model is measured while it is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megasparse.config.section import PositiveInt, Section


class TaskConfig(Section):
    path: str | None = None
    """JSON lines of `prompt` and `response`, measured at each validation (`task_accuracy`); unset: no task. Needs
    data.tokenizer."""
    kind: Literal["classification", "answer"] = "answer"
    """classification: the response that is likeliest among `choices` must be the right one; answer: the greedy answer
    must be the right one, or what stands behind its last `marker`."""
    choices: Annotated[list[str], Field(min_length=2)] | None = None
    """classification: responses that compete, each with the end of its document; unset: all that occur in the file."""
    marker: str | None = None
    """answer: text before the result, as `####` in GSM8K; the rest of the line behind its last occurrence counts, white
    space around it aside. Unset: the whole answer."""
    max_tokens: PositiveInt = 256
    """answer: longest answer; what has not ended by then is wrong unless its result stands there already."""
    limit: PositiveInt | None = None
    """Only the first so many examples; unset: all."""
    batch_size: PositiveInt = 16
    """Responses or answers at once on a rank; another number changes rounding."""

    @model_validator(mode="after")
    def _belongs_to_the_kind(self) -> TaskConfig:
        if self.choices is not None and self.kind != "classification":
            raise ValueError(f"choices: {self.choices} need kind classification, not {self.kind}; must be unset")
        if self.choices is not None and len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices: {self.choices} name one twice; must be different ones")
        if self.choices is not None and not all(self.choices):
            raise ValueError(f"choices: {self.choices} hold an empty one; must be texts")
        if self.marker is not None and (self.kind != "answer" or not self.marker.strip()):
            raise ValueError(f"marker: {self.marker!r}; must be unset, or a text with kind answer")
        return self
