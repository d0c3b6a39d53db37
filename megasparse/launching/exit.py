"""The last words of a run that cannot go on: one line for the user, and the exit status.

Status 2: something to mend; 4: a mask is wrong; 130: Ctrl-C. The table is in launch/README.md.
"""

from __future__ import annotations

import signal
import sys
import time
from typing import NoReturn

from megasparse.config.loader import ConfigError
from megasparse.launching.failures import MaskError, SkippedStepsError, exit_now
from megasparse.utils.files import describe_failure

EXPECTED = (ValueError, ArithmeticError, MaskError, OSError, KeyboardInterrupt)
"""Errors whose message is for the user; all others come with their traceback. Of those of the system, only what went
wrong with a file: a disk that is full or read-only, a folder that was deleted."""
INTERRUPTED_STATUS = 128 + signal.SIGINT
"""As shells have it."""
SECONDS_FOR_RANK_0 = 15


def explain_and_exit(error: BaseException, rank: int) -> NoReturn:
    """Print the error where it is to be heard, and end this process. Raises what is not for the user."""
    if isinstance(error, OSError) and error.filename is None:
        raise error
    if isinstance(error, KeyboardInterrupt):
        # Impatient users press it again.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"error: rank {rank} was interrupted; what was committed before is as it was", file=sys.stderr)
        exit_now(INTERRUPTED_STATUS)
    # Wrong settings and masks and skipped steps are common to all ranks, so one says so; data may be bad on one alone.
    is_common = isinstance(error, ConfigError | MaskError | SkippedStepsError)
    message = describe_failure(error) if isinstance(error, OSError) else str(error)
    if rank == 0:
        print(f"error: {message}", file=sys.stderr)
    elif not is_common:
        print(f"error on rank {rank}: {message}", file=sys.stderr)
    else:
        # Launchers kill all ranks once one has left, and rank 0 may come later and must be heard. Who is still here
        # then may be the only one that is refused.
        time.sleep(SECONDS_FOR_RANK_0)
        print(f"error on rank {rank}: {message}", file=sys.stderr)
    exit_now(4 if isinstance(error, MaskError) else 2)
