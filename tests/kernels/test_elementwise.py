"""Activations, norms and rotary positions on CPUs against torch's operators in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse.config.loader import ConfigError, load_config
from megasparse.cost.cpu_kernels import cpu_kernel, cpu_kernel_obstacles
from megasparse.kernels import elementwise
from megasparse.kernels.elementwise import activation, cpu, normalize, rotate
from megasparse.training.plan import make_plan
from megasparse.utils.activations import ACTIVATIONS

# Of float32: a few roundings, and an exponential of 1.5e-7; of the others: the rounding of the result.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
DTYPES = [pytest.param(dtype, id=str(dtype).partition(".")[2]) for dtype in TOLERANCE]
SHAPES = [(1, 1), (3, 7), (40, 33), (5, 64), (129, 130)]


def errors(function, reference, inputs: list[Tensor]) -> list[float]:
    """Largest errors of output and gradients, relative to the largest entry of each; the inputs are float64."""
    dtype = inputs[0].dtype
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().clone().requires_grad_() for x in inputs]
    y, wanted = function(*ours), reference(*exact)
    assert y.dtype == dtype and y.shape == wanted.shape
    with torch.no_grad():
        assert torch.equal(function(*inputs), y), "another result where no gradient is wanted"
    gradient = torch.randn_like(wanted).to(dtype)
    y.backward(gradient)
    wanted.backward(gradient.double())
    pairs = [(y, wanted), *((one.grad, other.grad) for one, other in zip(ours, exact, strict=True))]
    pairs = [(found.detach().double(), right.detach()) for found, right in pairs]
    return [float((found - right).abs().max() / right.abs().max().clamp_min(1e-3)) for found, right in pairs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations(name, shape, dtype) -> None:
    kind = ACTIVATIONS[name]
    function, reference = (
        activation(name, kind.function, gated=kind.gated, kernel=kernel) for kernel in ("cpu", "torch")
    )
    x = 3 * torch.randn(2, *shape[:-1], shape[-1] * (2 if kind.gated else 1)).to(dtype)
    assert max(errors(function, reference, [x])) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "layernorm with bias"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_norms(kind, shape, dtype) -> None:
    """The mean is far from 0: what lies beyond the end of a row must not count."""
    x, (weight, bias) = (torch.randn(2, *shape) + 4).to(dtype), torch.randn(2, shape[-1]).to(dtype)
    inputs = [x, weight, bias] if kind.endswith("bias") else [x, weight]

    def with_kernel(kernel):
        return lambda x, weight, bias=None: normalize(x, weight, bias, 1e-5, kind.split()[0], kernel=kernel)

    # Differences of entries of about 4.
    tolerance = TOLERANCE[dtype] * (8 if dtype == torch.float32 else 1)
    assert max(errors(with_kernel("cpu"), with_kernel("torch"), inputs)) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 10, 32, 64])
@pytest.mark.parametrize("layout", ["projection", "heads first", "strided"])
def test_rotation(layout, width, dtype) -> None:
    B, H, T = 2, 3, 5
    x = {
        "projection": lambda: torch.randn(B, T, 2 * H * width)[..., : H * width].view(B, T, H, width).transpose(1, 2),
        "heads first": lambda: torch.randn(B, H, T, width),
        "strided": lambda: torch.randn(B, H, T, 2 * width)[..., ::2],
    }[layout]()
    angles = torch.randn(T, width // 2)
    tables = angles.cos(), angles.sin()
    found = errors(
        lambda x: rotate(x, *tables, kernel="cpu"), lambda x: rotate(x, *tables, kernel="torch"), [x.to(dtype)]
    )
    assert max(found) < TOLERANCE[dtype]


def test_special_values() -> None:
    """What overflows on the way does not in the result, and a NaN stays one."""
    x = torch.tensor([0.0, -0.0, 88.0, -88.0, 1e4, -1e4, float("nan"), 1e-30], requires_grad=True)
    for name in ("gelu", "swiglu"):
        inputs = x if name == "gelu" else torch.cat([x, torch.ones_like(x)])
        apply = activation(name, ACTIVATIONS[name].function, gated=name == "swiglu", kernel="cpu")
        y = apply(inputs)
        assert y[[0, 1, 3, 5]].abs().max() < 1e-30 and y[2] == 88.0 and y[4] == 1e4
        assert y.isnan().tolist() == [False] * 6 + [True, False]
        (gradient,) = torch.autograd.grad(y.nansum(), x)
        assert gradient[[0, 2, 3]].tolist() == pytest.approx([0.5, 1.0, 0.0]) and not gradient[:6].isnan().any()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    threads, found = torch.get_num_threads(), []
    x, weight, gradient = torch.randn(999, 128), torch.randn(128), torch.randn(999, 128)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            own = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            y = normalize(own[0], own[1], None, 1e-5, "rmsnorm", kernel="cpu")
            y = activation("gelu", F.gelu, gated=False, kernel="cpu")(y)
            found.append([y.detach(), *torch.autograd.grad(y, own, gradient)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_the_kernels_do_not_know_is_torchs(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("not for this one")

    for name in ("Activate", "Gate", "Normalize", "Rotate"):
        monkeypatch.setattr(getattr(cpu, name), "apply", fail)
    x = torch.randn(4, 6, dtype=torch.float64)
    activation("gelu", F.gelu, gated=False, kernel="auto")(x)
    activation("gelu_exact", F.gelu, gated=False, kernel="cpu")(x.float())
    normalize(x.bfloat16(), torch.ones(6), None, 1e-5, "rmsnorm")
    activation("gelu", F.gelu, gated=False, kernel="torch")(x.float())
    with pytest.raises(RuntimeError, match="kernels.elementwise: cpu cannot be used: dtypes torch.float64"):
        normalize(x, torch.ones(6).double(), None, 1e-5, "layernorm", kernel="cpu")


def test_a_program_that_is_traced_has_torchs_operators(monkeypatch) -> None:
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    assert not elementwise.takes_cpu("auto", torch.ones(2)) and not elementwise.takes_cpu("cpu", torch.ones(2))


def test_where_they_cannot_be_built_the_plan_says_so(monkeypatch) -> None:
    config = load_config([], ["kernels.elementwise=auto"])
    assert cpu_kernel(config, "elementwise", "cpu") == "cpu" and cpu_kernel(config, "elementwise", "cuda") == "torch"
    assert cpu_kernel_obstacles(config, "cpu") == cpu_kernel_obstacles(config, "cuda") == {}
    monkeypatch.setattr(cpu, "no_compiler", lambda: "no C++ compiler found")
    assert cpu_kernel(config, "elementwise", "cpu", planned=True) == "torch"
    assert cpu_kernel_obstacles(config, "cpu", planned=True)["elementwise"] == "no C++ compiler found"
    dense = load_config([], ["sparsity.algorithm=dense", "model.vocab_size=64"])
    (warning,) = make_plan(dense, 1)["warnings"]
    assert warning == "kernels.elementwise auto takes torch's operators: no C++ compiler found"
    forced = load_config([], ["kernels.elementwise=cpu"])
    with pytest.raises(ConfigError, match="kernels.elementwise: cpu cannot be used here: no C.*; must be auto"):
        cpu_kernel(forced, "elementwise", "cpu", planned=True)
