#!/usr/bin/env python3
"""Checks a machine with GPUs in minutes: facts, ceilings, numerics of every kernel, speeds, training, tuning.

Every section runs in a process of its own with a time limit; FILE is rewritten after each of them. Exit status: 0, all
compared numbers are right; 1, some are wrong; 2, the command cannot run; 3, some could not be compared.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from pathlib import Path

from megasparse.gpu_check.driver import check
from megasparse.gpu_check.sections import MINUTES, SECTIONS, choose
from megasparse.gpu_check.table import print_report
from megasparse.utils.streams import use_utf8

EXAMPLES = """examples:
  # everything, worth most first
  python tools/check_gpu.py --output gpu.json

  # are the kernels right, and how fast are the products?
  python tools/check_gpu.py --sections facts,compiling,numerics,products --minutes 4 --output gpu.json

  # without a GPU: tries the command itself, at tiny shapes; no number means anything
  python tools/check_gpu.py --rehearse --output rehearsed.json
"""


def main() -> int:
    use_utf8()
    arguments = parse_arguments()
    try:
        status = check(
            choose(arguments.sections),
            minutes=arguments.minutes,
            output=arguments.output,
            rehearse=arguments.rehearse,
            say=lambda text: print(f"check_gpu: {text}", file=sys.stderr, flush=True),
        )
    except (ValueError, OSError) as error:
        print(f"check_gpu: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"check_gpu: interrupted; finished sections are in {arguments.output}", file=sys.stderr)
        return 130
    print_report(arguments.output)
    if multiprocessing.active_children():
        # One that was killed and hangs in a driver all the same would be waited for.
        sys.stdout.flush()
        os._exit(status)
    return status


def parse_arguments() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=form)
    names = ", ".join(section.name for section in SECTIONS)
    parser.add_argument("--sections", metavar="A,B", help=f"of {names} (default: all)")
    parser.add_argument(
        "--minutes", type=above_zero, default=MINUTES, metavar="N", help=f"at most (default: {MINUTES})"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("gpu_check.json"), metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU; every number is marked")
    return parser.parse_args()


def above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text}; must be above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
