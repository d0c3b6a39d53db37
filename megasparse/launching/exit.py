"""The last words of a run that cannot go on: one line for the user, and the exit status.

Status 2: something to mend; 4: masks of replicas differ; 130: Ctrl-C. The table is in launch/README.md.
"""

from __future__ import annotations

import signal
import sys
import time
from typing import NoReturn

from megasparse.config.loader import ConfigError
from megasparse.launching.failures import ReplicaMismatchError, exit_now

EXPECTED = (ValueError, ArithmeticError, ReplicaMismatchError, KeyboardInterrupt)
"""Errors whose message is for the user; all others come with their traceback."""
INTERRUPTED_STATUS = 128 + signal.SIGINT
"""As shells have it."""
SECONDS_FOR_RANK_0 = 15


def explain_and_exit(error: BaseException, rank: int) -> NoReturn:
    """Print the error where it is to be heard, and end this process."""
    if isinstance(error, KeyboardInterrupt):
        # Impatient users press it again.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"error: rank {rank} was interrupted; what was committed before is as it was", file=sys.stderr)
        exit_now(INTERRUPTED_STATUS)
    # Wrong settings and unequal masks are the same on all ranks, so one of them says so; data may be bad on one alone.
    is_common = isinstance(error, ConfigError | ReplicaMismatchError)
    if rank == 0:
        print(f"error: {error}", file=sys.stderr)
    elif not is_common:
        print(f"error on rank {rank}: {error}", file=sys.stderr)
    elif isinstance(error, ConfigError):
        # Launchers kill all ranks once one has left, and rank 0 may come later and must be heard.
        time.sleep(SECONDS_FOR_RANK_0)
    exit_now(4 if isinstance(error, ReplicaMismatchError) else 2)
