#!/usr/bin/env python3
"""Plans a run on a cluster before it is booked: FLOPs, memory, traffic, step time, energy, and the cheapest layouts.

One process on a CPU, in seconds; nothing is started. Times follow from data sheets and named assumptions: they are
extrapolated, and benchmarks/README.md says how far such predictions were off on a machine that we could measure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from megasparse.config.loader import ConfigError, load_config
from megasparse.data.arguments import positive, run_tool, tool_parser
from megasparse.utils.streams import use_utf8

EXAMPLES = """examples:
  # a preset on 64 H100 in nodes of 8
  python tools/plan.py --config configs/llama-7b.yaml --chip h100 --count 64 --gpus-per-node 8

  # the same model dense, on another network, as JSON
  python tools/plan.py --config configs/llama-7b.yaml sparsity.algorithm=dense --chip a100-80gb --count 64 \\
      --network 100Gb --json

  # a cluster in a file (keys chip, count, gpus_per_node, network), slower kernels
  python tools/plan.py --config configs/llama-70b.yaml --cluster cluster.yaml --assume kernel_efficiency=0.5

  # this machine, two ranks, from rates measured in some seconds
  python tools/plan.py --config configs/quickstart.yaml --chip here --count 2
"""


def parse_arguments() -> argparse.Namespace:
    parser = tool_parser(__doc__, EXAMPLES)
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; may be repeated")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that win over the files")
    parser.add_argument("--chip", metavar="NAME", help="see --chips; `here`: this machine's processor, measured")
    parser.add_argument("--count", type=positive, metavar="N", help="ranks: GPUs, or processes with --chip here")
    parser.add_argument("--gpus-per-node", type=positive, metavar="N", help="default: as the vendor's own system has")
    parser.add_argument("--network", metavar="RATE", help="of each GPU to other nodes, one direction: 400Gb, 50GB")
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="YAML file with these four; options win")
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="layouts to show (default: 5)")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    parser.add_argument("--chips", action="store_true", help="print the table of chips with its sources, and leave")
    # Settings may stand between options.
    return parser.parse_intermixed_args()


def main(arguments: argparse.Namespace) -> None:
    from megasparse.monitoring.console import make_console
    from megasparse.planning.tables import print_chips, print_forecast

    if arguments.chips:
        print_chips(make_console())
        return
    result = plan(arguments)
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print_forecast(result, make_console())


def plan(arguments: argparse.Namespace) -> dict[str, Any]:
    from megasparse.launching import keep_host_memory
    from megasparse.planning.assumptions import parse_assumptions
    from megasparse.planning.chips import HERE
    from megasparse.planning.cluster import KEYS, make_cluster, read_cluster
    from megasparse.planning.forecast import forecast
    from megasparse.planning.probe import here_chip, measure

    assumptions = parse_assumptions(arguments.assume)
    words = read_cluster(arguments.cluster) if arguments.cluster is not None else {}
    words |= {key: value for key in KEYS if (value := getattr(arguments, key)) is not None}
    for key in ("chip", "count"):
        if key not in words:
            raise ConfigError(f"--{key}: needed, here or in the file of --cluster")
    config = load_config(arguments.config, arguments.overrides)
    if words["chip"] != HERE:
        return forecast(config, make_cluster(**words), assumptions, top=arguments.top)
    if words.keys() & {"gpus_per_node", "network"}:
        raise ConfigError("--gpus-per-node, --network: not used with --chip here, which is one machine")
    keep_host_memory(os.environ)
    found = measure(config, words["count"])
    cluster = make_cluster(here_chip(found), words["count"])
    return forecast(config, cluster, assumptions, top=arguments.top, make_rates=found.rates, measured=found.facts())


if __name__ == "__main__":
    # Plans are made on the CPU, whatever this machine trains on.
    os.environ["DS_ACCELERATOR"] = "cpu"
    use_utf8()
    options = parse_arguments()
    sys.exit(run_tool("plan", lambda: main(options)))
