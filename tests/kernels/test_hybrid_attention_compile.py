"""torch.compile over hybrid_attention, the rules that its custom operators must keep, and switches of the pattern."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megasparse.kernels.common.tables import find_nearest
from megasparse.kernels.hybrid_attention import PATTERNS, hybrid_attention, operators, reference
from megasparse.kernels.hybrid_attention.tiles import pattern_tiles

STRIDE = 4
MIXED = ("local", "strided", "fixed", "full")


def inputs(dtype: torch.dtype = torch.float32, seq_length: int = 22) -> list[torch.Tensor]:
    shapes = [(2, seq_length, heads, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch) -> dict[str, tuple]:
    """Arguments of the last call of each operator."""
    seen = {}
    for name in ("attention_forward", "attention_backward"):
        operator = getattr(operators, name)

        def record(*args, name=name, operator=operator):
            seen[name] = args
            return operator(*args)

        monkeypatch.setattr(operators, name, record)
    return seen


@pytest.mark.parametrize(
    ("with_documents", "dtype"),
    [
        (False, torch.float32),
        (True, torch.bfloat16),
        pytest.param(False, torch.bfloat16, marks=pytest.mark.exhaustive),
        pytest.param(True, torch.float32, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize(("pattern", "offset"), [("full", 0), ("sparse", 0), ("strided", 3), ("fixed", 1)])
def test_operators_keep_the_rules(calls, pattern, offset, with_documents, dtype) -> None:
    documents = torch.tensor([[0] * 9 + [1] * 13] * 2) if with_documents else None
    y = hybrid_attention(*inputs(dtype), pattern, STRIDE, "tiled", documents, offsets=offset)
    y.sum().backward()
    assert len(calls) == 2
    for name, arguments in calls.items():
        plain = tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in arguments)
        torch.library.opcheck(getattr(torch.ops.megasparse, name).default, plain)


# At this length `auto` takes the reference, and torch's causal kernel for `full`.
@pytest.mark.parametrize(
    ("kernel", "with_documents"),
    [("auto", True), ("tiled", True), pytest.param("auto", False, marks=pytest.mark.exhaustive)],
)
@pytest.mark.parametrize("patterns", [*PATTERNS, MIXED], ids=str)
def test_compiled_equals_eager(patterns, kernel, with_documents) -> None:
    documents = torch.tensor([[0] * 9 + [1] * 13] * 2) if with_documents else None
    q, k, v = inputs()

    def attend(q, k, v):
        return hybrid_attention(q, k, v, patterns, STRIDE, kernel, documents, offsets=(0, 1, 2, 3))

    results = []
    for run in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        y = run(q, k, v)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), (q, k, v))])
    # Sums of at most 22 terms of order 1, in another order where the kernels differ (`full` with documents).
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)


def test_compiled_for_growing_lengths() -> None:
    compiled = torch.compile(hybrid_attention, fullgraph=True, backend="aot_eager")
    for seq_length in (22, 23, 31):
        tensors = inputs(seq_length=seq_length)
        torch.testing.assert_close(compiled(*tensors, "sparse", STRIDE), hybrid_attention(*tensors, "sparse", STRIDE))


class Layers(nn.Module):
    """Patterns as attributes of layers that share their code, as in a model."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.ones(num_layers))
        self.patterns = [("full",) * 4] * num_layers

    def forward(self, q, k, v):
        for scale, patterns in zip(self.scales, self.patterns, strict=True):
            q = q + scale * hybrid_attention(q, k, v, patterns, STRIDE, offsets=(0, 1, 2, 3))
        return q


def test_one_compilation_for_each_assignment_of_patterns() -> None:
    """Switching to and fro compiles every assignment once and gives what eager execution gives."""
    compiled_graphs = []

    def backend(graph, example_inputs):
        compiled_graphs.append(graph)
        return graph.forward

    module = Layers(3)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assignments = [[("full",) * 4] * 3, [("sparse",) * 4] * 3, [MIXED, ("full",) * 4, MIXED]]
    tensors = inputs()
    for patterns in assignments * 3:
        module.patterns = patterns
        torch.testing.assert_close(compiled(*tensors), module(*tensors))
    assert len(compiled_graphs) == len(assignments)


def test_caches_are_bounded() -> None:
    """Whatever is switched to, what is kept for it has a limit; a switch back makes nothing anew."""
    for cached in (pattern_tiles, find_nearest, reference.cached_mask, reference.cached_offset_mask):
        assert cached.cache_info().maxsize is not None
    q, k, v = (x.detach() for x in inputs(seq_length=24))

    def attend(stride: int) -> None:
        for kernel in ("tiled", "reference"):
            for pattern in PATTERNS:
                hybrid_attention(q, k, v, pattern, stride, kernel, offsets=(0, 1, 2, 3))

    attend(STRIDE)
    caches = pattern_tiles, reference.cached_offset_mask
    misses = [cached.cache_info().misses for cached in caches]
    attend(STRIDE)
    assert [cached.cache_info().misses for cached in caches] == misses
    for stride in range(5, 25):
        attend(stride)
    for cached in (*caches, reference.cached_mask):
        assert cached.cache_info().currsize <= cached.cache_info().maxsize
    # Masks of 1,024 tokens at most, a byte for each pair: 64 MiB.
    assert reference.cached_offset_mask.cache_info().maxsize * reference.LONGEST_CACHED_WITH_OFFSET**2 <= 2**26
