"""Fine-tuning of all weights, LoRA of the library peft, Sparse Matrix Tuning and SpIEL from one start on the same data.

    python benchmarks/adapters.py --work work/adapters                              # minutes on a CPU
    python benchmarks/adapters.py --work work/adapters --task sst2 --rates 3e-4 1e-3 3e-3 --seeds 1 2 3 4 5
    python benchmarks/adapters.py --work work/adapters --model models/gpt2 --data data/tasks/train \
        --valid data/tasks/valid --test data/tasks/test.jsonl --kind classification

LoRA, SMT and SpIEL train as many parameters, those of LoRA's `--rank`; SMT as whole blocks, so that it may be a few
more or less. Every arm has every learning rate on `--sweep-seed`, and all `--seeds` with the best by validation loss;
differences are in pairs of runs of the same seed. Without `--model` a byte-level model learns a text first, and the
task is made here; both are the same for all seeds, which decide about order of data and random beginnings.

Each run is a process in the folder `--work`, with a file of its results; started again with the same settings, the
script goes on with what is missing. `--arms` without `lora` needs no peft. Bytes are counted on tensors: gradients and
optimizer state at the end, and the most that they and what a method keeps came to (the warm-up of SMT holds all
matrices). Seconds are of the training steps, without validation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from adapter_arms import CountedBytes, lora_method, low_rank_parameters, tuned_matrices
from adapter_start import prepare, run_script
from adapter_table import best_rate, table
from result_file import RESULTS, write_result

from megasparse.config.loader import load_config
from megasparse.config.schema import RunConfig
from megasparse.launching import LaunchEnvironment
from megasparse.models.build import build_model
from megasparse.training.finetuning import finetune_words
from megasparse.training.run import pretrain
from megasparse.utils.files import make_folders, write_at_once

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
RECIPE = ROOT / "configs" / "finetune" / "default.yaml"
ARMS = ("full", "lora", "smt", "spiel", "spiel-ma")
SAVES = 4
"""Checkpoints of a run, for one that is interrupted."""


def main() -> None:
    arguments = parse_arguments()
    if arguments.only:
        arm, rate, seed = arguments.only[0], float(arguments.only[1]), int(arguments.only[2])
        numbers = json.dumps(train(arguments, arm, rate, seed), indent=2) + "\n"
        write_at_once(result_of(arguments, arm, rate, seed), numbers)
        return
    if "lora" in arguments.arms:
        lora_method(Path(), arguments.rank)
    if not arguments.given:
        prepare(arguments)
    make_folders(arguments.work / "results")
    rows: list[dict[str, Any]] = []
    for arm in arguments.arms:
        rates = arguments.rates
        if len(rates) > 1:
            rates = [best_rate(measured(arguments, rows, arm, rate, arguments.sweep_seed) for rate in rates)]
        for seed in arguments.seeds:
            measured(arguments, rows, arm, rates[0], seed)
    of_seeds = [row for row in rows if row["seed"] in arguments.seeds]
    print(table(of_seeds, arguments.arms))
    print(write_rows(arguments, rows))


def measured(
    arguments: argparse.Namespace, rows: list[dict[str, Any]], arm: str, rate: float, seed: int
) -> dict[str, Any]:
    """The numbers of a run, which is made unless it has been; they join `rows`, and these the file of results."""
    if known(arguments, arm, rate, seed) is None:
        print(f"{arm}, rate {rate:g}, seed {seed} ...", flush=True)
        log = result_of(arguments, arm, rate, seed).with_suffix(".log")
        run_script([__file__, *sys.argv[1:], "--only", arm, str(rate), str(seed)], log)
    row = known(arguments, arm, rate, seed)
    assert row is not None
    rows.append(row)
    write_rows(arguments, rows)
    return row


def write_rows(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> Path:
    """The file of results, as far as there are any."""
    numbers = {"settings": settings(arguments), "results": rows}
    return write_result("adapters", numbers, suffix=arguments.name, folder=arguments.results)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every arm has; a result of others is not taken up."""
    names = ("rank", "block_size", "steps", "batch", "threads")
    paths = {name: str(getattr(arguments, name)) for name in ("model", "data", "valid", "test")}
    of_task = ("task", "examples", "test_examples", "start_steps", "layers", "hidden_size")
    made = {} if arguments.given else {name: getattr(arguments, name) for name in of_task}
    return {name: getattr(arguments, name) for name in names} | paths | {"kind": arguments.kind} | made


def result_of(arguments: argparse.Namespace, arm: str, rate: float, seed: int) -> Path:
    return arguments.work / "results" / f"{arguments.name}-{arm}-{rate:g}-{seed}.json"


def known(arguments: argparse.Namespace, arm: str, rate: float, seed: int) -> dict[str, Any] | None:
    path = result_of(arguments, arm, rate, seed)
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found["numbers"] if found.get("settings") == settings(arguments) else None


