"""DiscQuant: what is learned is nearer to the teacher than rounding to the nearest level; zeros and levels stay."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
import trained_model

from megasparse.kernels.quantized import QuantizedMatrix, quantized
from megasparse.models.build import build_model
from megasparse.models.gpt import GPT
from megasparse.quantization.discquant import DiscQuantOptions, round_weights

V, T = 64, 24


def divergence(teacher: GPT, student: GPT, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        expected, found = (model(tokens)[..., :V].log_softmax(-1) for model in (teacher, student))
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def with_weights(teacher: GPT, matrices: dict[str, QuantizedMatrix]) -> GPT:
    model = copy.deepcopy(teacher)
    for name, matrix in matrices.items():
        model.get_submodule(name).weight.data = matrix.dequantized()
    return model


def walks(count: int) -> torch.Tensor:
    """Sequences that go through the vocabulary in steps of their own, int64 [count, T + 1]."""
    firsts, steps = torch.randint(V, (count, 1)), torch.randint(1, 8, (count, 1))
    return (firsts + steps * torch.arange(T + 1)) % V


def half_empty_teacher() -> GPT:
    """A model that has learned ``walks``, half of its weights zero."""
    shape = {"hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64}
    model = build_model(trained_model.model_config(num_layers=2, vocab_size=V, **shape), V)
    weights = [weight for name, weight in model.named_parameters() if "layers" in name and weight.dim() == 2]
    masks = [torch.rand_like(weight) < 0.5 for weight in weights]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(121):
        with torch.no_grad():
            for weight, mask in zip(weights, masks, strict=True):
                weight.mul_(mask)
        if step == 120:
            break
        batch = walks(32)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_it_is_nearer_to_the_teacher_than_the_nearest_levels() -> None:
    torch.manual_seed(0)
    teacher = half_empty_teacher()
    weights = {name: weight for name, weight in teacher.named_parameters() if "layers" in name and weight.dim() == 2}
    names = [name.removesuffix(".weight") for name in weights]
    plain = {name: quantized(teacher.get_submodule(name).weight.detach(), 3, 32) for name in names}
    before = {name: teacher.get_submodule(name).weight.detach().clone() for name in names}
    options = DiscQuantOptions(3, 32, steps=80, batch=2, strength=100.0)
    steps: list[int] = []
    found = round_weights(teacher, names, walks(256)[:, :-1], options, steps.append)
    assert sum(steps) == 80 and found.settled > 0.95, found.settled
    for name, matrix in found.matrices.items():
        weight = before[name]
        assert torch.equal(teacher.get_submodule(name).weight, weight), "the teacher has changed"
        assert torch.equal(matrix.scales, plain[name].scales) and not matrix.values[weight == 0].any()
        # One of the two neighbours, each of them: less than a step away.
        step = matrix.scales.repeat_interleave(32, 1)
        assert ((matrix.dequantized() - weight).abs() < step * (1 + 1e-5)).all()
    held_out = walks(64)[:, :-1]
    learned, nearest = (
        divergence(teacher, with_weights(teacher, matrices), held_out) for matrices in (found.matrices, plain)
    )
    assert learned < 0.8 * nearest, (learned, nearest)
