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

V, T = trained_model.VOCABULARY, 32


def divergence(teacher: GPT, student: GPT, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        expected, found = (model(tokens)[..., :V].log_softmax(-1) for model in (teacher, student))
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def with_weights(teacher: GPT, matrices: dict[str, QuantizedMatrix]) -> GPT:
    model = copy.deepcopy(teacher)
    for name, matrix in matrices.items():
        model.get_submodule(name).weight.data = matrix.dequantized()
    return model


def half_empty_teacher() -> tuple[GPT, torch.Tensor]:
    """A model that has learned a little of a text, half of its weights zero, and the text's tokens."""
    torch.manual_seed(0)
    config = trained_model.model_config(num_layers=2, hidden_size=32, num_attention_heads=2, ffn_hidden_size=64)
    model = build_model(config, V)
    masks = {
        name: torch.rand_like(weight) < 0.5 for name, weight in model.named_parameters()
        if weight.dim() == 2 and "layers" in name
    }  # fmt: skip
    stream = torch.tensor(list(trained_model.text().encode()), dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        starts = torch.randint(len(stream) - T - 1, (16,)).tolist()
        batch = torch.stack([stream[start : start + T + 1] for start in starts])
        loss = F.cross_entropy(model(batch[:, :-1])[..., :V].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in masks:
                    parameter.mul_(masks[name])
    return model.eval(), stream


def test_it_is_nearer_to_the_teacher_than_the_nearest_levels() -> None:
    teacher, stream = half_empty_teacher()
    weights = {name: weight for name, weight in teacher.named_parameters() if "layers" in name and weight.dim() == 2}
    names = [name.removesuffix(".weight") for name in weights]
    windows = stream[: len(stream) // 2 // T * T].view(-1, T)
    held_out = stream[-60 * T :].view(-1, T)
    plain = {name: quantized(teacher.get_submodule(name).weight.detach(), 3, 32) for name in names}
    before = {name: teacher.get_submodule(name).weight.detach().clone() for name in names}
    options = DiscQuantOptions(3, 32, steps=80, batch=2, lr=0.05)
    steps: list[int] = []
    found = round_weights(teacher, names, windows, options, steps.append)
    assert sum(steps) == 80 and found.settled > 0.95, found.settled
    for name, matrix in found.matrices.items():
        weight = before[name]
        assert torch.equal(teacher.get_submodule(name).weight, weight), "the teacher has changed"
        assert torch.equal(matrix.scales, plain[name].scales) and not matrix.values[weight == 0].any()
        # One of the two neighbours, each of them: less than a step away.
        step = matrix.scales.repeat_interleave(32, 1)
        assert ((matrix.dequantized() - weight).abs() < step * (1 + 1e-5)).all()
    learned, nearest = (
        divergence(teacher, with_weights(teacher, matrices), held_out) for matrices in (found.matrices, plain)
    )
    assert learned < 0.8 * nearest, (learned, nearest)
