"""How often a model is right on a supervised task: responses that compete, or answers that it writes itself.

    task = open_task(config.task, tokenizer, seq_length)
    results = task.measure(model, Asking(batch_size=16, ranks=ranks))        # {"accuracy": 0.87, "examples": 872, ...}

The input holds JSON lines of `prompt` and `response`, as ``tools/preprocess_data.py --supervised`` takes them, and is
encoded in the same way, so that a model is asked exactly as it was taught. Batches are composed before they are dealt
to the ranks, so the results do not depend on the number of ranks. Where ranks hold pieces of the weights (ZeRO stage 3)
all of them make as many forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megasparse.config.loader import ConfigError
from megasparse.config.task import TaskConfig
from megasparse.data.supervised import ExampleEncoder, ExampleOptions
from megasparse.data.tokenizer import Tokenizer
from megasparse.evaluation.inputs import check_unicode, read_jsonl
from megasparse.evaluation.scoring import Scorer
from megasparse.evaluation.windows import Window
from megasparse.inference.greedy import greedy_answers
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup

MAX_CHOICES = 64
"""Different responses of a file that names no choices; a file with more is hardly one of classes."""

Advance = Callable[[int, int], None]
Examples = Iterable[tuple[str, dict[str, Any]]]
"""(place in the input, JSON object)."""


@dataclass(frozen=True)
class Asking:
    """How a model is asked."""

    batch_size: int
    """Responses or answers at once on a rank."""
    ranks: CommunicationGroup = CommunicationGroup()
    """Those that share the examples."""
    ranks_device: torch.device | str = "cpu"
    """Of tensors that their collectives take."""
    advance: Advance = lambda done, total: None
    """Told batches that are done, and their number."""


@dataclass(frozen=True)
class ClassificationTask:
    """Whether the right response is the likeliest, its end of the document counted; of equal ones the first."""

    windows: list[Window]
    """Those of all choices of the first example, of the second, ..."""
    choices: list[str]
    labels: list[int]
    settings: dict[str, Any] = field(default_factory=dict)

    def measure(self, model: GPT, asking: Asking) -> dict[str, Any]:
        """Raises ArithmeticError where a log-likelihood is not finite."""
        scorer = Scorer(
            model,
            batch_size=asking.batch_size,
            ranks=asking.ranks,
            advance=asking.advance,
            together=True,
            ranks_device=asking.ranks_device,
        )
        return self.results(scorer.scores(self.windows))

    def results(self, scores: np.ndarray) -> dict[str, Any]:
        """scores: as of ``Scorer``, float64 [windows, 2]."""
        likelihoods = scores[:, 0].reshape(len(self.labels), len(self.choices))
        right = likelihoods.argmax(1) == np.array(self.labels)
        counts = np.bincount(self.labels, minlength=len(self.choices))
        return {
            "accuracy": float(right.mean()),
            "examples": len(self.labels),
            "largest_class": float(counts.max() / len(self.labels)),
        }


@dataclass(frozen=True)
class AnswerTask:
    """Whether the greedy answer, or what stands behind its last marker, is the right one."""

    prompts: list[list[int]]
    results_wanted: list[str]
    tokenizer: Tokenizer
    marker: str | None
    max_tokens: int
    settings: dict[str, Any] = field(default_factory=dict)

    def measure(self, model: GPT, asking: Asking) -> dict[str, Any]:
        ranks, batch_size = asking.ranks, asking.batch_size
        # Prompts of about the same length go together: a batch begins where its shortest ends.
        order = sorted(range(len(self.prompts)), key=lambda index: (-len(self.prompts[index]), index))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        rounds = -(-len(batches) // ranks.size)
        right = ended = 0
        for number in range(rounds):
            place = number * ranks.size + ranks.rank
            batch = batches[place] if place < len(batches) else []
            answers = greedy_answers(
                model,
                [self.prompts[index] for index in batch],
                self.max_tokens,
                end=self.tokenizer.end_of_document_id,
                num_ids=self.tokenizer.vocab_size,
                ranks=ranks,
                ranks_device=asking.ranks_device,
            )
            for index, (tokens, has_ended) in zip(batch, answers, strict=True):
                text = result_of(self.tokenizer.decode(tokens), self.marker)
                is_whole = has_ended or self.marker is not None
                right += is_whole and text == self.results_wanted[index]
                ended += has_ended
            asking.advance(number + 1, rounds)
        right, ended = ranks.sum_(torch.tensor([right, ended], device=asking.ranks_device)).tolist()
        examples = len(self.prompts)
        return {"accuracy": right / examples, "examples": examples, "ended": ended / examples}


SupervisedTask = ClassificationTask | AnswerTask
"""``measure`` gives the same results on all ranks, which all call it, with a model in evaluation mode."""


def result_of(answer: str, marker: str | None) -> str | None:
    """What counts of an answer, without white space around it; None: the marker is not there."""
    if marker is None:
        return answer.strip()
    _, found, behind = answer.rpartition(marker)
    return behind.split("\n")[0].strip() if found else None


def open_task(
    config: TaskConfig, tokenizer: Tokenizer | None, seq_length: int, *, option: str = "task.path"
) -> SupervisedTask:
    """Read and encode. Raises ConfigError with field or line for what cannot be asked so. option: for messages."""
    assert config.path is not None
    if tokenizer is None:
        raise ConfigError(f"{option}: {config.path} is text, and data.tokenizer is unset; must be set, or no task")
    examples = read_jsonl(config.path, config.limit, option=option)
    if config.kind == "classification":
        return classification_task(examples, tokenizer, seq_length, config.choices)
    return answer_task(examples, tokenizer, seq_length, config.marker, config.max_tokens)


def classification_task(
    examples: Examples, tokenizer: Tokenizer, seq_length: int, choices: Sequence[str] | None = None
) -> ClassificationTask:
    """choices: None: all responses that occur, in alphabetical order."""
    asked = [(where, *_texts(record, where)) for where, record in examples]
    competing = sorted({response for _, _, response in asked}) if choices is None else list(choices)
    if not 2 <= len(competing) <= MAX_CHOICES:
        raise ConfigError(
            f"task.choices: unset, and the responses are {len(competing)} different ones, beginning with "
            f"{competing[:3]}; must be named, or a file with 2 to {MAX_CHOICES}"
        )
    encode, windows, labels = ExampleEncoder(tokenizer, ExampleOptions()), list[Window](), []
    for where, prompt, response in asked:
        if response not in competing:
            raise ConfigError(f"{where}: response: {response!r}; must be one of task.choices, {competing}")
        labels.append(competing.index(response))
        for choice in competing:
            tokens, first = _encoded(encode, prompt, choice, where)
            if len(tokens) > seq_length + 1:
                raise ConfigError(
                    f"{where}: prompt with response {choice!r} has {len(tokens)} tokens; must be at most "
                    f"{seq_length + 1} with a model.seq_length of {seq_length}"
                )
            windows.append(Window(tokens.astype(np.int64), first))
    return ClassificationTask(windows, competing, labels, {"choices": competing})


def answer_task(
    examples: Examples, tokenizer: Tokenizer, seq_length: int, marker: str | None = None, max_tokens: int = 256
) -> AnswerTask:
    """A prompt and its answer must fit into `seq_length` together; answers end there at the latest."""
    encode, prompts, wanted = ExampleEncoder(tokenizer, ExampleOptions()), [], []
    for where, record in examples:
        prompt, response = _texts(record, where)
        result = result_of(response, marker)
        if not result:
            raise ConfigError(f"{where}: response: {response!r}; must have a result behind {marker!r} (task.marker)")
        tokens, first = _encoded(encode, prompt, response, where)
        if len(tokens) > seq_length:
            raise ConfigError(
                f"{where}: prompt and response have {len(tokens)} tokens; must be at most {seq_length}, the "
                "model.seq_length"
            )
        prompts.append(tokens[:first].tolist())
        wanted.append(result)
    return AnswerTask(prompts, wanted, tokenizer, marker, max_tokens, {"marker": marker, "max_tokens": max_tokens})


def _texts(record: dict[str, Any], where: str) -> tuple[str, str]:
    found = []
    for key in ("prompt", "response"):
        text = record.get(key)
        if not isinstance(text, str) or not text:
            value = "missing" if key not in record else repr(text)
            raise ConfigError(f"{where}: {key}: {value}; must be a text, not empty")
        found.append(check_unicode(text, f"{where}: {key}"))
    return found[0], found[1]


def _encoded(encode: ExampleEncoder, prompt: str, response: str, where: str) -> tuple[np.ndarray, int]:
    """Tokens as they are taught, and the number of those of the prompt."""
    try:
        tokens, mask = encode({"prompt": prompt, "response": response})
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    return tokens, int(mask.argmax())
