"""Submit a run to SLURM.

    python launch/slurm/submit.py --config configs/gpt2-124m.yaml [section.field=value ...] \\
        --nodes 2 --tasks-per-node 8 --time 04:00:00

Checks the run at its size, freezes code and resolved configuration into <run.folder>/<run.name>/job-<n>, writes a
batch script there and calls sbatch. The job works in the present folder, so relative paths keep their meaning. It is
warned before its time limit, saves, and requeues itself until the run is finished; see launch/slurm/README.md.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> int:
    arguments = vars(parse_arguments())
    files, overrides, dry_run = (arguments.pop(name) for name in ("config", "overrides", "dry_run"))
    variables = dict(os.environ)
    # Plans are made on the CPU; the job must not inherit that.
    os.environ["DS_ACCELERATOR"] = "cpu"
    from megasparse.config.loader import load_config
    from megasparse.launching.submission import SlurmJob, submit, submit_command, write_job
    from megasparse.training.preparation import check_start
    from megasparse.utils.streams import use_utf8

    use_utf8()
    try:
        job = SlurmJob(**{**arguments, "options": tuple(arguments["options"])})
        config = load_config(files, overrides)
        check_start(config, job.world_size, job.device)
        folder = write_job(config, job, REPOSITORY)
        print(f"written: {folder}")
        print(shlex.join(submit_command(folder)) if dry_run else submit(folder, variables))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; may be repeated")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that win over the files")
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--tasks-per-node", type=int, required=True, metavar="N", help="ranks on each node")
    parser.add_argument("--time", required=True, metavar="LIMIT", help="of one start of the job, as sbatch reads it")
    layout = "task-per-rank (default): SLURM starts every rank; task-per-node: torchrun does, once on each node"
    parser.add_argument("--layout", default="task-per-rank", metavar="LAYOUT", help=layout)
    warning = "for the last step and the checkpoint; 180"
    parser.add_argument("--warning-seconds", type=int, default=180, metavar="S", help=warning)
    parser.add_argument("--max-restarts", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument("--partition", metavar="P")
    parser.add_argument("--account", metavar="A")
    parser.add_argument("--gpus-per-node", type=int, metavar="N")
    parser.add_argument("--cpus-per-task", type=int, metavar="C", help="cores of each rank")
    option = {"action": "append", "metavar": "=--NAME=VALUE", "help": "may be repeated"}
    parser.add_argument("--sbatch-option", dest="options", default=[], **option)
    parser.add_argument("--setup", type=Path, metavar="FILE", help="shell file that the job sources first")
    parser.add_argument("--dry-run", action="store_true", help="write everything, print the command, do not submit")
    # Settings may stand between options.
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
