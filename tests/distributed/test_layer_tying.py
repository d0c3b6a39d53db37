"""Tied layers against a plain model whose blocks are shared Python objects, with an optimizer written out."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from engine_runs import Layout, collected_state, divided, make_batches, run_config
from harness import run_distributed
from torch import Tensor, nn

from megasparse.checkpoint.weights import computing_name
from megasparse.config.checks import check_run
from megasparse.config.layer_tying import LayerTyingConfig
from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.methods.callback import Step
from megasparse.methods.tying_controller import TyingController, first_action, reward_of
from megasparse.models.build import build_model
from megasparse.parallel import Mesh
from megasparse.planning.assumptions import parse_assumptions
from megasparse.planning.cluster import make_cluster
from megasparse.planning.forecast import forecast
from megasparse.training.build_engine import build_engine
from megasparse.training.plan import make_plan

WORDS = [
    "model.hidden_size=32", "model.num_layers=4", "sparsity.algorithm=dense", "train.steps=12",
    "layer_tying.mode=dynamic", "layer_tying.interval=1",
]  # fmt: skip
FREE = ["model.hidden_size=32", "model.num_layers=4", "sparsity.algorithm=dense", "layer_tying.mode=none"]
SCRIPT = [(1, 0), (3, 1), (2, 2), (3, 3), (2, 0), (1, 1), (3, 2), (2, 2), (2, 1), (3, 0), (1, 0), (0, 0)]
"""Layer, source: ties to tied layers; untied first layers of a group, (2, 2) and (2, 1); and what changes nothing."""


def train_tied(mesh: Mesh, script: list[tuple[int, int]], layouts: list[Layout]) -> list[dict]:
    """With the actions of a script in place of the controller's."""
    found = []
    for layout in layouts:
        config, own = run_config(WORDS, layout), divided(mesh, layout.tensor)
        methods, engine = build_engine(config, config.model.vocab_size, own)
        tying, actions, losses, counts = methods[-1], iter(script), [], []
        tying.controller.decide = lambda sources, reward, actions=actions: next(actions)
        for index, batch in enumerate(make_batches(config)):
            step = Step(index)
            for method in methods:
                method.begin_step(step)
            counts.append(step.metrics["distinct_parameters"])
            part = batch.chunk(own.data_parallel.size)[own.data_parallel.rank]
            loss = engine.forward(part[:, :-1], part[:, 1:])
            engine.backward(loss)
            engine.gradient_norm()
            mean = own.data_parallel.sum_(loss.detach().double()) / own.data_parallel.size
            step.losses = {"loss": float(loss.detach())}
            for method in methods:
                method.after_backward(step)
            engine.step(config.optimizer.lr)
            losses.append(float(mean))
        found.append({"losses": losses, "sources": tying.sources, "counts": counts, **collected_state(own, engine)})
    return found


