"""Evaluate a trained model.

    python launch/evaluate.py --run runs/x --task perplexity --input test.txt [--window 1024] [--stride 512]
    python launch/evaluate.py --run runs/x --task last-word --input lambada.jsonl
    python launch/evaluate.py --run runs/x --task answer --marker "####" --input problems.jsonl
    torchrun --standalone --nproc_per_node 8 launch/evaluate.py --model runs/x --task multiple-choice --input quiz.jsonl

Tasks: `perplexity` of a text file, compressed or not, or an indexed data set (prefix of .bin and .idx); `last-word`,
lines {"text": ...}; `multiple-choice`, lines {"context": ..., "choices": [...], "label": 0}. Of lines {"prompt": ...,
"response": ...}: `classification`, the likeliest of the responses; `answer`, the greedy answer, or what stands behind
its marker. Ranks share the work and give the same numbers however many they are. Rank 0 prints a table and writes a
JSON file. What is counted, and how: launch/README.md. `--run` and `--model` are the same; torchrun lets only `--model`
pass. Exit status: 0, 2 for what the user must mend, 3 where another rank was lost.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from megasparse.launching import LaunchEnvironment, leave_warnings_to_rank_0
from megasparse.launching.exit import EXPECTED, explain_and_exit
from megasparse.launching.failures import exit_after_lost_peer, exit_now
from megasparse.launching.host_memory import use_huge_pages
from megasparse.utils.streams import use_utf8


def main() -> int:
    use_utf8()
    arguments = vars(parse_arguments())
    # Also for DeepSpeed, which reads the checkpoints and would search for an accelerator.
    os.environ["DS_ACCELERATOR"] = arguments["device"]
    use_huge_pages(os.environ)
    from megasparse.evaluation.run import EvaluationSettings, evaluate

    rank = 0
    try:
        environment = LaunchEnvironment.from_variables(os.environ)
        rank = environment.rank
        leave_warnings_to_rank_0(rank)
        with exit_after_lost_peer(rank, "start the evaluation again"):
            evaluate(EvaluationSettings(**arguments), environment)
            exit_now(0)
    except EXPECTED as error:
        explain_and_exit(error, rank)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # torchrun takes --run for an abbreviation of an option of its own, also behind the script's name.
    parser.add_argument("--model", "--run", dest="run", required=True, type=Path, metavar="FOLDER", help="run or model")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to take; default: the newest good one")
    tasks = ("perplexity", "last-word", "multiple-choice", "classification", "answer")
    parser.add_argument("--task", required=True, choices=tasks)
    parser.add_argument("--input", required=True, metavar="FILE", help="text, JSONL, or prefix of an indexed data set")
    parser.add_argument("--window", type=int, metavar="N", help="tokens read at once; default: the model's seq_length")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between windows; default: half the window")
    parser.add_argument("--detokenizer", choices=("none", "wikitext", "ptb"), default="none", help="default: none")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N windows or examples")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32")
    parser.add_argument("--batch-size", type=int, metavar="N", help="windows at once; default: by the model's size")
    choices = "classification: responses that compete; default: all that occur"
    parser.add_argument("--choices", nargs="+", metavar="TEXT", help=choices)
    marker = "answer: text before the result, such as '####'; default: the whole answer counts"
    parser.add_argument("--marker", metavar="TEXT", help=marker)
    parser.add_argument("--max-tokens", type=int, metavar="N", help="answer: longest one; default: 256")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0], help=f"default here: {devices[0]}")
    kernels = "of pruned layers on a CPU; auto: sparse where faster; default: auto"
    parser.add_argument("--kernels", choices=("auto", "dense", "sparse"), default="auto", help=kernels)
    output = "default: FOLDER/evaluations/TASK-INPUT-step-N.json"
    parser.add_argument("--output", type=Path, metavar="FILE", help=output)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args()
    del arguments.local_rank
    return arguments


if __name__ == "__main__":
    sys.exit(main())
