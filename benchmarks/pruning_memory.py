#!/usr/bin/env python3
"""Memory and time of pruning a model of a billion parameters, by the tool as a user starts it.

    python benchmarks/pruning_memory.py [--layers 16] [--method sparsegpt] [--folder /tmp]

Writes random float32 weights in the shape of Llama 3.2 1B (tied head, 128,256 entries) as a model folder, and random
tokens; prunes it to half of the weights and counts the zeros of every layer. Peak memory is that of the process
(getrusage), files that it maps included. Needs some 16 GB of disk, given back at the end.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from measured_tool import apart, measured
from result_file import write_result

from megasparse.checkpoint.model_folder import ModelFolder, ModelFolderWriter, model_tensors
from megasparse.config.loader import check_config
from megasparse.data.indexed import IndexedDatasetWriter

LIMIT_GB = 6.0
VOCABULARY = 128_256
MODEL = {
    "vocab_size": VOCABULARY, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 32,
    "num_key_value_heads": 8, "seq_length": 2048, "tie_embeddings": True, "bias": False, "activation": "swiglu",
    "normalization": "rmsnorm", "position_embedding": "rope",
}  # fmt: skip


def write_random(folder: Path, num_layers: int) -> int:
    """A model folder with random weights; returns the number of parameters."""
    config = check_config({"model": {**MODEL, "num_layers": num_layers}, "sparsity": {"algorithm": "dense"}})
    names = list(model_tensors(config))
    generator, parameters = torch.Generator().manual_seed(0), 0
    with ModelFolderWriter(folder, config, dict.fromkeys(names, torch.float32)) as writer:
        for name in writer.names:
            shape = writer.specs[name].shape
            weight = torch.empty(shape).uniform_(-0.05, 0.05, generator=generator)
            writer.write(name, weight + 1.0 if "norm" in name else weight)
            parameters += weight.numel()
    return parameters


def write_tokens(prefix: Path, count: int) -> None:
    writer = IndexedDatasetWriter(prefix, np.int32, vocab_size=VOCABULARY)
    writer.add_document(np.random.default_rng(0).integers(0, VOCABULARY, count))
    writer.finalize()


def zeros_by_layer(folder: Path) -> dict[str, float]:
    """Share of exact zeros of each matrix of a block."""
    opened = ModelFolder(folder)
    names = [name for name in opened.names if name.startswith("layers.") and len(opened.shape(name)) == 2]
    return {name: 1.0 - int(opened.tensor(name).count_nonzero()) / opened.tensor(name).numel() for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, metavar="N", help="default: 16, a model of 1.24 billion")
    parser.add_argument("--method", choices=("magnitude", "wanda", "sparsegpt"), default="sparsegpt")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="calibration windows (default: 8)")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="their tokens (default: 512)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where files lie meanwhile")
    arguments = parser.parse_args()
    samples, window = arguments.samples, arguments.window
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        parameters = apart(write_random, folder / "dense", arguments.layers)
        words = ["--model", folder / "dense", "--output", folder / "sparse", "--method", arguments.method]
        words += ["--density", "0.5", "--device", "cpu"]
        if arguments.method != "magnitude":
            apart(write_tokens, folder / "tokens", 2 * samples * window)
            words += ["--calibration", folder / "tokens", "--samples", samples, "--window", window]
        numbers = measured("prune.py", *words)
        zeros = apart(zeros_by_layer, folder / "sparse")
    exact = all(share == 0.5 for share in zeros.values())
    verdict = "within" if numbers["peak_gb"] <= LIMIT_GB else "ABOVE"
    print(f"{arguments.method}: peak {numbers['peak_gb']:.2f} GB, {verdict} {LIMIT_GB} GB; {numbers['seconds']:.0f} s")
    print(f"{parameters:,} parameters, {len(zeros)} layers, exactly half of each is 0: {exact}")
    result = {"parameters": parameters, "method": arguments.method, "samples": samples, "window": window}
    result |= {"limit_gb": LIMIT_GB, "half_are_zeros": exact, **numbers}
    print(write_result("pruning_memory", result, suffix=f"{arguments.method}-{parameters / 1e9:.2f}b-fp32"))


if __name__ == "__main__":
    main()
