"""What benchmarks/adapters.py fine-tunes and on what: a byte-level model that has learned a text, and a task.

prepare(arguments)      # arguments.model, .data, .valid and .test are there afterwards
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megasparse.utils.files import make_folders

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


def prepare(arguments: argparse.Namespace) -> None:
    """Make task and start; what is there already is kept."""
    made = [*task_scripts(arguments), *start_scripts(arguments)]
    make_folders(arguments.model.parent)
    make_folders(arguments.data.parent)
    for path, words in made:
        if not path.exists():
            print(f"{' '.join(words[:2])} ...", flush=True)
            run_script(words, arguments.work / "prepare.log")


def task_scripts(arguments: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """What each script makes, and its words, in their order."""
    task = arguments.data.parent
    sizes = ["--train", str(arguments.examples), "--valid", "500", "--output", str(task)]
    own = ["--test", str(arguments.test_examples)]
    if arguments.task == "sst2":
        own = ["--input", str(SHARED / "sst2" / "train.tsv.xz"), str(SHARED / "sst2" / "dev.tsv")]
    made = [(task / "test.jsonl", ["tools/make_tasks.py", arguments.task, *sizes, *own])]
    for split in ("train", "valid"):
        words = ["--supervised", "--input", str(task / f"{split}.jsonl"), "--output-prefix", str(task / split)]
        made.append((task / f"{split}.idx", ["tools/preprocess_data.py", "--tokenizer", "bytes", *words]))
    return made


def start_scripts(arguments: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    start = arguments.model.parent
    text = start / "text"
    encode = ["tools/preprocess_data.py", "--tokenizer", "bytes", "--input", str(arguments.text)]
    learn = [
        *("launch/pretrain.py", "--config", "configs/byte-level.yaml", "sparsity.algorithm=dense"),
        *(f"run.folder={start}", "run.name=run", f"train.steps={arguments.start_steps}", "train.valid_samples=64"),
        *(f"data.{use}={json.dumps([{'path': str(text)}])}" for use in ("train", "valid")),
        f"optimizer.warmup_steps={min(50, arguments.start_steps // 5)}",
        *(f"model.num_layers={arguments.layers}", f"model.hidden_size={arguments.hidden_size}"),
        *("model.seq_length=320", "train.sample_tokens=0"),
    ]
    convert = ["tools/convert_checkpoint.py", "from-run", "--input", str(start / "run")]
    return [
        (text.with_suffix(".idx"), [*encode, "--output-prefix", str(text)]),
        (start / "run" / "summary.json", learn),
        (arguments.model, [*convert, "--output", str(arguments.model)]),
    ]


def run_script(words: Sequence[str], log: Path) -> None:
    """A script in a process of its own; what it says stands in a file."""
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **os.environ}
    with log.open("a", encoding="utf-8") as out:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, stdout=out, stderr=out)
    if done.returncode:
        sys.exit(f"{words[0]} ended with status {done.returncode}; see {log}")
