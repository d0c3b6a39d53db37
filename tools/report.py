"""Compare runs on one HTML page: losses over steps, tokens, FLOPs and time, density, topology, ledger, settings.

    python tools/report.py runs/mst runs/dense --output compare.html

The page is one file that loads nothing. Runs may have different lengths, go on still, or lack some of their files.
The report of a single run is `python -m megasparse.reporting.report RUN`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megasparse.data.arguments import run_tool, tool_parser
from megasparse.reporting.comparison import write_comparison

if __name__ == "__main__":
    parser = tool_parser(__doc__, "")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, such as runs/my-run")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the page, such as compare.html")
    options = parser.parse_args()
    sys.exit(run_tool("report", lambda: print(write_comparison(options.runs, options.output))))
