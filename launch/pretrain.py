"""Pretrain a model.

    deepspeed launch/pretrain.py --config configs/quickstart.yaml [section.field=value ...]
    python launch/pretrain.py --config configs/gpt2-124m.yaml --dry-run --world-size 40 [--json]

Settings come from the YAML file (later files win, each may name a `base`), then from the dotted words. Configuration,
data and plan are checked before any process group starts; what the run writes is described in launch/README.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys

from megasparse.config.loader import ConfigError, describe_fields, load_config, to_yaml
from megasparse.data.arguments import positive
from megasparse.launching import LaunchEnvironment, choose_accelerator, keep_host_memory, leave_warnings_to_rank_0
from megasparse.launching.exit import EXPECTED, explain_and_exit
from megasparse.launching.failures import GO_ON, exit_after_lost_peer, exit_now
from megasparse.utils.streams import use_utf8


def main() -> int:
    use_utf8()
    arguments = parse_arguments()
    rank = 0
    try:
        environment = LaunchEnvironment.from_variables(os.environ)
        rank = environment.rank
        leave_warnings_to_rank_0(rank)
        config = load_config(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(to_yaml(config), end="")
            return 0
        if arguments.dry_run:
            return dry_run(config, arguments.world_size or environment.world_size, arguments.device, arguments.json)
        if arguments.json or arguments.world_size or arguments.device:
            raise ConfigError("--json, --world-size, --device: only used with --dry-run")
        if choose_accelerator(os.environ) == "cpu":
            keep_host_memory(os.environ)
        from megasparse.training.run import pretrain

        # What is imported stays: collections, one at each rebuilt engine, pass over it (half a second each otherwise).
        gc.freeze()
        with exit_after_lost_peer(rank, GO_ON):
            pretrain(config, environment)
            exit_now(0)
    except EXPECTED as error:
        explain_and_exit(error, rank)
    return 0


def dry_run(config, world_size: int, device: str | None, as_json: bool) -> int:
    """Print the plan for a world size; nothing is started."""
    from megasparse.monitoring.console import make_console, print_plan
    from megasparse.training.plan import make_plan

    plan = make_plan(config, world_size, device)
    if as_json:
        print(json.dumps(plan, indent=1))
    else:
        print_plan(plan, make_console())
    return 0


def parse_arguments() -> argparse.Namespace:
    fields = "\n".join(f"  {name} = {default}\n      {text}" for name, default, text in describe_fields())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"settings and defaults:\n{fields}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; may be repeated")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that win over the files")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    parser.add_argument("--world-size", type=positive, metavar="N", help="ranks to plan for, with --dry-run")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="device to plan for, with --dry-run")
    parser.add_argument("--json", action="store_true", help="plan as JSON, with --dry-run")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
