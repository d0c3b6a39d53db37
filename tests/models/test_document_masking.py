"""A sample of several documents under document masking is the same as each of them alone."""

from __future__ import annotations

import pytest
import torch
from next_token import next_token_loss

from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.layers import LayerFactory
from megasparse.layers.embedding import document_starts
from megasparse.models import GPT

V, T, STRIDE = 31, 24, 4
SHAPE = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 6, "seq_length": T, "init_std": 0.3}
STYLES = {"learned": {}, "rope": {"position_embedding": "rope", "num_key_value_heads": 2}}
BY_DISTANCE = [("full", "sparse", "local", "sparse", "local", "strided")] * 2
# Blocks of `fixed` are counted from the beginning of the sample: documents that begin with a block keep theirs.
WITH_FIXED = [("full", "fixed", "local", "fixed", "sparse", "strided"), ("fixed",) * 6]
LAYOUTS = {
    "any": (BY_DISTANCE, [[7, 1, 11, 5], [24], [1, 22, 1]]),
    "blocks": (WITH_FIXED, [[8, 4, 12], [4, 20], [12, 8, 4]]),
}


def build(style: str, patterns: list, **options) -> GPT:
    factory = LayerFactory(seed=2)
    model = GPT(ModelConfig(**SHAPE, **STYLES[style]), AttentionConfig(stride=STRIDE), V, factory, **options)
    model.set_attention_patterns(patterns)
    return model.double()


def numbered(layout: list[list[int]]) -> torch.Tensor:
    """Document numbers [B, T] with gaps, as empty documents leave them."""
    rows = [torch.arange(len(row)).mul(3).add(5).repeat_interleave(torch.tensor(row)) for row in layout]
    return torch.stack(rows)


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def one_by_one(model: GPT, tokens: torch.Tensor, targets: torch.Tensor, layout: list[list[int]]) -> float:
    """Mean loss over all tokens of the documents, each in a forward pass of its own, with its gradients."""
    total = 0.0
    for row, lengths in enumerate(layout):
        start = 0
        for length in lengths:
            piece = slice(row, row + 1), slice(start, start + length)
            loss = next_token_loss(model, tokens[piece], targets[piece]) * length / tokens.numel()
            loss.backward()
            total, start = total + float(loss.detach()), start + length
    return total


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kernel", ["reference", "tiled"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_documents_in_a_sample_train_as_documents_alone(name, style, kernel, recompute) -> None:
    """Learned positions must begin anew for that; rotary ones know distances only. All but the loss is float64."""
    patterns, layout = LAYOUTS[name]
    options = {"attention_kernel": kernel, "recompute": recompute, "reset_positions": style == "learned"}
    packed, alone = build(style, patterns, **options), build(style, patterns)
    tokens, targets = torch.randint(V, (len(layout), T)), torch.randint(V, (len(layout), T))
    loss = next_token_loss(packed, tokens, targets, numbered(layout))
    loss.backward()
    loss = loss.detach()
    assert float(loss) == pytest.approx(one_by_one(alone, tokens, targets, layout), rel=3e-6)
    expected = gradients(alone)
    for parameter, gradient in gradients(packed).items():
        tolerance = 1e-6 * float(expected[parameter].abs().max())
        torch.testing.assert_close(gradient, expected[parameter], rtol=0, atol=tolerance, msg=parameter)
    # Without masking the documents see each other.
    assert abs(float(next_token_loss(packed, tokens, targets).detach()) - float(loss)) > 1e-3


@pytest.mark.parametrize("kernel", ["reference", "tiled"])
@pytest.mark.parametrize("style", STYLES)
def test_no_token_sees_another_document_wherever_it_begins(style, kernel) -> None:
    """Also under `fixed`, and with positions that go on: other documents are changed in every token."""
    layout = LAYOUTS["any"][1][:1] * 2
    model, documents = build(style, WITH_FIXED, attention_kernel=kernel), numbered(layout)
    tokens = torch.randint(V, (2, T))
    for number in documents.unique().tolist():
        here = documents == number
        others = torch.where(here, tokens, (tokens + 1) % V)
        before, after = (model(x, documents_BT=documents)[here] for x in (tokens, others))
        torch.testing.assert_close(before, after, rtol=0, atol=1e-12)
        if number > documents.min():
            assert (model(tokens)[here] - model(others)[here]).abs().max() > 1e-3


def test_positions_go_on_unless_they_are_reset() -> None:
    layout, tokens = [[9, 15]], torch.randint(V, (1, T))
    logits = {}
    for reset in (False, True):
        model = build("learned", BY_DISTANCE, reset_positions=reset)
        logits[reset] = model(tokens, documents_BT=numbered(layout))
    torch.testing.assert_close(logits[True][:, 9:], model(tokens[:, 9:]), rtol=0, atol=1e-12)
    torch.testing.assert_close(logits[True][:, :9], logits[False][:, :9], rtol=0, atol=1e-12)
    assert (logits[True][:, 9:] - logits[False][:, 9:]).abs().max() > 1e-3


def test_document_starts() -> None:
    for layout in ([row] for row in LAYOUTS["any"][1]):
        expected = [sum(layout[0][:i]) for i, length in enumerate(layout[0]) for _ in range(length)]
        assert document_starts(numbered(layout)).tolist() == [expected]
