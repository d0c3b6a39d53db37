#!/usr/bin/env python3
"""Measures tools/preprocess_data.py: MB of text a second and peak memory, with 1 and 2 processes.

The input is about 100 MB of books from ../shared/data where that exists, or generated text. A 16k BPE tokenizer is
trained on it first. The results of all process counts must be byte-identical. One JSON goes to benchmarks/results.

    python benchmarks/preprocess_data.py --processes 1 2
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import lzma
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOOKS = ROOT.parent / "shared" / "data" / "books" / "train.txt.xz"
REPORT = re.compile(
    r"(?P<documents>[\d,]+) documents, (?P<tokens>[\d,]+) tokens from (?P<megabytes>[\d.]+) MB of text in "
    r"(?P<seconds>[\d.]+) s: (?P<rate>[\d.]+) MB/s .* peak memory (?P<memory>\d+) MB"
)
TIMEOUT_SECONDS = 1800


def write_input(path: Path, megabytes: int, given: Path | None) -> str:
    """Writes the text to measure on; returns what it is, without a path."""
    if given is not None:
        shutil.copyfile(given, path)
        return f"file {given.name}"
    if BOOKS.exists():
        with lzma.open(BOOKS, "rb") as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target, 2**20)
        return "books/train.txt"
    generator = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 10))) for _ in range(20_000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    with open(path, "w", encoding="utf-8") as target:
        while target.tell() < megabytes * 1e6:
            target.write(" ".join(generator.choices(words, weights, k=200)) + ".\n")
    return "generated words, Zipf distributed"


def run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def launcher(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        sys.exit("mpirun was not found; measure with --processes 1")
    options = ["--oversubscribe", "--bind-to", "none", "-np", str(processes)]
    if os.geteuid() == 0:
        options.insert(0, "--allow-run-as-root")
    return [mpirun, *options, sys.executable]


def measure(processes: int, text: Path, model: Path, folder: Path, environment: dict[str, str]) -> dict:
    prefix = folder / f"result-{processes}"
    tool = [str(ROOT / "tools" / "preprocess_data.py"), "--input", str(text), "--tokenizer", "sentencepiece"]
    load = os.getloadavg()[0]
    output = run(
        [*launcher(processes), *tool, "--tokenizer-path", str(model), "--output-prefix", str(prefix)], environment
    )
    found = REPORT.search(output)
    if found is None:
        sys.exit(f"no report in the output of the tool:\n{output}")
    digest = hashlib.sha256()
    for suffix in (".bin", ".idx"):
        path = Path(f"{prefix}{suffix}")
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        path.unlink()
    return {
        "processes": processes,
        "load_average_before": round(load, 2),
        "documents": int(found["documents"].replace(",", "")),
        "tokens": int(found["tokens"].replace(",", "")),
        "input_megabytes": float(found["megabytes"]),
        "seconds": float(found["seconds"]),
        "megabytes_per_second": float(found["rate"]),
        "peak_memory_megabytes_per_process": int(found["memory"]),
        "sha256_of_bin_and_idx": digest.hexdigest(),
    }


def processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="a text file to measure on")
    parser.add_argument("--megabytes", type=int, default=100, help="size of generated text (default: 100)")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output-folder", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, model = folder / "input.txt", folder / "tokenizer.model"
        source = write_input(text, arguments.megabytes, arguments.input)
        trainer = [sys.executable, str(ROOT / "tools" / "train_tokenizer.py"), "--input", str(text)]
        run([*trainer, "--vocab-size", str(arguments.vocab_size), "--output", str(model)], environment)
        runs = [measure(processes, text, model, folder, environment) for processes in arguments.processes]
    if len({entry["sha256_of_bin_and_idx"] for entry in runs}) != 1:
        sys.exit("the results of different process counts differ")
    date = datetime.date.today().isoformat()
    names = ("numpy", "sentencepiece", "mpi4py")
    result = {
        "benchmark": "preprocess_data",
        "date": date,
        "command": "python benchmarks/preprocess_data.py --processes " + " ".join(map(str, arguments.processes)),
        "hardware": {"processor": processor_name(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}},
        "input": source,
        "tokenizer": f"sentencepiece bpe, vocab_size {arguments.vocab_size}",
        "runs": runs,
    }
    short = re.sub(r"[^a-z0-9]+", "-", processor_name().lower()).strip("-")
    arguments.output_folder.mkdir(parents=True, exist_ok=True)
    target = arguments.output_folder / f"preprocess_data_{short}_{date}.json"
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for entry in runs:
        print(
            f"{entry['processes']} process(es): {entry['megabytes_per_second']} MB/s, "
            f"{entry['peak_memory_megabytes_per_process']} MB peak memory a process"
        )
    print(f"wrote {target.name}")


if __name__ == "__main__":
    main()
