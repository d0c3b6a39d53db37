"""torch.compile over the sparse linear layer, and the rules that its custom operators must keep."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

from megasparse.kernels.block_sparse import (
    BlockIndex,
    assign_slots,
    build_index,
    cpu,
    linear,
    pack,
    packed_linear,
    sparse_linear,
)

UNIT, OUT, IN = 16, 48, 32

needs_cpu_kernels = pytest.mark.skipif(
    cpu.why_not("cpu", torch.float32, UNIT) is not None, reason="the C++ kernels cannot be built here"
)
kernels = pytest.mark.parametrize("kernel", ["dense", pytest.param("cpu", marks=needs_cpu_kernels)])


@pytest.fixture
def calls(monkeypatch) -> dict[str, tuple]:
    """Arguments of the last call of each operator."""
    seen = {}
    for name in ("block_sparse_forward", "block_sparse_backward"):
        operator = getattr(linear, name)

        def record(*args, name=name, operator=operator):
            seen[name] = args
            return operator(*args)

        monkeypatch.setattr(linear, name, record)
    return seen


def as_traced(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, index: BlockIndex, kernel: str):
    """What a traced program calls; others need no operators."""
    lists = index.mask, *index.lists
    return linear.SparseLinear.apply(x, weight, bias, None, None, UNIT, False, kernel, None, "torch", *lists)


NEEDS = ((True, True, True), (False, True, False), (True, False, True))


@kernels
@pytest.mark.parametrize(
    ("with_bias", "needs_dx", "needs_dweight"),
    [
        pytest.param(*case, marks=() if case in NEEDS else pytest.mark.exhaustive)
        for case in product((False, True), repeat=3)
    ],
)
def test_operators_keep_the_rules(calls, kernel, with_bias, needs_dx, needs_dweight) -> None:
    mask = torch.rand(OUT // UNIT, IN // UNIT) < 0.6
    mask[0, 0] = True
    x = torch.randn(5, IN, requires_grad=needs_dx)
    weight = torch.randn(OUT, IN) * mask.repeat_interleave(UNIT, 0).repeat_interleave(UNIT, 1)
    weight.requires_grad_(needs_dweight)
    bias = torch.randn(OUT, requires_grad=True) if with_bias else None
    y = as_traced(x, weight, bias, build_index(mask, UNIT), kernel)
    if y.requires_grad:
        y.sum().backward()
    assert len(calls) == 1 + y.requires_grad
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.megasparse, name).default, detached(arguments))


def detached(arguments: tuple) -> tuple:
    return tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in arguments)


def packed_layer(kernel: str) -> tuple[partial[torch.Tensor], list[torch.Tensor]]:
    """A function of (x, weight, bias) in packed storage, and its arguments."""
    mask = torch.rand(OUT // UNIT, IN // UNIT) < 0.6
    mask[0, 0] = True
    index = build_index(mask, UNIT, slot_blocks=assign_slots(mask, mask.numel() + 1))
    arguments = [torch.randn(5, IN), pack(torch.randn(OUT, IN), index.slot_blocks, UNIT), torch.randn(OUT)]
    return partial(packed_linear, index=index, kernel=kernel), [tensor.requires_grad_() for tensor in arguments]


@kernels
def test_operators_keep_the_rules_with_packed_storage(calls, kernel) -> None:
    layer, arguments = packed_layer(kernel)
    as_traced(*arguments, layer.keywords["index"], kernel).sum().backward()
    assert len(calls) == 2
    for name, given in calls.items():
        torch.library.opcheck(getattr(torch.ops.megasparse, name).default, detached(given))


@kernels
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_layer_in_packed_storage_equals_eager(kernel, backend) -> None:
    layer, arguments = packed_layer(kernel)
    torch._dynamo.reset()
    results = []
    for run in (layer, torch.compile(lambda *tensors: layer(*tensors).tanh(), fullgraph=True, backend=backend)):
        y = run(*arguments)
        loss = (y.tanh() if run is layer else y).square().sum()
        results.append([loss.detach(), *torch.autograd.grad(loss, arguments)])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


class Mlp(nn.Module):
    """Two sparse layers with a nonlinearity between them."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = kernel
        self.weights, self.biases, self.indices = nn.ParameterList(), nn.ParameterList(), []
        for outputs, inputs in ((OUT, IN), (IN, OUT)):
            mask = torch.rand(outputs // UNIT, inputs // UNIT) < 0.5
            mask[0, 0], mask[-1, -1] = True, False
            keep = mask.repeat_interleave(UNIT, 0).repeat_interleave(UNIT, 1)
            self.weights.append(nn.Parameter(torch.randn(outputs, inputs) * keep))
            self.biases.append(nn.Parameter(torch.randn(outputs)))
            self.indices.append(build_index(mask, UNIT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight, bias, index in zip(self.weights, self.biases, self.indices, strict=True):
            x = torch.tanh(sparse_linear(x, weight, bias, index, kernel=self.kernel))
        return x


@kernels
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_module_equals_eager(kernel, backend) -> None:
    module = Mlp(kernel)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x = torch.randn(2, 7, IN)
    results = []
    for run in (module, compiled):
        module.zero_grad()
        given = x.clone().requires_grad_()
        y = run(given)
        y.square().sum().backward()
        results.append([y.detach(), given.grad, *(parameter.grad.clone() for parameter in module.parameters())])
    # The same kernels run in both; only their order on the graph could differ.
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


@kernels
def test_compiled_module_follows_a_new_topology(kernel) -> None:
    module = Mlp(kernel)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    x = torch.randn(3, IN)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), module(x))
        compiled(x).sum().backward()
        mask = torch.rand(OUT // UNIT, IN // UNIT) < 0.5
        module.indices[0] = build_index(mask, UNIT)
        keep = mask.repeat_interleave(UNIT, 0).repeat_interleave(UNIT, 1)
        with torch.no_grad():
            module.weights[0].copy_(torch.randn(OUT, IN) * keep)
        module.weights[0].grad = None
    compiled(x).sum().backward()
    assert (module.weights[0].grad[~keep] == 0).all()
    torch._dynamo.reset()
