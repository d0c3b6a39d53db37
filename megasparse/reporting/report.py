"""The report that a run leaves behind: one HTML page that loads nothing from elsewhere.

The training loop calls ``write_report(run_folder)`` at its end. To make the page of any run folder again, also of a
run that is still going on or was killed::

    python -m megasparse.reporting.report runs/my-run
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megasparse.reporting.page import render_page
from megasparse.reporting.run_data import read_run
from megasparse.utils.files import write_at_once

FILE_NAME = "report.html"


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the run folder, from what lies there, and return its path.

    Missing or damaged files are named on the page. Raises ValueError where `run_folder` is no directory.
    """
    run_folder = Path(run_folder)
    write_at_once(run_folder / FILE_NAME, render_page(read_run(run_folder)))
    return run_folder / FILE_NAME


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: write the reports of the given run folders and print their paths."""
    parser = argparse.ArgumentParser(prog="python -m megasparse.reporting.report", description=__doc__.split("\n")[0])
    parser.add_argument("run_folder", nargs="+", type=Path, help="folder of a run, such as runs/my-run")
    for folder in parser.parse_args(arguments).run_folder:
        try:
            print(write_report(folder))
        except ValueError as error:
            parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
