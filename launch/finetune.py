"""Fine-tune a model: dense or pruned, alone or with a teacher.

    python tools/preprocess_data.py --supervised --input tasks.jsonl ... --output-prefix data/tasks
    deepspeed launch/finetune.py --model models/pruned --data data/tasks --teacher models/dense [field=value ...]

It is launch/pretrain.py with settings that follow from the model folder: its shape, its tokenizer and its masks, which
stay as they are; and with the recipe of configs/finetune/default.yaml. Files of --config come behind the recipe, the
dotted words last. All other options are those of pretrain.py: --print-config, --dry-run, ...
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from pathlib import Path

from megasparse.launching import LaunchEnvironment, leave_warnings_to_rank_0
from megasparse.launching.exit import EXPECTED, explain_and_exit
from megasparse.utils.streams import use_utf8

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "finetune" / "default.yaml"


def main() -> None:
    use_utf8()
    arguments, others = parse_arguments()
    # Words of the user that are no options stand behind ours, and win.
    options = [word for word in others if word.startswith("-") or "=" not in word]
    overrides = [word for word in others if word not in options]
    rank = 0
    try:
        rank = LaunchEnvironment.from_variables(os.environ).rank
        leave_warnings_to_rank_0(rank)
        words = settings(arguments, overrides)
    except EXPECTED as error:
        explain_and_exit(error, rank)
    files = [word for path in (RECIPE, *arguments.config) for word in ("--config", str(path))]
    pretrain = Path(__file__).with_name("pretrain.py")
    sys.argv = [str(pretrain), *files, *options, *words, *overrides]
    runpy.run_path(str(pretrain), run_name="__main__")


def settings(arguments: argparse.Namespace, overrides: list[str]) -> list[str]:
    """Overrides that follow from the options, and from the user's own."""
    from megasparse.training.finetuning import finetune_words, warmup_words

    words = finetune_words(arguments.model, dense=arguments.dense)
    for field, paths in (("train", arguments.data), ("valid", arguments.valid)):
        if paths:
            words.append(f"data.{field}={json.dumps([{'path': path} for path in paths])}")
    if arguments.teacher is not None:
        words.append(f"distillation.teacher={json.dumps(str(arguments.teacher))}")
    return words + warmup_words(RECIPE, arguments.config, [*words, *overrides])


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER", help="model folder to start from")
    data = "supervised data to learn (tools/preprocess_data.py); may be repeated"
    parser.add_argument("--data", required=True, action="append", metavar="PREFIX", help=data)
    valid = "data to validate on (default: a share of --data, data.valid_fraction)"
    parser.add_argument("--valid", action="append", metavar="PREFIX", help=valid)
    teacher = "model folder of a teacher, see the settings of the section distillation"
    parser.add_argument("--teacher", type=Path, metavar="FOLDER", help=teacher)
    dense = "train all weights, zeros and masked ones too, as after sparse pretraining (SPDF)"
    parser.add_argument("--dense", action="store_true", help=dense)
    recipe = "YAML file that wins over the recipe; may be repeated"
    parser.add_argument("--config", action="append", default=[], type=Path, metavar="FILE", help=recipe)
    return parser.parse_known_args()


if __name__ == "__main__":
    main()