class PlainTying:
    """Layers are Python objects; a tied layer is the same object, an untied one a deep copy."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.model = config, build_model(config, config.model.vocab_size)
        self.moments: dict[nn.Parameter, list[Tensor]] = {}
        self.steps = 0

    def act(self, layer: int, source: int) -> None:
        """Before the optimizer step: a copy has the gradient too."""
        blocks = list(self.model.layers)
        shared = [other for other, block in enumerate(blocks) if block is blocks[layer] and other != layer]
        if source < layer:
            blocks[layer] = blocks[source]
        elif any(other < layer for other in shared):
            old, blocks[layer] = blocks[layer], copy.deepcopy(blocks[layer])
            for before, after in zip(old.parameters(), blocks[layer].parameters(), strict=True):
                after.grad = before.grad.clone()
                if before in self.moments:
                    self.moments[after] = [moment.clone() for moment in self.moments[before]]
        self.model.layers = nn.ModuleList(blocks)

    def loss(self, batch: Tensor) -> Tensor:
        """Of each layer in turn: a block that stands at several places is one module."""
        model, inputs = self.model, batch[:, :-1]
        x = model.embedding(inputs, None, first=0)
        for block in model.layers:
            x = block(x)
        return F.cross_entropy(model.logits(model.final_norm(x)).flatten(0, 1), batch[:, 1:].flatten())

    def step(self, batch: Tensor, layer: int, source: int) -> float:
        self.model.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.act(layer, source)
        self._adamw()
        return float(loss.detach())

    @torch.no_grad()
    def _adamw(self) -> None:
        settings, parameters = self.config.optimizer, list(self.model.parameters())
        self.steps += 1
        norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
        scale = min(1.0, settings.gradient_clipping / float(norm))
        for p in parameters:
            first, second = self.moments.setdefault(p, [torch.zeros_like(p), torch.zeros_like(p)])
            first.lerp_(scale * p.grad, 1 - settings.beta1)
            second.lerp_((scale * p.grad).square(), 1 - settings.beta2)
            p.mul_(1 - settings.lr * settings.weight_decay * (p.ndim > 1))
            corrected = first / (1 - settings.beta1**self.steps)
            p.sub_(settings.lr * corrected / ((second / (1 - settings.beta2**self.steps)).sqrt() + settings.epsilon))

    def check(self, found: dict) -> None:
        """Weights and moments of the blocks that layers have, as a run says them."""
        for name, p in self.model.named_parameters(remove_duplicate=False):
            own = computing_name(name, found["sources"])
            if own in found["weights"]:
                for kind, wanted in (("weights", p.detach()), ("exp_avg", self.moments[p][0])):
                    torch.testing.assert_close(found[kind][own], wanted, rtol=1e-3, atol=2e-5, msg=f"{kind} of {name}")


def test_training_is_that_of_shared_modules_in_every_layout() -> None:
    """Losses, and in the end weights and moments, under actions of all kinds."""
    layouts = [Layout(2, 1, 1, 1), Layout(2, 1, 3, 1)]
    plain = PlainTying(run_config(WORDS))
    losses, counts = [], []
    for batch, action in zip(make_batches(run_config(WORDS)), SCRIPT, strict=True):
        counts.append(sum(p.numel() for p in plain.model.parameters()))
        losses.append(plain.step(batch, *action))
    assert len(set(counts)) == 3
    for found in run_distributed(train_tied, 2, SCRIPT, layouts)[0]:
        assert found["losses"] == pytest.approx(losses, rel=2e-5)
        assert found["counts"] == counts
        plain.check(found)


FIXED = [*WORDS, "layer_tying.mode=fixed", "layer_tying.sources=[0,0,2,0]"]


def plain_count(sources: list[int]) -> int:
    """Parameters of the model with one object for each group of tied layers."""
    model = build_model(run_config(FREE), 64)
    model.layers = nn.ModuleList(model.layers[source] for source in sources)
    return sum(p.numel() for p in model.parameters())


def test_what_is_told_before_a_run_counts_shared_parameters_once() -> None:
    shared, apart = plain_count([0, 0, 2, 0]), plain_count([0, 1, 2, 3])
    assert shared < apart
    for words, wanted in ((FIXED, shared), (WORDS, apart), (FREE, apart)):
        plan = make_plan(run_config(words), 1, "cpu")
        counts = plan["parameters"]
        assert counts["total"] == counts["active_at_min_density"] == counts["mean_active"] == wanted
        assert [stage["parameters"] for stage in plan["stages"]] == [wanted]
        found = forecast(run_config(words), make_cluster("h100", 1), parse_assumptions([]))
        assert found["model"]["parameters"] == wanted


def test_the_gradient_is_the_sum_over_the_places() -> None:
    """Of a block that is used three times, against three blocks with the same weights."""
    config = run_config(FREE)
    tied, apart = (build_model(config, 64) for _ in range(2))
    tied.tie_layers([0, 0, 2, 0])
    with torch.no_grad():
        for layer in (1, 3):
            apart.layers[layer].load_state_dict(tied.layers[0].state_dict())
    tokens = torch.randint(64, (3, 16))
    for model in (tied, apart):
        model(tokens).square().mean().backward()
    for name, parameter in tied.layers[0].named_parameters():
        wanted = sum(apart.layers[layer].get_parameter(name).grad for layer in (0, 1, 3))
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-7)
    for name, parameter in tied.layers[3].named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_weights_by_name_are_those_of_the_layers_that_compute() -> None:
    config = run_config(FREE)
    tied, plain = (build_model(config, 64).eval() for _ in range(2))
    sources = [0, 1, 0, 1]
    tied.tie_layers(sources)
    for parameter in tied.parameters():
        nn.init.normal_(parameter, std=0.2)
    state = tied.state_dict()
    plain.load_state_dict({name: state[computing_name(name, sources)] for name in state})
    tokens = torch.randint(64, (3, 16))
    torch.testing.assert_close(tied(tokens), plain(tokens), rtol=0, atol=0)


def test_an_action_is_learned_from_once() -> None:
    """The step of Adam is the learning rate in the direction of the gradient, written out for the outer bias."""
    settings, layers = LayerTyingConfig(mode="dynamic", epsilon_decay=0.0, epsilon_floor=0.0), 4
    controller = TyingController(settings, layers, seed=random.getrandbits(30))
    # Greedy from its second pass on.
    controller.passes = 1
    sources = [0, 1, 0, 2]
    layer, source = controller.decide(sources, None)
    values = controller.values(torch.tensor(sources, dtype=torch.float32)).detach()
    assert layer == 1 and source == int(values[:2].argmax())
    now, reward = [0, source, 2, 1], random.uniform(-3, -1)
    before = [weight.detach().clone() for weight in controller.weights]
    target = reward + 0.99 * float(controller.values(torch.tensor(now, dtype=torch.float32)).detach()[2:5].max())
    controller.decide(now, reward)
    moved = controller.weights[3].detach() - before[3]
    expected = torch.zeros(first_action(layers))
    expected[source] = 1e-3 if target > float(values[source]) else -1e-3
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)
    # Learned from once: without a reward nothing moves.
    after = [weight.detach().clone() for weight in controller.weights]
    controller.decide(now, None)
    assert all(torch.equal(*pair) for pair in zip(after, controller.weights, strict=True))


def test_the_controller_finds_the_layers_that_pay() -> None:
    """Reward for each layer that is tied to layer 0; random at first, nearly never in the end."""
    controller = TyingController(
        LayerTyingConfig(mode="dynamic", lr=0.01, discount=0.0), 3, seed=random.getrandbits(30)
    )
    sources, taken, reward = [0, 1, 2], [], None
    for _ in range(400):
        layer, source = controller.decide(sources, reward)
        assert 1 <= layer < 3 and 0 <= source <= layer
        taken.append((layer, source))
        sources[layer] = source
        reward = float(source == 0)
    assert [layer for layer, _ in taken] == [1, 2] * 200
    assert {source for _, source in taken[:20]} == {0, 1, 2}
    assert controller.epsilon == 0.01
    assert sum(source == 0 for _, source in taken[-60:]) >= 50


def test_rewards_are_clipped() -> None:
    assert reward_of(2.5, "loss") == -2.5 and reward_of(30.0, "loss") == -10.0
    assert reward_of(1.0, "perplexity") == pytest.approx(-2.71828, rel=1e-5)
    assert reward_of(3.0, "perplexity") == reward_of(900.0, "perplexity") == -10.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layer_tying.mode=fixed"], "layer_tying.sources: None with layer_tying.mode fixed; must be a list of 4"),
        (["layer_tying.sources=[0,0,0,0]"], "layer_tying.sources: .* with layer_tying.mode dynamic; must be unset"),
        (
            ["layer_tying.mode=fixed", "layer_tying.sources=[0,0,1,0]"],
            r"layer_tying.sources: .* layer 2 cannot have those of layer 1; must be one of \[0, 2\]",
        ),
        (["layer_tying.mode=fixed", "layer_tying.sources=[0]"], "layer_tying.sources: .* 1 layers; must be 4"),
        (["sparsity.algorithm=rigl"], "sparsity.algorithm: rigl does not go with layer_tying.mode dynamic; must be"),
        (["layer_dropping.theta=0.5"], "layer_dropping.theta: 0.5 does not go"),
        (["attention.overrides=[{layers: [1], pattern: local}]"], "attention.overrides.0: an exception for some"),
        (["model.num_layers=1"], "model.num_layers: 1 does not go"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_run(run_config([*WORDS, *words]), 1)
    check_run(run_config([*WORDS, "tensor_train.rank=2"]), 1)
