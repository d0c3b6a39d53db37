"""A trained model for lm-evaluation-harness (extra `eval`), under the name `megasparse`.

    python launch/evaluate_harness.py --model megasparse --model_args run=runs/x --tasks lambada_openai,hellaswag

Importing this module registers the model; the harness has no other way to find one. In a script of one's own:

    import megasparse.evaluation.harness
    lm_eval.simple_evaluate(model="megasparse", model_args="run=runs/x,step=300", tasks=[...])

model_args: run (or model folder), step, precision (fp32, bf16, fp16), max_gen_toks. The harness's own --batch_size and
--device hold. Under a launcher all ranks get all requests and share the work here, so the harness sees one process.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from megasparse.data.tokenizer import Tokenizer
from megasparse.evaluation.run import place, sharing_ranks
from megasparse.evaluation.scoring import DTYPES, Scorer
from megasparse.evaluation.windows import Window, continuation_window, rolling_windows
from megasparse.inference.generation import generate
from megasparse.inference.growing_text import GrowingText
from megasparse.inference.trained import open_trained
from megasparse.launching import LaunchEnvironment
from megasparse.parallel import CommunicationGroup

TOKENS_BETWEEN_LOOKS = 16
"""Tokens that are generated before the text is searched for what ends it."""

LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names under which tasks give the number of tokens to generate, the first that is there wins."""
USED_OPTIONS = {*LENGTH_NAMES, "until", "do_sample", "temperature", "top_k", "top_p"}


@register_model("megasparse")
class MegaSparseLM(TemplateLM):
    """A run's model as the harness asks for it. Raises ValueError for what the user must mend."""

    def __init__(
        self,
        run: str,
        step: int | None = None,
        precision: str = "fp32",
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if precision not in DTYPES:
            raise ValueError(f"precision: {precision}; must be one of {', '.join(DTYPES)}")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
        os.environ["DS_ACCELERATOR"] = device
        trained = open_trained(Path(str(run)), step)
        self._groups = ExitStack()
        environment = LaunchEnvironment.from_variables(os.environ)
        self._ranks, self._device = self._groups.enter_context(sharing_ranks(environment, device))
        self._model = place(trained.model, self._device, precision)
        self._tokens: Tokenizer = trained.tokenizer
        self._ends = trained.end_tokens or (trained.tokenizer.end_of_document_id,)
        self._begin, self._leading = trained.begin_token, list(trained.leading_tokens)
        # `auto`, also as `auto:4`, leaves the choice to the scorer.
        size = None if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
        self._scorer = Scorer(self._model, batch_size=size, ranks=self._ranks)
        self._step, self._precision, self.max_gen_toks = trained.step, precision, int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        return self._tokens.end_of_document_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the begin token, as in the harness's own model, or the end."""
        return self.eot_token_id if self._begin is None else self._begin

    @property
    def max_length(self) -> int:
        return self._scorer.seq_length

    @property
    def tokenizer_name(self) -> str:
        return self._tokens.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """With what the tokenizer puts before every text in the harness's own model, unless it must not.

        The harness puts `prefix_token_id` before what has no context besides.
        """
        return [*([] if add_special_tokens is False else self._leading), *self._tokens.encode(string)]

    def get_model_info(self) -> dict[str, Any]:
        """Facts that the harness writes beside its results."""
        return {
            "model_num_parameters": self._model.num_parameters(),
            "model_dtype": self._precision,
            "model_step": self._step,
        }

    def close(self) -> None:
        """End the process group, where there is one."""
        self._groups.close()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        windows = []
        for (_, continuation), context_ids, continuation_ids in requests:
            if not 1 <= len(continuation_ids) <= self.max_length:
                raise ValueError(
                    f"continuation {continuation[:60]!r}: {len(continuation_ids)} tokens; must be 1 to "
                    f"{self.max_length}, the sequence length of the model"
                )
            windows.append(continuation_window(context_ids, continuation_ids, self.max_length))
        return [(float(likelihood), bool(greedy)) for likelihood, greedy in self._scorer.scores(windows)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[Window] = []
        ends = []
        for (text,) in (request.args for request in requests):
            windows += rolling_windows(self.tok_encode(text), self.prefix_token_id, self.max_length)
            ends.append(len(windows))
        likelihoods = self._scorer.scores(windows)[:, 0].tolist() if windows else []
        return [math.fsum(likelihoods[start:end]) for start, end in zip([0, *ends][:-1], ends, strict=True)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        own = range(self._ranks.rank, len(requests), self._ranks.size)
        texts = {index: self._continue(*requests[index].args) for index in own}
        return share_texts(texts, len(requests), self._ranks)

    def _continue(self, context: str, options: Mapping[str, Any]) -> str:
        """The continuation up to the first text of `until`, the end of the document, or the largest length."""
        for name in options.keys() - USED_OPTIONS:
            logging.getLogger(__name__).warning("generation option %s=%r is ignored", name, options[name])
        length = int(next((options[name] for name in LENGTH_NAMES if options.get(name) is not None), self.max_gen_toks))
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else [text for text in until if text]
        # Greedy unless sampling is asked for, as everywhere in the harness.
        temperature = float(options.get("temperature") or 0.0)
        temperature = temperature if options.get("do_sample", temperature > 0) else 0.0
        # Of a long context the end is kept, with room for what is to come: half the window at most.
        kept = max(1, self.max_length - length, self.max_length // 2)
        prompt = self.tok_encode(context)[-kept:] or [self.prefix_token_id]
        # Behind the prompt: alone, some tokenizers drop the space that a text begins with.
        tokens, text, shown = list(prompt), GrowingText(self._tokens, prompt, until), ""
        generator = torch.Generator().manual_seed(0)
        while (written := len(tokens) - len(prompt)) < length:
            wanted = min(TOKENS_BETWEEN_LOOKS, length - written)
            tokens = generate(
                self._model,
                torch.tensor([tokens], device=self._device),
                wanted,
                temperature=temperature,
                top_k=options.get("top_k") or None,
                top_p=options.get("top_p"),
                generator=generator,
                end_tokens=self._ends,
                num_ids=self._tokens.vocab_size,
            )[0].tolist()
            ended = tokens[-1] in self._ends
            for token in tokens[len(prompt) + written : len(tokens) - ended]:
                shown += text.add(token)
                if text.stopped:
                    return shown
            if ended:
                break
        return shown + text.finish()


def share_texts(own: Mapping[int, str], count: int, ranks: CommunicationGroup) -> list[str]:
    """Texts number 0 to count - 1, of which this rank has some and the others have the rest, on every rank."""
    encoded = {index: list(text.encode("utf-8", "replace")) for index, text in own.items()}
    lengths = torch.zeros(count, dtype=torch.int64)
    for index, content in encoded.items():
        lengths[index] = len(content)
    ends = ranks.sum_(lengths).cumsum(0).tolist()
    joined = torch.zeros(ends[-1] if ends else 0, dtype=torch.uint8)
    for index, content in encoded.items():
        joined[ends[index] - len(content) : ends[index]] = torch.tensor(content, dtype=torch.uint8)
    letters = bytes(ranks.sum_(joined).tolist()) if len(joined) else b""
    return [letters[start:end].decode("utf-8") for start, end in zip([0, *ends][:-1], ends, strict=True)]
