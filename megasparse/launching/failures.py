"""How a process leaves: after a lost peer, without memory, and at the end.

When a rank dies, the collectives of the others fail with whatever their transport saw: a closed connection, a
time-out. ``is_lost_peer`` recognises these, so that the entry script can say what happened in words. What only looks
alike, for NCCL too raises the same error for all that it meets, is left as it is.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import torch
import torch.distributed as dist

GO_ON = "go on from the newest checkpoint with train.resume=auto"

LOST_PEER_STATUS = 3
"""Exit status of a rank that ends because of another one, or because it hangs."""

SECONDS_FOR_THE_CAUSE = 3
"""Launchers look about once a second, and end with the status of the process that ended first: it shall be that of the
rank that knows why (a full disk for instance, which is no reason to start again)."""

OUT_OF_MEMORY_STATUS = 2
"""As after other things that the user must mend: another start would come to the same place."""

SIGNS = ("connection closed by", "connection reset", "timed out", "socket timeout", "broken pipe", "gloo")

NCCL_SIGNS = (*SIGNS, "remote", "aborted", "timeout", "connection refused")
"""What of NCCL tells of a peer. It also says in its own name that its use is wrong or that a call to CUDA failed."""

OUT_OF_MEMORY_SIGNS = ("out of memory", "cublas_status_alloc_failed", "defaultcpuallocator")

TO_NEED_LESS = (
    "with the same batch, train.micro_batch_size can be lower or train.activation_recomputation true; state is divided "
    "by a higher deepspeed.zero_stage and by parallel.tensor_parallel_size, and kept in host memory by "
    "deepspeed.offload_optimizer=cpu; `--dry-run` plans the bytes of a rank"
)


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the host where that computes, had no memory left for a tensor or a buffer of NCCL."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in OUT_OF_MEMORY_SIGNS)


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error is a collective that failed because another rank is gone or does not answer."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    text = str(error).lower()
    if "nccl" in text:
        return any(sign in text for sign in NCCL_SIGNS)
    return isinstance(error, dist.DistError) or any(sign in text for sign in SIGNS)


@contextlib.contextmanager
def exit_after_lost_peer(rank: int, advice: str) -> Iterator[None]:
    """Turn the error of a collective whose peer is gone into one clear line, and end this process at once. The same
    where memory is out, with what needs less.

    Notes of the error, which say what the watchdog knows of the others, become part of the line. An ordinary exit
    would wait for the peers again, in the destructors of the process group.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            what = " ".join(str(error).split())
            print(f"error: rank {rank} is out of memory: {what}; {TO_NEED_LESS}", file=sys.stderr, flush=True)
            exit_now(OUT_OF_MEMORY_STATUS)
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
