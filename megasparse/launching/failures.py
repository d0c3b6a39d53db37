"""How a process leaves: after a lost peer, and at the end.

When a rank dies, the collectives of the others fail with whatever their transport saw: a closed connection, a
time-out. ``is_lost_peer`` recognises these, so that the entry script can say what happened in words.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import torch.distributed as dist

GO_ON = "go on from the newest checkpoint with train.resume=auto"

LOST_PEER_STATUS = 3
"""Exit status of a rank that ends because of another one, or because it hangs."""

SECONDS_FOR_THE_CAUSE = 3
"""Launchers look about once a second, and end with the status of the process that ended first: it shall be that of the
rank that knows why (a full disk for instance, which is no reason to start again)."""

SIGNS = ("connection closed by peer", "connection reset", "timed out", "socket timeout", "broken pipe", "gloo", "nccl")


class MaskError(RuntimeError):
    """A mask is not what it was, or data-parallel ranks hold different ones; all ranks raise it at the same point."""


class SkippedStepsError(ArithmeticError):
    """So many steps in a row were skipped that going on is of no use; all ranks raise it at the same step.

    step: the last of them, counted from 1. reason: why it was skipped.
    """

    def __init__(self, step: int, count: int, reason: str) -> None:
        super().__init__(
            f"step {step} is skipped, number {count} in a row (train.max_skipped_steps): {reason}. Weights are as "
            f"after step {step - count}, checkpoints as they were; {GO_ON} and a lower optimizer.lr, a longer "
            "optimizer.warmup_steps or a higher train.skip_step_sigma"
        )


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error is a collective that failed because another rank is gone or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


@contextlib.contextmanager
def exit_after_lost_peer(rank: int, advice: str) -> Iterator[None]:
    """Turn the error of a collective whose peer is gone into one clear line, and end this process at once.

    Notes of the error, which say what the watchdog knows of the others, become part of the line. An ordinary exit
    would wait for the peers again, in the destructors of the process group.
    """
    try:
        yield
    except Exception as error:
        if not is_lost_peer(error):
            raise
        first_line = str(error).strip().splitlines()[0]
        known = "; ".join(getattr(error, "__notes__", [])) or "it has died or does not answer"
        print(
            f"error: rank {rank} lost contact with another rank: {known}; {advice}. ({first_line})",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(SECONDS_FOR_THE_CAUSE)
        exit_now(LOST_PEER_STATUS)


def exit_now(status: int) -> NoReturn:
    """End this process now, its output written, without the destructors of the interpreter.

    The gloo groups that DeepSpeed keeps alive are destroyed there: 5 of 36 runs of two ranks that had finished all
    their work then died of `terminate called without an active exception` (torch 2.13, deepspeed 0.19.8), and the
    launcher reported a failed job.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
