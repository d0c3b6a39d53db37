"""Decoding by packed weights on a CPU against dense ones: float32, bfloat16 and int8, unstructured and in blocks.

    python benchmarks/sparse_decoding.py [--threads 2] [--sparsities 0.5 0.75 0.9] [--batch 1] [--prompt 256]

A random model of 400 MB of float32 weights in its blocks, so that memory is the limit, is pruned at random and decodes
some tokens greedily; it also reads a prompt at once. In each round every contender takes its turn; numbers are medians.
The break-even sparsity of a format is where a straight line through its times by density meets the dense one of the
same values: float32 and bfloat16 of torch, int8 of our own rows without a mask, or of torch's where that is faster.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from result_file import RESULTS, write_result
from torch import Tensor, nn

from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.inference.compression import compress_model
from megasparse.inference.generation import generate
from megasparse.kernels.common.medians import medians
from megasparse.launching.host_memory import use_huge_pages
from megasparse.layers import LayerFactory, Linear
from megasparse.models.gpt import GPT

VOCABULARY = 256
VALUES = ("fp32", "bf16", "int8")


@dataclass
class Contender:
    """A model, and what is known of it."""

    name: str
    model: GPT
    facts: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    arguments = parse_arguments()
    use_huge_pages(os.environ)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    contenders = make_contenders(arguments)
    decode, prefill = (measure(contenders, run, arguments.rounds) for run in passes(arguments))
    rows = []
    for i, contender in enumerate(contenders):
        row = {"name": contender.name, **contender.facts, "milliseconds_per_token": 1e3 * decode[i] / arguments.tokens}
        row |= {"prompt_milliseconds": 1e3 * prefill[i], "speedup": decode[0] / decode[i]}
        row["prompt_speedup"] = prefill[0] / prefill[i]
        rows.append(row)
        print(f"{row['name']:32} {row['milliseconds_per_token']:8.2f} ms a token, {row['speedup']:5.2f}x", flush=True)
    settings = {name: getattr(arguments, name) for name in ("threads", "batch", "tokens", "prompt", "layers", "width")}
    numbers = {**settings, "results": rows, "break_even_sparsity": break_even(rows)}
    print(numbers["break_even_sparsity"])
    suffix = f"{arguments.threads}-threads-batch{arguments.batch}"
    print(write_result("sparse_decoding", numbers, suffix=suffix, folder=arguments.results).name)


def make_contenders(arguments: argparse.Namespace) -> list[Contender]:
    """Dense ones first, of which the first is what speed is compared with."""
    dense = random_model(arguments.layers, arguments.width)
    found = [
        Contender("dense fp32", dense),
        Contender("dense bf16", copy.deepcopy(dense).to(torch.bfloat16)),
        packed("dense int8", dense, "int8"),
    ]
    other, reason = with_torchs_int8(dense)
    if reason is None:
        found.append(Contender("dense int8, torch", other))
    else:
        print(f"torch's dynamic quantisation cannot run here: {reason}")
    for side, sparsities in ((1, arguments.sparsities), (arguments.block_size, arguments.block_sparsities)):
        for sparsity in sparsities:
            model = pruned(dense, 1 - sparsity, side)
            shape = "unstructured" if side == 1 else f"blocks of {side}"
            for values in VALUES:
                found.append(packed(f"{sparsity:.0%} {shape} {values}", model, values))
                found[-1].facts |= {"sparsity": sparsity, "format": shape, "values": values}
    return found


def random_model(layers: int, width: int) -> GPT:
    heads = width // 64
    config = ModelConfig(num_layers=layers, hidden_size=width, num_attention_heads=heads, seq_length=1024, bias=False)
    return GPT(config, AttentionConfig(), VOCABULARY, LayerFactory(seed=1, dense="torch")).eval()


def linear_layers(model: GPT) -> dict[str, Linear]:
    return {layer.name: layer for layer in model.layers.modules() if isinstance(layer, Linear)}


def pruned(model: GPT, density: float, side: int) -> GPT:
    """A copy with units at random; exact zeros elsewhere."""
    model = copy.deepcopy(model)
    for layer in linear_layers(model).values():
        rows, columns = (size // side for size in layer.weight.shape)
        mask = (torch.rand(rows, columns) < density).repeat_interleave(side, 0).repeat_interleave(side, 1)
        layer.weight.data.mul_(mask)
    return model


@torch.no_grad()
def packed(name: str, model: GPT, values: str) -> Contender:
    """A copy with its layers packed, and how far its logits are from those of the dense products of the same model."""
    text = torch.arange(8)[None] % VOCABULARY
    expected, model = model(text), copy.deepcopy(model)
    quantized = {}
    for layer in linear_layers(model).values():
        if values == "bf16":
            layer.weight.data = layer.weight.data.to(torch.bfloat16)
        if values == "int8":
            quantized[layer.name] = to_int8(layer.weight.data)
    plan = compress_model(model, "auto" if values == "int8" else "sparse", quantized)
    difference = float((model(text) - expected).abs().max() / expected.abs().max())
    bytes_at_rest = sum(layer.num_bytes for layer in plan.layers)
    return Contender(name, model, {"megabytes": bytes_at_rest / 1e6, "logits_difference": difference})


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values and a scale for each row, whose largest entry becomes 127."""
    scales = weight.abs().amax(1).clamp_min(1e-30) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales


