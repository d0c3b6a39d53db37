"""Compare runs on one HTML page: losses over steps, tokens, FLOPs and time, density, topology, ledger, settings.

    python tools/report.py runs/mst runs/dense --output compare.html

The page is one file that loads nothing. Runs may have different lengths, go on still, or lack some of their files.
The report of a single run is `python -m megasparse.reporting.report RUN`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megasparse.reporting.comparison import write_comparison
from megasparse.utils.streams import use_utf8


def main() -> int:
    use_utf8()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, such as runs/my-run")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the page, such as compare.html")
    arguments = parser.parse_args()
    try:
        print(write_comparison(arguments.runs, arguments.output))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
