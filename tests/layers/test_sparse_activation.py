"""2:4 sparse activations: which entries are kept, against loops; gradients against plain equations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megasparse.config.checks import check_run, unused_settings
from megasparse.config.loader import ConfigError, load_config
from megasparse.config.schema import RunConfig
from megasparse.kernels import activation_sparsity as kernels
from megasparse.kernels.activation_sparsity import semi_structured
from megasparse.layers.residual import scaled_branch
from megasparse.layers.sparse_activation import SparseActivation
from megasparse.methods.activation_sparsity import ActivationSparsity
from megasparse.methods.callback import Step
from megasparse.models import build_model
from megasparse.parallel import CommunicationGroup
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.topology import pack_bits
from megasparse.training.initial_checks import _check_activations

SMALL = [
    "model.num_layers=1", "model.hidden_size=16", "model.num_attention_heads=2", "model.seq_length=12",
    "model.vocab_size=64", "model.activation=relu2", "train.precision=fp32", "train.micro_batch_size=4",
    "sparsity.algorithm=dense", "activation_sparsity.pattern=2:4",
]  # fmt: skip


def config_with(*words: str) -> RunConfig:
    return load_config([], [*SMALL, *words])


def plain_two_of_four(row: list[float]) -> list[bool]:
    kept = [True] * len(row)
    for start in range(0, len(row) // 4 * 4, 4):
        order = sorted(range(start, start + 4), key=lambda i: (-row[i], i))
        for i in order[2:]:
            kept[i] = False
    return kept


def plain_keep_tokens(h: torch.Tensor, order: list[int]) -> torch.Tensor:
    kept = torch.ones_like(h, dtype=torch.bool)
    for b in range(h.shape[0]):
        for f in range(h.shape[2]):
            values = plain_two_of_four([float(h[b, t, f]) for t in order])
            for t, value in zip(order, values, strict=True):
                kept[b, t, f] = value
        for group in range(0, h.shape[2] // 16 * 16, 16):
            counts = [int((h[b, :, f] != 0).sum()) for f in range(group, group + 16)]
            kept[b, :, group + counts.index(max(counts))] = True
        kept[b, :, h.shape[2] // 16 * 16 :] = True
    return kept


@pytest.mark.parametrize("tokens", [12, 7])
def test_the_entries_kept_are_those_of_loops(tokens: int) -> None:
    # Few values, so that many are equal.
    h = torch.randint(-3, 4, (3, tokens, 36)).clamp(min=0).float()
    features, order = kernels.keep_features(h), kernels.token_order(tokens, h.device)
    for found, row in zip(features.flatten(0, 1).tolist(), h.flatten(0, 1).tolist(), strict=True):
        assert found == plain_two_of_four(row)
    assert sorted(order.tolist()) == list(range(tokens)) != order.tolist()
    assert torch.equal(kernels.keep_tokens(h, order), plain_keep_tokens(h, order.tolist()))


def test_other_tokens_than_neighbours_lose_less() -> None:
    """Neighbours are alike: runs of four tokens share their zeros, as words of one topic do."""
    h = (torch.randn(4, 16, 32) - 0.5).clamp(min=0).repeat_interleave(4, 1)
    lost = [
        1 - float((h * kernels.keep_tokens(h, order)).sum() / h.sum())
        for order in (torch.arange(64), kernels.token_order(64, h.device))
    ]
    assert lost[1] < 0.7 * lost[0] and lost[0] > 0.3


@pytest.fixture
def mlp():
    mlp = build_model(config_with(), 64).double().layers[0].mlp
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_(0, 0.5)
    mlp.in_training = SparseActivation()
    return mlp


def test_outputs_and_gradients_are_those_of_the_equations(mlp) -> None:
    x, direction = torch.randn(2, 12, 16, dtype=torch.float64, requires_grad=True), torch.randn(2, 12, 16).double()
    y = mlp(x)
    y.backward(direction)
    w1, b1, w2, b2 = (p.detach() for p in (mlp.up.weight, mlp.up.bias, mlp.down.weight, mlp.down.bias))
    z = x.detach() @ w1.T + b1
    whole = z.clamp(min=0) ** 2
    features = torch.tensor([[plain_two_of_four(row) for row in sample] for sample in whole.tolist()])
    h = whole * features
    tokens = plain_keep_tokens(h, kernels.token_order(12, x.device).tolist())
    assert 0.02 < 1 - h.sum() / whole.sum() < 0.5 and 0.02 < 1 - (h * tokens).sum() / h.sum() < 0.5
    torch.testing.assert_close(y, h @ w2.T + b2)
    dz = (direction @ w2) * features * 2 * z.clamp(min=0)
    torch.testing.assert_close(x.grad, dz @ w1)
    torch.testing.assert_close(mlp.up.weight.grad, torch.einsum("btf,btc->fc", dz * tokens, x.detach()))
    torch.testing.assert_close(mlp.down.weight.grad, torch.einsum("btc,btf->cf", direction, h * tokens))
    torch.testing.assert_close(mlp.up.bias.grad, dz.sum((0, 1)))
    torch.testing.assert_close(mlp.down.bias.grad, direction.sum((0, 1)))
    sums = torch.stack([whole.sum(), h.sum(), (h * tokens).sum()])
    torch.testing.assert_close(mlp.in_training.mass, sums)
    # Validation and samples have all of it.
    mlp.eval()
    torch.testing.assert_close(mlp(x), whole @ w2.T + b2)


def test_the_input_gradient_is_that_of_the_forward_pass(mlp) -> None:
    x = torch.randn(1, 4, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mlp, (x,), eps=1e-7, atol=1e-5)


def test_without_too_many_entries_it_is_the_plain_perceptron(mlp) -> None:
    """Of a bias that lets few entries through nothing is lost, and all gradients are the plain ones."""
    with torch.no_grad():
        mlp.up.weight.zero_()
        mlp.up.weight[torch.arange(64), torch.arange(64) % 16] = 1.0
        mlp.up.bias.fill_(-1.0)
    x = torch.zeros(1, 12, 16, dtype=torch.float64)
    order = kernels.token_order(12, x.device)
    # One token of each four: each feature has one entry there, and each four features two entries at most.
    x[0, order[::4], torch.tensor([1, 6, 11])] = torch.rand(3, dtype=torch.float64) + 2.0
    x.requires_grad_()
    found = torch.autograd.grad(mlp(x).square().sum(), [x, *mlp.parameters()])
    mlp.in_training = None
    plain = torch.autograd.grad(mlp(x).square().sum(), [x, *mlp.parameters()])
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)
    assert plain[1].any()


def test_the_first_steps_are_dense() -> None:
    config = config_with("activation_sparsity.warmup_steps=3")
    model = build_model(config, 64)
    method = ActivationSparsity(config, model)
    for index in range(5):
        method.begin_step(Step(index))
        assert (model.layers[0].mlp.in_training is not None) == (index >= 3)
        method.after_step(Step(index))
        assert model.layers[0].mlp.in_training is None
    assert "from step 4 on" in method.plan_lines()[0]


def test_tensor_cores_are_refused_where_there_are_none() -> None:
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured  # noqa: F401

    assert "the device is cpu" in (semi_structured.why_not(torch.device("cpu"), torch.bfloat16) or "")
    with pytest.raises(ValueError, match="must be multiples of 64"):
        kernels.product(torch.zeros(64, 32), torch.zeros(32, 64), "semi_structured")


def test_a_dropped_branch_does_without_tensor_cores() -> None:
    """It is visited with one token of each sample, which is no multiple of what they multiply."""
    mlp = build_model(config_with(), 64).layers[0].mlp
    mlp.in_training = SparseActivation("semi_structured")
    x = torch.randn(4, 12, 16, requires_grad=True)
    y = scaled_branch(mlp, 0.0, x)
    y.sum().backward()
    assert y.shape == x.shape and not y.any() and not x.grad.any()
    with pytest.raises(ValueError, match="multiples of 64"):
        scaled_branch(mlp, 1.0, x)


def test_the_split_of_the_weight_gradient_is_that_of_the_masks(monkeypatch) -> None:
    """The path of tensor cores, with a plain product in the place of theirs, which checks what it is given."""

    def product(pruned: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        assert int((pruned != 0).unflatten(1, (-1, 4)).sum(2).max()) <= 2, "not 2:4"
        return pruned @ other

    monkeypatch.setattr(semi_structured, "product", product)
    h, other = torch.randn(3, 16, 32).clamp(min=0).double(), torch.randn(3, 16, 8).double()
    order = kernels.token_order(16, h.device)
    kept, dense = h * kernels.keep_tokens(h, order), kernels.is_dense(h)
    found = kernels.weight_gradient(kept, other, order, dense, "semi_structured")
    torch.testing.assert_close(found, torch.einsum("btf,btc->fc", kept, other))
    mlp = build_model(config_with(), 64).double().layers[0].mlp
    x, results = torch.randn(2, 12, 16).double().requires_grad_(), []
    for kernel in kernels.KERNELS:
        mlp.in_training = SparseActivation(kernel)
        y = mlp(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()])])
    for one, another in zip(*results, strict=True):
        torch.testing.assert_close(one, another)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.activation=gelu"], "model.activation: gelu does not go with activation_sparsity.* must be relu2"),
        (["model.ffn_hidden_size=40"], "model.ffn_hidden_size: 40 does not go with .* a multiple of 16"),
        (["train.compile=blocks"], "train.compile: blocks does not go with activation_sparsity"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_run(config_with(*words), 1)


def test_settings_without_the_pattern_are_named() -> None:
    given = config_with("activation_sparsity.pattern=none", "activation_sparsity.warmup_steps=5")
    assert (
        unused_settings(given)[-1] == "used with activation_sparsity.pattern 2:4 only: activation_sparsity.warmup_steps"
    )


class Folder:
    """A model folder with the masks of one layer."""

    folder = Path("pruned")

    def __init__(self, controller: Controller, mask: torch.Tensor) -> None:
        full = {name: torch.ones(t.num_units, dtype=torch.bool) for name, t in controller.topologies.items()}
        full["layers.0.mlp.down"] = mask.flatten()
        self.masks = {f"active/{name}": pack_bits(bits) for name, bits in full.items()}

    def topology(self) -> dict[str, torch.Tensor]:
        return self.masks


def test_weights_that_are_2_4_already_are_refused() -> None:
    config = config_with("sparsity.algorithm=static", "sparsity.density=0.5", "sparsity.block_size=1")
    model = build_model(config, 64)
    controller = Controller(config, model.sparse_layers(), CommunicationGroup())
    mask = torch.tensor([True, False, False, True]).repeat(16, 16)
    with pytest.raises(
        ConfigError, match="activation_sparsity.pattern: 2:4, but the weights of layer layers.0.mlp.down"
    ):
        _check_activations(config, Folder(controller, mask), controller)
    mask[3, :4] = True
    _check_activations(config, Folder(controller, mask), controller)
