#!/usr/bin/env python3
"""Memory and time of converting a model of a billion parameters, in each direction, by the tool as a user starts it.

    python benchmarks/conversion_memory.py [--layers 16] [--folder /tmp]

Writes random float32 weights in the shape of Llama 3.2 1B (tied head, 128,256 entries), tensor by tensor; converts them
to a model folder, back, and out of a run's checkpoint made of them; compares every tensor with the first. Peak memory
is that of each process (getrusage), files that it maps included. Needs some 25 GB of disk, given back at the end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from measured_tool import apart, measured
from result_file import write_result

from megasparse.checkpoint.model_folder import ModelFolder, model_tensors
from megasparse.checkpoint.saved_state import RunFacts
from megasparse.checkpoint.tensor_files import TensorFiles, TensorFileWriter, TensorSpec
from megasparse.checkpoint.writing import write_checkpoint
from megasparse.config.loader import check_config, save_config
from megasparse.conversion.huggingface.architectures import LLAMA, entries
from megasparse.conversion.huggingface.settings import read_settings
from megasparse.conversion.huggingface.tensors import their_shapes

LIMIT_GB = 3.0
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}


def write_random(folder: Path, num_layers: int) -> int:
    """A folder of transformers with random weights; returns the number of parameters."""
    values = {**SHAPE, "num_hidden_layers": num_layers}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    expected = model_tensors(check_config(read_settings(values)[1]))
    shapes = {
        name: shape
        for entry in entries(LLAMA, expected)
        for name, shape in zip(entry.theirs, their_shapes(entry, expected[entry.ours]), strict=True)
    }
    specs = {name: TensorSpec(shape, torch.float32) for name, shape in shapes.items()}
    writer = TensorFileWriter(folder, specs, {"format": "pt"})
    generator = torch.Generator().manual_seed(0)
    for name, spec in specs.items():
        writer.write(name, torch.empty(spec.shape).uniform_(-0.05, 0.05, generator=generator))
    writer.close()
    return sum(spec.num_bytes for spec in specs.values()) // 4


def write_run(run_folder: Path, model_folder: Path) -> None:
    """A run's folder with a checkpoint, before the first step, of the weights of a model folder."""
    source = ModelFolder(model_folder)
    run_folder.mkdir()
    save_config(source.config, run_folder / "config.yaml")
    write_checkpoint(_Weights(source), run_folder)


class _Weights:
    """A model folder as the state of a run."""

    step = 0

    def __init__(self, source: ModelFolder) -> None:
        self._source = source
        self.shapes = {name: source.shape(name) for name in source.names}
        self.facts = RunFacts(0, source.config.model.model_dump(mode="json"), {}, [])

    def kinds(self, name: str) -> list[str]:
        return ["fp32"]

    def tensor(self, name: str, kind: str) -> torch.Tensor:
        return self._source.tensor(name)

    def topology(self) -> dict[str, torch.Tensor]:
        return {}

    def loss_scaler(self) -> dict[str, float]:
        return {}


def same_tensors(a: Path, b: Path) -> bool:
    first, second = TensorFiles(a), TensorFiles(b)
    return first.names == second.names and all(
        torch.equal(first.tensor(name), second.tensor(name)) for name in first.names
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, metavar="N", help="default: 16, a model of 1.24 billion")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where files lie meanwhile")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        parameters = apart(write_random, folder / "theirs", arguments.layers)
        numbers = {"from_huggingface": measured("convert_checkpoint.py",
            "from-huggingface", "--input", folder / "theirs", "--output", folder / "ours"
        )}  # fmt: skip
        numbers["to_huggingface"] = measured(
            "convert_checkpoint.py", "to-huggingface", "--input", folder / "ours", "--output", folder / "again"
        )
        equal = apart(same_tensors, folder / "theirs", folder / "again")
        apart(write_run, folder / "run", folder / "ours")
        numbers["run_to_huggingface"] = measured(
            "convert_checkpoint.py", "to-huggingface", "--input", folder / "run", "--output", folder / "of-run"
        )
        equal = equal and apart(same_tensors, folder / "theirs", folder / "of-run")
    largest = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 4 / 1e9
    for direction, found in numbers.items():
        verdict = "within" if found["peak_gb"] <= LIMIT_GB else "ABOVE"
        print(f"{direction}: peak {found['peak_gb']:.2f} GB, {verdict} {LIMIT_GB} GB; {found['seconds']:.0f} s")
    print(f"{parameters:,} parameters, largest tensor {largest:.2f} GB, every tensor equal: {equal}")
    result = {"parameters": parameters, "largest_tensor_gb": largest, "limit_gb": LIMIT_GB, "tensors_equal": equal}
    print(write_result("conversion_memory", {**result, "conversions": numbers}, suffix=f"{parameters / 1e9:.2f}b-fp32"))


if __name__ == "__main__":
    main()