def train(arguments: argparse.Namespace, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """A run of an arm, or what is left of it."""
    os.environ["DS_ACCELERATOR"] = arguments.device
    torch.set_num_threads(arguments.threads)
    methods = [lora_method(arguments.model, arguments.rank)] if arm == "lora" else []
    config = load_config([RECIPE], words_of(arguments, arm, rate, seed))
    environment = LaunchEnvironment.from_variables(os.environ)
    summary = pretrain(config, environment, methods=[*methods, CountedBytes])
    numbers = {
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "trained": summary["parameters"],
        "validation_loss": summary["val_loss"],
        "accuracy": summary.get("task_accuracy"),
        "gradient_bytes": summary["adapter_bytes"]["gradients"],
        "optimizer_bytes": summary["adapter_bytes"]["optimizer"],
        "peak_bytes": summary["adapter_bytes"]["peak"],
        "seconds": summary["seconds"],
    }
    return {"settings": settings(arguments), "numbers": numbers}


def words_of(arguments: argparse.Namespace, arm: str, rate: float, seed: int) -> list[str]:
    """Overrides of the recipe for an arm."""
    # Settings that were tried before, in runs of other names, are not gone on with.
    digest = f"{hash_of(settings(arguments)):08x}"
    common = [
        *finetune_words(arguments.model, dense=True),
        f"run.folder={arguments.work / 'runs'}",
        f"run.name={arm}-{rate:g}-{seed}-{digest}",
        f"run.seed={seed}",
        f"data.train={json.dumps([{'path': str(arguments.data)}])}",
        f"data.valid={json.dumps([{'path': str(arguments.valid)}])}",
        f"optimizer.lr={rate}",
        f"optimizer.warmup_steps={min(20, arguments.steps // 5)}",
        *(f"train.{name}={value}" for name, value in training(arguments).items()),
        "deepspeed.zero_stage=0",
    ]
    if arguments.test is not None:
        common += [f"task.path={arguments.test}", f"task.kind={arguments.kind}"]
        common += ["task.marker='####'", "task.max_tokens=96"] if arguments.kind == "answer" else []
    if arm == "lora":
        return [word for word in common if not word.startswith("train.init_from=")]
    density = equal_density(load_config([RECIPE], common), arguments.rank)
    own = {
        "full": [],
        "smt": [f"smt.density={density}", f"smt.block_size={arguments.block_size}"],
        "spiel": [f"spiel.density={density}"],
        "spiel-ma": [f"spiel.density={density}", "spiel.variant=moment_approximation"],
    }[arm]
    own += [f"smt.warmup_steps={max(arguments.steps // 10, 2)}"] if arm == "smt" else []
    return [*common, *own]


def training(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "steps": arguments.steps,
        "global_batch_size": arguments.batch,
        "micro_batch_size": arguments.batch,
        "precision": "fp32",
        "valid_interval": 0,
        "valid_samples": 1000,
        "save_interval": max(arguments.steps // SAVES, 1),
        "resume": "auto",
        "trackers": "[]",
    }


def equal_density(config: RunConfig, rank: int) -> float:
    """With which as many entries are trained as parameters by LoRA."""
    with torch.device("meta"):
        model = build_model(config, config.model.vocab_size or 0)
    entries = sum(layer.in_features * layer.out_features for layer in tuned_matrices(model).values())
    return low_rank_parameters(model, rank) / entries


def hash_of(values: dict[str, Any]) -> int:
    """Four bytes that settings share with nearly no others."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, start, runs and results of the arms")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[1e-3, 3e-3], help="learning rates of every arm; one is not swept"
    )
    parser.add_argument("--rank", type=int, default=4, help="of LoRA (default: 4)")
    parser.add_argument("--block-size", type=int, default=16, help="of SMT (default: 16)")
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning (default: 200)")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step (default: 8)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="of runs at the best rate (default: 1)")
    parser.add_argument(
        "--sweep-seed", type=int, default=0, help="on which rates are tried, none of the others (default: 0)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the file of all arms")
    given = parser.add_argument_group("a model and a task that are there")
    given.add_argument("--model", type=Path, help="model folder")
    given.add_argument("--data", type=Path, help="prefix of supervised data (tools/preprocess_data.py)")
    given.add_argument("--valid", type=Path, help="prefix of the same for the validation loss")
    given.add_argument("--test", type=Path, help="JSON lines for the accuracy")
    given.add_argument("--kind", choices=("classification", "answer"), default="classification")
    made = parser.add_argument_group("otherwise")
    made.add_argument("--task", choices=("arithmetic", "sst2"), default="arithmetic")
    made.add_argument("--examples", type=int, default=2000, help="to learn from (default: 2000)")
    made.add_argument("--test-examples", type=int, default=500, help="of arithmetic; SST-2 has its own (default: 500)")
    made.add_argument("--text", type=Path, default=SHARED / "tinyshakespeare" / "input.txt", help="to learn first")
    made.add_argument("--start-steps", type=int, default=300, help="steps on the text (default: 300)")
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    check(parser, arguments)
    return arguments


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Complete the arguments, or end with what the user must mend."""
    if min(arguments.rank, arguments.steps // 10, arguments.batch, arguments.threads) < 1:
        parser.error("--rank, --batch, --threads must be 1 or more, --steps 10 or more")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        parser.error(f"--seeds: {arguments.seeds}; must be different ones")
    if len(arguments.rates) > 1 and arguments.sweep_seed in arguments.seeds:
        parser.error(f"--sweep-seed: {arguments.sweep_seed}; must be none of --seeds, whose rate it decides")
    arguments.given = arguments.model is not None
    if arguments.given:
        if arguments.data is None or arguments.valid is None:
            parser.error("--model: must come with --data and --valid")
        arguments.name = arguments.model.name
        for name in ("model", "data", "valid", "test"):
            path = getattr(arguments, name)
            setattr(arguments, name, None if path is None else path.resolve())
        return
    if not arguments.text.is_file():
        parser.error(f"--text: {arguments.text}: no such file; must be a text for the model to learn first, or --model")
    task = f"{arguments.task}-{arguments.examples}-{arguments.test_examples}"
    widths = f"{arguments.layers}x{arguments.hidden_size}-{arguments.start_steps}-{arguments.text.stem}"
    folder = arguments.work / "data" / task
    arguments.name, arguments.text = arguments.task, arguments.text.resolve()
    arguments.data, arguments.valid, arguments.test = folder / "train", folder / "valid", folder / "test.jsonl"
    arguments.model = arguments.work / "start" / widths / "model"
    arguments.kind = "answer" if arguments.task == "arithmetic" else "classification"


if __name__ == "__main__":
    main()
