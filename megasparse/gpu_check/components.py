"""Section `components`: what surrounds the kernels, on the GPU against the CPU.

Loss of the head in chunks and optimizer steps within the rounding of their dtype; a topology update and its index lists
bit for bit: ranks may sit on different devices, and a resumed run must find the topology of another machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megasparse.config.loader import load_config
from megasparse.engine.optimizer import MaskedAdamW
from megasparse.gpu_check.context import Context
from megasparse.gpu_check.numerics import compare
from megasparse.kernels.block_sparse import build_index
from megasparse.layers import HeadInChunks, Linear, Vocabulary
from megasparse.parallel import TensorParallel
from megasparse.sparsity.evolution import LayerPiece, evolve, step_counts
from megasparse.utils.dtypes import dtype_name

Results = dict[str, Tensor]
Make = Callable[[str], Results]
"""Device -> results by name, from the same inputs on every device."""


def run(context: Context) -> None:
    cases = _cases(context.rehearse)
    for name, settings, make, tolerance in context.in_time(cases, "components"):
        compare(context, name, settings, partial(_compare, make, context.device, tolerance))


def _cases(rehearse: bool) -> list[tuple[str, dict[str, Any], Make, float]]:
    """Name, settings, what makes the results, and the tolerance: 0 for equal bits.

    The tolerance is relative to the largest value. Loss: sums of float32 in another order, 1e-5; bfloat16 logits carry
    2^-9 of their size, and gradients some such roundings, 2^-5. Optimizer: 20 steps, fused and not, 2e-6.
    """
    dtypes = {torch.float32: 1e-5} if rehearse else {torch.float32: 1e-5, torch.bfloat16: 2**-5}
    found: list[tuple[str, dict[str, Any], Make, float]] = [
        ("head loss", {"dtype": dtype_name(dtype)}, partial(_head_loss, dtype, rehearse), tolerance)
        for dtype, tolerance in dtypes.items()
    ]
    for by_weight in (False, True):
        settings = {"per_weight_step_counts": by_weight}
        found.append(("optimizer", settings, partial(_optimizer, by_weight), 2e-6))
    for ties in (False, True):
        units = 2**10 if rehearse else 2**20
        found.append(("topology", {"units": units, "equal_scores": ties}, partial(_topology, units, ties), 0.0))
    sides = (24, 40) if rehearse else (500, 700)
    found.append(("index lists", {"rows": sides[0], "columns": sides[1]}, partial(_lists, sides), 0.0))
    return found


def _compare(make: Make, device: str, tolerance: float) -> dict[str, float]:
    there, again, here = make(device), make(device), make("cpu")
    worst, differing = 0.0, 0.0
    for name, expected in here.items():
        got = there[name].cpu()
        differing += float((got != again[name].cpu()).sum())
        error = (got.double() - expected.double()).abs()
        bound = tolerance * float(expected.double().abs().max()) + 1e-300
        # Infinity in place of NaN, which a maximum might pass over.
        worst = max(worst, float("inf") if bool(error.isnan().any()) else float(error.max()) / bound)
    return {"error_over_bound": worst, "unequal_bits": differing}


def _head_loss(dtype: torch.dtype, rehearse: bool, device: str) -> Results:
    vocabulary, rows, width, tokens = (43, 48, 16, 21) if rehearse else (50257, 50304, 256, 255)
    generator = torch.Generator().manual_seed(0)
    head = Linear("head", width, rows, bias=False, init_std=0.1).to(device, dtype)
    x = torch.randn(1, tokens, width, generator=generator).to(device, dtype).requires_grad_()
    targets = torch.randint(vocabulary, (1, tokens), generator=generator).to(device)
    # Chunks of a third of the tokens.
    chunked = HeadInChunks(head, Vocabulary(vocabulary, rows, TensorParallel()), chunk_elements=tokens // 3 * rows)
    loss = chunked(x, chunked.vocabulary.next_token_losses(targets))
    dx, dweight = torch.autograd.grad(loss, (x, head.weight))
    return {"loss": loss.detach()[None], "dx": dx, "dweight": dweight}


def _optimizer(by_weight: bool, device: str) -> Results:
    config = load_config([], [f"sparsity.per_weight_step_counts={str(by_weight).lower()}"])
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(96, 64, generator=generator).to(device))
    groups = [{"name": "all", "params": [weight], "weight_decay": 0.2, "masked": True, "rules": {}}]
    optimizer = MaskedAdamW(groups, config.optimizer, config.sparsity)
    for _ in range(20):
        weight.grad = torch.randn(weight.shape, generator=generator).to(device)
        optimizer.step()
    state = optimizer.state[weight]
    return {"weight": weight.detach(), "first": state["exp_avg"], "second": state["exp_avg_sq"]}


def _topology(units: int, ties: bool, device: str) -> Results:
    """Two layers, one of a quarter of the units; equal_scores: many units score the same, so that hashes decide."""
    generator = torch.Generator().manual_seed(2)
    layers = []
    for stream, count in enumerate((units, units // 4)):
        drop, growth = (torch.rand(count, generator=generator) for _ in range(2))
        if ties:
            drop, growth = (drop * 4).floor(), (growth * 4).floor()
        active = torch.rand(count, generator=generator) < 0.4
        counts = step_counts(int(active.sum()), count // 3, count, drop_fraction=0.3, gradient_share=0.75)
        places, active, drop, growth = (each.to(device) for each in (torch.arange(count), active, drop, growth))
        layers.append(LayerPiece(stream, places, active, drop, growth, counts))
    evolved = evolve(layers, seed=3, step=4)
    kinds = {"kept": [layer.kept for layer in evolved], "grown": [layer.grown for layer in evolved]}
    return {f"{kind} {number}": mask for kind, masks in kinds.items() for number, mask in enumerate(masks)}


def _lists(sides: tuple[int, int], device: str) -> Results:
    mask = torch.rand(sides, generator=torch.Generator().manual_seed(5)) < 0.2
    mask[1], mask[2] = True, False
    index = build_index(mask.to(device), 16)
    return {str(number): values for number, values in enumerate(index.lists)}
