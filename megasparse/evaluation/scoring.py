"""Log-likelihoods of the scored tokens of many windows, divided over the ranks.

    scorer = Scorer(model, ranks=mesh.control)
    scores = scorer.scores(windows)          # float64 [n, 2]: log-likelihood in nats, 1.0 where all tokens are greedy

Batches are composed before they are dealt to the ranks, and results are gathered without a rounding. So the numbers
are the same bit for bit on any number of ranks, as long as each computes with as many threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from megasparse.evaluation.windows import Window
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOGITS_OF_A_BATCH = 2**28
"""Elements of the logits of a batch, where no batch size is given: 1 GiB in float32."""
LARGEST_BATCH = 32
CHUNK_ELEMENTS = 2**26
"""Elements of the logits that are there at once, of scored tokens alone: 256 MiB in float32."""


class Scorer:
    """A model, and how it is asked.

    Args:
        model: in evaluation mode, on its device and in its precision.
        batch_size: windows at once; None: as many as keep the logits small. Another batch size changes rounding.
        ranks: those that share the work; each holds the whole model, or, with `together`, a piece of it.
        ranks_device: of tensors that their collectives take.
        together: make as many forward passes on all ranks, and take the logits of a window at once.
        chunk_elements: of the logits that are computed at once; the logits of a whole window never are there.
        advance: called with the number of batches that are done, after each of this rank, and their number.
    """

    def __init__(
        self,
        model: GPT,
        *,
        batch_size: int | None = None,
        ranks: CommunicationGroup | None = None,
        advance: Callable[[int, int], None] = lambda done, total: None,
        chunk_elements: int = CHUNK_ELEMENTS,
        together: bool = False,
        ranks_device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.ranks, self.advance = model, ranks or CommunicationGroup(), advance
        self.seq_length, self.chunk_elements = model.config.seq_length, chunk_elements
        self.batch_size = batch_size or default_batch_size(self.seq_length, model.vocab_size)
        self.device = next(model.parameters()).device
        self.together, self.ranks_device = together, ranks_device

    def scores(self, windows: Sequence[Window]) -> np.ndarray:
        """float64 [n, 2], the same on every rank. Raises ArithmeticError where a log-likelihood is not finite."""
        # Windows of about the same length go together: less padding.
        order = sorted(range(len(windows)), key=lambda index: (-len(windows[index].tokens), index))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        own = batches[self.ranks.rank :: self.ranks.size]
        found = torch.zeros(len(windows), 2, dtype=torch.float64)
        rounds = -(-len(batches) // self.ranks.size) if self.together else len(own)
        for done in range(rounds):
            batch = own[done] if done < len(own) else []
            # As many forward passes, and heads in them, on all ranks.
            padding = [order[0]] * (self.batch_size - len(batch) if self.together else 0)
            scored = self._score([windows[index] for index in (*batch, *padding)])
            found[batch] = scored[: len(batch)]
            self.advance(done + 1, rounds)
        # Every row is zero on all ranks but one, so the sum is exact.
        scores = self.ranks.sum_(found.to(self.ranks_device)).cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(scores[:, 0]))
        if len(bad):
            raise ArithmeticError(f"the log-likelihood of window {bad[0]} is {scores[bad[0], 0]}; {len(bad)} are so")
        return scores

    @torch.no_grad()
    def _score(self, windows: Sequence[Window]) -> torch.Tensor:
        """[len(windows), 2]. The last token of a window is predicted, not read."""
        longest = max(len(window.tokens) for window in windows) - 1
        assert longest <= self.seq_length, (longest, self.seq_length)
        # Tokens to the right change nothing to their left: attention is causal. Any entry will do there.
        padded = -(-longest // self.model.token_multiple) * self.model.token_multiple
        tokens = np.zeros((len(windows), padded), np.int64)
        for row, window in zip(tokens, windows, strict=True):
            row[: len(window.tokens) - 1] = window.tokens[:-1]
        x_BTC = self.model.hidden_states(torch.from_numpy(tokens).to(self.device))
        return torch.stack([self._row(x_TC, window) for x_TC, window in zip(x_BTC, windows, strict=True)]).cpu()

    def _row(self, x_TC: torch.Tensor, window: Window) -> torch.Tensor:
        """Log-likelihood of the scored tokens, and whether each of them is the most likely one."""
        targets_T = torch.from_numpy(window.tokens[window.first :].astype(np.int64)).to(self.device)
        scored_TC = x_TC[window.first - 1 : len(window.tokens) - 1]
        rows = len(scored_TC) if self.together else max(1, self.chunk_elements // self.model.vocab_size)
        chunks = zip(scored_TC.split(rows), targets_T.split(rows), strict=True)
        found = torch.stack([self._chunk(*chunk) for chunk in chunks])
        return torch.stack([found[:, 0].sum(), found[:, 1].amin()])

    def _chunk(self, x_TC: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        logits_TV = self.model.logits(x_TC.unsqueeze(0))[0].float()
        picked_T = logits_TV.gather(1, targets_T.unsqueeze(1)).squeeze(1)
        likelihood = (picked_T - logits_TV.logsumexp(1)).double().sum()
        return torch.stack([likelihood, (logits_TV.argmax(1) == targets_T).all().double()])


def default_batch_size(seq_length: int, vocab_size: int) -> int:
    """Depends on the model alone, so that all ranks and all runs compose the same batches."""
    return max(1, min(LARGEST_BATCH, LOGITS_OF_A_BATCH // (seq_length * vocab_size)))