def with_torchs_int8(model: GPT) -> tuple[GPT, str | None]:
    """A copy with torch's dynamically quantised layers, or why there is none."""
    model = copy.deepcopy(model)
    for name, layer in linear_layers(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = layer.weight
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, plain)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
            model(torch.zeros(1, 1, dtype=torch.int64))
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return model, str(error).splitlines()[0]
    return model, None


def passes(arguments: argparse.Namespace) -> tuple[Callable[[GPT], object], Callable[[GPT], object]]:
    """Decoding of some tokens, and a prompt."""
    start = torch.zeros(arguments.batch, 1, dtype=torch.int64)
    text = torch.randint(VOCABULARY, (1, arguments.prompt))

    def decode(model: GPT) -> None:
        generate(model, start, arguments.tokens, temperature=0)

    @torch.no_grad()
    def prefill(model: GPT) -> None:
        model(text)

    return decode, prefill


def measure(contenders: list[Contender], run: Callable[[GPT], object], rounds: int) -> list[float]:
    started = time.perf_counter()
    turns = [lambda model=contender.model: run(model) for contender in contenders]
    found = [seconds.host for seconds in medians(turns, "cpu", rounds)]
    print(f"{rounds} rounds in {time.perf_counter() - started:.0f} s", flush=True)
    return found


def break_even(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Sparsity by format and values; None where it was not reached between none and all; below 0: always faster."""
    dense: dict[str, float] = {}
    for row in rows:
        if row["name"].startswith("dense"):
            values = row["name"].split()[1].strip(",")
            dense[values] = min(row["milliseconds_per_token"], dense.get(values, np.inf))
    found: dict[str, float | None] = {}
    for form, values in sorted({(row["format"], row["values"]) for row in rows if "format" in row}):
        own = [row for row in rows if (row.get("format"), row.get("values")) == (form, values)]
        if len(own) < 2:
            continue
        points = [1 - row["sparsity"] for row in own], [row["milliseconds_per_token"] for row in own]
        slope, start = np.polyfit(*points, 1)
        # Without a slope that says more than noise, all densities are as good.
        density = (dense[values] - start) / slope if slope > 0 else np.inf * np.sign(dense[values] - np.mean(points[1]))
        found[f"{form} {values}"] = None if density < 0 else round(max(1 - float(density), 0.0), 3)
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024, help="a multiple of 64; 8 layers of 1,024 are 403 MB")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.75, 0.9], help="unstructured")
    parser.add_argument("--block-sparsities", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8, help="decoded in a round")
    parser.add_argument("--prompt", type=int, default=256, help="tokens that are read at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=type(RESULTS), default=RESULTS, help="folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
