#!/usr/bin/env python3
"""Compares recipes at equal cost: solves each arm's steps or width for a budget of FLOPs, runs all arms on all seeds
side by side, and ends in one table, one page and one JSON file.

Killed at any moment, it goes on with the same command; what has finished is not run again. The format of a study is
described in configs/studies/README.md. Exit status: 0; 1 where runs have failed; 2 for what you must mend; 130 after
Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megasparse.config.loader import ConfigError
from megasparse.data.arguments import run_tool, tool_parser

if TYPE_CHECKING:
    from megasparse.studies.format import Preparation

ROOT = Path(__file__).resolve().parents[1]

EXAMPLES = """examples:
  # three arms on two seeds, in minutes, on data that it makes itself
  python tools/study.py --study configs/studies/quick.yaml

  # what each arm costs, and the time on this machine
  python tools/study.py --study configs/studies/quick.yaml --dry-run
"""


def main(arguments: argparse.Namespace) -> int:
    from megasparse.launching import choose_accelerator
    from megasparse.monitoring.console import make_console
    from megasparse.studies.format import load_study
    from megasparse.studies.running import Stopped
    from megasparse.studies.study import PAGE, RESULTS, Studied, print_results

    choose_accelerator(os.environ)
    study = load_study(arguments.study)
    if study.prepare == "quickstart":
        prepare_quickstart()
    missing = [step for step in study.preparations if not step.is_done]
    if not arguments.dry_run:
        for step in missing:
            make(step)
        missing = []
    studied = Studied(study, arguments.study, arguments.known, without_models=bool(missing))
    console = make_console()
    if arguments.dry_run:
        studied.dry_run(console)
        return 0
    try:
        results = studied.run(run_command, lambda text: print(text, flush=True))
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.status
    print_results(results, console)
    print(f"{studied.place / RESULTS}\n{studied.place / PAGE}")
    return 1 if results["failures"] else 0


def run_command(job) -> list[str]:
    """The command line of a run, which is that of any run."""
    return [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", str(job.config_file)]


def make(step: Preparation) -> None:
    """Run a step of the preparation; it goes on where it was, as the scripts do. Raises ConfigError where it fails."""
    print(f"making {step.makes}: {' '.join(step.run)}", flush=True)
    script, *words = step.run
    done = subprocess.run([sys.executable, str(ROOT / script), *words], check=False)
    if done.returncode or not step.is_done:
        raise ConfigError(
            f"prepare: {script} ended with status {done.returncode} and without {step.makes}; the same command goes on"
        )


def prepare_quickstart() -> None:
    """The script writes below the root of the repository, and the paths of the configuration are relative."""
    if Path.cwd() != ROOT:
        raise ConfigError(f"prepare: quickstart makes its data in {ROOT}; must be started there")
    done = subprocess.run(["sh", "launch/quickstart_data.sh"], env=with_own_python(os.environ), check=False)
    if done.returncode:
        raise ConfigError(f"prepare: launch/quickstart_data.sh ended with status {done.returncode}")


def with_own_python(variables: Mapping[str, str]) -> dict[str, str]:
    """The script calls `python`, which shall be this one, also where its environment was not activated."""
    folders = str(Path(sys.executable).parent), variables.get("PATH", os.defpath)
    return {**variables, "PATH": os.pathsep.join(folders)}


if __name__ == "__main__":
    parser = tool_parser(__doc__, EXAMPLES)
    parser.add_argument("--study", required=True, type=Path, metavar="FILE", help="YAML file of the study")
    parser.add_argument(
        "--known",
        action="extend",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE",
        help="results.json of other studies, whose runs of the same settings and data are not run again",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what every arm costs and the time; run nothing")
    options = parser.parse_args()
    status: list[int] = []
    try:
        failed = run_tool("study", lambda: status.append(main(options)))
    except KeyboardInterrupt:
        # Before any run was started.
        sys.exit(130)
    sys.exit(failed or status[0])
