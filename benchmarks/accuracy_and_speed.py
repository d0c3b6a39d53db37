"""Size, accuracy on a task and tokens a second of several models side by side: a dense one and what was made of it.

    python benchmarks/accuracy_and_speed.py --task test.jsonl --marker "####" \
        --models dense=models/teacher "75 % gone=runs/tuned-75" "75 % gone, int8=models/tuned-75-int8"

Each model is a run or a model folder and is computed as launch/generate.py does by default (`--kernels auto`); its size
is that of all weights as they then lie in memory. Accuracy is that of launch/evaluate.py. For the speed the models
continue the task's first prompt, one after the other in each round; numbers are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from result_file import RESULTS, write_result

from megasparse.evaluation.run import EvaluationSettings, evaluate
from megasparse.inference.compression import CompressionPlan, compress_model
from megasparse.inference.generation import generate
from megasparse.inference.trained import TrainedModel, open_trained
from megasparse.kernels.common.medians import medians
from megasparse.launching import LaunchEnvironment
from megasparse.launching.host_memory import use_huge_pages
from megasparse.layers.quantized import quantized_layers


def main() -> None:
    arguments = parse_arguments()
    use_huge_pages(os.environ)
    folders = dict(model.split("=", 1) for model in arguments.models)
    torch.set_num_threads(arguments.threads)
    rows, turns = [], []
    for name, folder in folders.items():
        trained = open_trained(Path(folder))
        total = num_bytes(trained)
        plan = compress_model(trained.model, "auto")
        rows.append({"name": name, "megabytes": (total + saved(plan)) / 1e6, "packed_layers": plan.num_packed})
        rows[-1] |= {"layers": plan.lines(), "results": measure_task(Path(folder), arguments)}
        turns.append(lambda trained=trained: decode(trained, arguments.task, arguments.tokens))
    for row, seconds in zip(rows, medians(turns, "cpu", arguments.rounds), strict=True):
        row["tokens_per_second"] = arguments.tokens / seconds.host
        row["speedup"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        print(
            f"{row['name']:32} {row['megabytes']:8.1f} MB, accuracy {row['results']['accuracy']:.3f}, "
            f"{row['tokens_per_second']:7.0f} tokens a second, {row['speedup']:.2f}x"
        )
    numbers = {"threads": arguments.threads, "tokens": arguments.tokens, "task": arguments.task.name, "models": rows}
    print(write_result("accuracy_and_speed", numbers, suffix=arguments.name, folder=arguments.results).name)


def num_bytes(trained: TrainedModel) -> int:
    """Of a model's weights before any is packed; scales come with the packing."""
    quantized = (values.nbytes for values, _ in quantized_layers(trained.model).values())
    return sum(parameter.nbytes for parameter in trained.model.parameters()) + sum(quantized)


def saved(plan: CompressionPlan) -> int:
    """Bytes that packing has added, mostly less than 0."""
    return sum(layer.num_bytes - layer.dense_bytes for layer in plan.layers if layer.is_packed)


def measure_task(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    kind = "answer" if arguments.marker else "classification"
    with tempfile.TemporaryDirectory() as place:
        asked = EvaluationSettings(
            folder,
            kind,
            str(arguments.task),
            marker=arguments.marker,
            limit=arguments.limit,
            output=Path(place) / "found",
        )
        return evaluate(asked, LaunchEnvironment.from_variables({}))["results"]


def decode(trained: TrainedModel, task: Path, tokens: int) -> None:
    """Greedily, as many tokens whatever they say."""
    with task.open(encoding="utf-8") as lines:
        prompt = json.loads(next(lines))["prompt"]
    start = torch.tensor([trained.tokenizer.encode(prompt)])
    generate(trained.model, start, tokens, temperature=0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = "the first is what speed is compared with"
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER", help=models)
    parser.add_argument("--task", type=Path, required=True, help="JSONL of prompts and responses")
    parser.add_argument("--marker", help="before the result of an answer; default: the responses are classes")
    parser.add_argument("--limit", type=int, help="only the first examples")
    parser.add_argument("--name", required=True, help="of the result's file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="decoded in a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
