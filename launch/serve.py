"""Offer a run or a model folder to clients of OpenAI's interface, and at a page to type into.

    python launch/serve.py --model models/gpt2-50 [--port 8000] [--max-streams 32] [--api-key-file FILE]
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once upon"}'

In float32, under the attention pattern of the last training step; on a CPU pruned layers are packed, as by generate.py
(--kernels). Requests that come together are answered together, a token each at a time. A key that clients must send is
read from --api-key-file or the variable MEGASPARSE_API_KEY.
SIGTERM or Ctrl-C ends it in order. Exit status: 0, or 2 for what the user must mend.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from megasparse.data.arguments import positive
from megasparse.launching.host_memory import use_huge_pages
from megasparse.utils.streams import use_utf8


def main() -> int:
    use_utf8()
    arguments = parse_arguments()
    # DeepSpeed is here only for reading its files, as in generate.py.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    use_huge_pages(os.environ)
    try:
        from megasparse.inference.compression import compress_model
        from megasparse.serving.limits import Limits
        from megasparse.serving.served import open_served
        from megasparse.serving.server import api_key, serve
    except ModuleNotFoundError as error:
        print(f"error: {error}; serving needs: pip install 'megasparse[serve]'", file=sys.stderr)
        return 2
    try:
        limits = Limits(
            streams=arguments.max_streams,
            queue=arguments.max_queue,
            tokens=arguments.max_tokens,
            seconds=arguments.max_seconds,
            stalled_seconds=arguments.stalled_seconds,
            body_bytes=arguments.max_body_bytes,
            cache_bytes=arguments.cache_mb << 20,
        )
        key = api_key(file=arguments.api_key_file)
        served = open_served(arguments.model, arguments.name, arguments.device)
        for reason in served.trained.passed_over:
            print(f"warning: passed over: {reason}", file=sys.stderr)
        plan = compress_model(served.trained.model, arguments.kernels)
        if plan.num_packed:
            print(*plan.lines(), sep="\n", file=sys.stderr)
        address = {"host": arguments.host, "port": arguments.port}
        serve(served, limits, **address, api_key=key, grace_seconds=arguments.grace_seconds)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = "model folder, or run folder at its newest good checkpoint"
    parser.add_argument("--model", "--run", required=True, type=Path, metavar="FOLDER", help=model)
    parser.add_argument("--name", metavar="NAME", help="what clients call the model; default: the folder's name")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default: this machine alone")
    parser.add_argument("--port", type=_port, default=8000, metavar="N", help="0: any free one; default: 8000")
    key = "file with the key that clients must send; default: MEGASPARSE_API_KEY, or none"
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help=key)
    counts = {
        "max-streams": (32, "texts written at once"),
        "max-queue": (64, "texts that wait; beyond: status 503"),
        "max-tokens": (4096, "of a request"),
        "max-body-bytes": (1 << 20, "of a request"),
        "cache-mb": (1024, "MiB of keys and values of all texts written at once"),
    }
    for name, (default, text) in counts.items():
        parser.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{text}; default: {default}"
        )
    parser.add_argument("--max-seconds", type=float, default=300, metavar="S", help="of a request; default: 300")
    stalled = "in which a client reads nothing of its answer, then its connection is closed; default: 60"
    parser.add_argument("--stalled-seconds", type=float, default=60, metavar="S", help=stalled)
    grace = "that running texts have when the server is to stop; default: 10"
    parser.add_argument("--grace-seconds", type=_seconds, default=10, metavar="S", help=grace)
    kernels = "of pruned layers on a CPU; auto: sparse where faster; default: auto"
    parser.add_argument("--kernels", choices=("auto", "dense", "sparse"), default="auto", help=kernels)
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0], help=f"default here: {devices[0]}")
    return parser.parse_args()


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text}; must be 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text}; must be 0 to a million")
    return value


if __name__ == "__main__":
    sys.exit(main())
