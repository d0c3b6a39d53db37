#!/usr/bin/env python3
"""Converts checkpoints: from and to Hugging Face transformers, from nanoGPT, from runs and DeepSpeed's universal form.

Everything comes in as a model folder (config.yaml, model.safetensors, tokenizer), which launch/generate.py samples from
and `train.init_from` starts a run from. Memory holds one tensor at a time. The output folder appears when it is whole.

Checkpoints of Megatron-LM are not read: they are pickled objects of its own classes, and nothing here runs code from a
file. Convert them to the layout of transformers with its own tools first.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from megasparse.config.loader import load_config
from megasparse.conversion.huggingface.architectures import ARCHITECTURES
from megasparse.conversion.huggingface.exporting import export_huggingface
from megasparse.conversion.huggingface.importing import import_huggingface, import_nanogpt
from megasparse.conversion.sources import UniversalSource, open_source, write_source
from megasparse.data.arguments import run_tool, tool_parser
from megasparse.utils.activations import ACTIVATIONS

EXAMPLES = """examples:
  python tools/convert_checkpoint.py from-huggingface --input gpt2/ --output models/gpt2
  python tools/convert_checkpoint.py from-nanogpt --input out/ckpt.pt --output models/nano
  python tools/convert_checkpoint.py from-run --input runs/quickstart-mst --step 400 --output models/quickstart
  python tools/convert_checkpoint.py from-universal --input ckpt_universal/ --config run.yaml --output models/x
  python tools/convert_checkpoint.py to-huggingface --input runs/quickstart-mst --output exported --dtype bfloat16
  python launch/generate.py --run models/gpt2 --prompt "In the beginning"
  python launch/pretrain.py --config my.yaml train.init_from=models/gpt2
"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_arguments() -> argparse.Namespace:
    parser = tool_parser(__doc__, EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder to make")
    common.add_argument("--replace", action="store_true", help="take the place of an output folder that is there")
    common.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as they are)")
    common.add_argument("--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="of a file (default: 5GB)")

    def command(name: str, text: str, what: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, parents=[common])
        added.add_argument("--input", required=True, type=Path, metavar="PATH", help=what)
        return added

    command("from-huggingface", "a folder of transformers becomes a model folder", "folder with a config.json")
    nanogpt = command("from-nanogpt", "a checkpoint of nanoGPT becomes a model folder", "file ckpt.pt")
    activations = [name for name, activation in ACTIVATIONS.items() if not activation.gated]
    which = "gelu: the tanh approximation of nanoGPT before 2023; the file does not say which (default: gelu_exact)"
    nanogpt.add_argument("--activation", choices=activations, default="gelu_exact", help=which)
    run = command("from-run", "a run's checkpoint becomes a model folder", "run folder")
    universal = command("from-universal", "DeepSpeed's universal form becomes a model folder", "folder with zero/")
    universal.add_argument("--config", required=True, type=Path, metavar="FILE", help="configuration of its run")
    exported = command("to-huggingface", "becomes a folder of transformers", "run folder or model folder")
    for parser_of_runs in (run, exported):
        parser_of_runs.add_argument("--step", type=int, metavar="N", help="checkpoint of step N (default: the newest)")
    exported.add_argument("--architecture", choices=ARCHITECTURES, help="default: the model's origin, or what fits")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    dtype, size = DTYPES.get(arguments.dtype), arguments.max_shard_size
    options = {"dtype": dtype, "max_file_bytes": size, "replace": arguments.replace}
    source, output, notes = arguments.input, arguments.output, []
    if arguments.command == "from-huggingface":
        notes = import_huggingface(source, output, **options)
    elif arguments.command == "from-nanogpt":
        notes = import_nanogpt(source, output, activation=arguments.activation, **options)
    elif arguments.command == "from-run":
        write_source(open_source(source, arguments.step), output, **options)
    elif arguments.command == "from-universal":
        write_source(UniversalSource(source, load_config([arguments.config])), output, **options)
    else:
        opened = open_source(source, arguments.step)
        notes = export_huggingface(opened, output, architecture=arguments.architecture, **options)
    for note in notes:
        print(f"note: {note}")
    print(f"{output}: written")


def _size(text: str) -> int:
    """Bytes from a number and a unit."""
    found = re.fullmatch(r"(\d+) ?(KB|MB|GB)?", text.strip(), flags=re.IGNORECASE)
    if found is None or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}; must be such as 500MB or 5GB")
    return int(found[1]) * UNITS[(found[2] or "").upper()]


if __name__ == "__main__":
    options = parse_arguments()
    raise SystemExit(run_tool("convert_checkpoint", lambda: main(options)))
