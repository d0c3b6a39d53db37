"""Distillation on one process, against plain float64 losses of the logits; fields; what is refused before a start."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megasparse.checkpoint.model_folder import ModelFolderWriter
from megasparse.config.checks import check_run
from megasparse.config.distillation import DistillationConfig
from megasparse.config.loader import ConfigError, load_config
from megasparse.config.schema import RunConfig
from megasparse.data import Batch
from megasparse.data.loader import PADDING_DOCUMENT
from megasparse.models.build import build_model
from megasparse.objectives.checks import check_response_tokens, distillation_warnings
from megasparse.objectives.distillation import Distillation, TeacherStates
from megasparse.objectives.objective import NextTokenCrossEntropy
from megasparse.objectives.square_head import square_head

V = 97
MODEL = [
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.seq_length=16",
    "model.vocab_size=97",
    "model.tie_embeddings=false",
    "sparsity.algorithm=dense",
]


def run_config(settings: list[str]) -> RunConfig:
    return load_config([], settings)


class OpenTeacher:
    """A model of this process."""

    def __init__(self, model) -> None:
        self.model = model

    @torch.inference_mode()
    def states(self, batch: Batch) -> TeacherStates:
        outputs: list[torch.Tensor] = []
        return TeacherStates(outputs, self.model.hidden_states(batch.inputs, batch.documents, outputs=outputs))

    @contextmanager
    def logits(self, normed_BTC):
        @torch.inference_mode()
        def of_tokens(tokens):
            return self.model.head_in_chunks.local_logits(normed_BTC.flatten(0, 1)[tokens])

        yield of_tokens


def make_batch() -> Batch:
    """Two samples of three documents, the last of which fills up the first sample; some targets have weights."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, V, (2, 17), generator=generator)
    documents = torch.tensor([[0] * 7 + [1] * 4 + [PADDING_DOCUMENT] * 6, [0] * 9 + [1] * 8])
    mask = torch.rand(2, 17, generator=generator) < 0.5
    mask[0, 11:] = False
    weights = mask[:, 1:].float() * 16 * 2 / mask[:, 1:].sum()
    return Batch(tokens[:, :-1], tokens[:, 1:], documents[:, :-1], weights)


@pytest.fixture
def models():
    student, teacher = build_model(run_config(MODEL), V), build_model(run_config([*MODEL, "run.seed=7"]), V)
    # Smaller chunks than the batch, so that their seams are tested.
    student.head_in_chunks.chunk_elements = 128 * 5
    return student, teacher.requires_grad_(False)


def plain_parts(student, teacher, batch: Batch, temperature: float) -> dict[str, torch.Tensor]:
    """In float64 from the logits of all tokens."""
    ours = student(batch.inputs, batch.documents).double().flatten(0, 1)
    theirs = teacher(batch.inputs, batch.documents).double().flatten(0, 1)
    weights = batch.weights.double().flatten()
    entropies = F.cross_entropy(ours, batch.targets.flatten(), reduction="none")
    p, q = (F.log_softmax(x / temperature, 1) for x in (theirs, ours))
    divergences = F.kl_div(q, p, reduction="none", log_target=True).sum(1) * temperature**2
    return {"cross_entropy": (entropies * weights).mean(), "divergence": (divergences * weights).mean()}


@pytest.mark.parametrize(
    ("weights", "temperature"), [((1.0, 0.0, 0.0), 1.0), ((0.3, 0.7, 0.0), 2.5), ((0, 1.0, 2.0), 0.7)]
)
def test_the_loss_is_the_weighted_sum_of_plain_ones(models, weights, temperature) -> None:
    student, teacher = models
    batch = make_batch()
    names = ("cross_entropy_weight", "logits_weight", "hidden_weight")
    config = DistillationConfig(
        teacher="x", temperature=temperature, **dict(zip(names, map(float, weights), strict=True))
    )
    loss, parts = Distillation(config, OpenTeacher(teacher))(student, batch)
    loss.backward()
    ours = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()

    expected = plain_parts(student, teacher, batch, temperature)
    total = weights[0] * expected["cross_entropy"] + weights[1] * expected["divergence"]
    if weights[2]:
        states = []
        for model in (student, teacher):
            outputs: list[torch.Tensor] = []
            normed = model.hidden_states(batch.inputs, batch.documents, outputs=outputs)
            states.append([*outputs[:-1], normed])
        kept = batch.documents != PADDING_DOCUMENT
        expected["square_head"] = square_head(*states, kept, epsilon=config.epsilon)
        total = total + weights[2] * expected["square_head"]
    total.backward()
    # float32 sums over 97 entries and 64 channels; the plain losses are float64 from float32 logits.
    torch.testing.assert_close(loss.double(), total.double(), rtol=2e-6, atol=0)
    wanted = zip(("cross_entropy", "divergence", "square_head"), (1, *weights[1:]), strict=True)
    assert list(parts) == [name for name, weight in wanted if weight]
    # A divergence is a small difference of log-probabilities of about 5, each known to 5e-7.
    for name, part in parts.items():
        torch.testing.assert_close(part.double(), expected[name].double(), rtol=2e-6, atol=1e-6)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=2e-4, atol=2e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_a_teacher_of_itself_teaches_nothing(models) -> None:
    """KL and SquareHead are 0, and so is their gradient: what the teacher says is aligned with the student."""
    student, _ = models
    config = DistillationConfig(teacher="x", cross_entropy_weight=0.0, logits_weight=1.0)
    loss, parts = Distillation(config, OpenTeacher(student))(student, make_batch())
    loss.backward()
    assert parts["divergence"].abs() < 1e-6 and parts["square_head"] == 0
    assert max(float(parameter.grad.abs().max()) for parameter in student.parameters()) < 1e-6


def test_divergence_is_taken_where_targets_are_learned(models) -> None:
    """Another teacher where no answer is predicted changes nothing, another one where one is does."""
    student, teacher = models
    batch = make_batch()

    class Shifted(OpenTeacher):
        def __init__(self, model, where):
            super().__init__(model)
            self.where = where.flatten()

        @contextmanager
        def logits(self, normed_BTC):
            with super().logits(normed_BTC) as given:
                yield lambda tokens: given(tokens) + self.where[tokens, None] * torch.arange(128)

    config = DistillationConfig(teacher="x", logits_weight=1.0, hidden_weight=0.0)
    learned = batch.weights > 0
    values = [
        Distillation(config, chosen)(student, batch).loss.item()
        for chosen in (OpenTeacher(teacher), Shifted(teacher, ~learned), Shifted(teacher, learned))
    ]
    assert values[0] == values[1] != values[2]


def test_which_states_are_compared(models) -> None:
    """Pairs of the map, tokens and the last state, against the function on states that are chosen by hand."""
    student, teacher = models
    batch = make_batch()
    both = []
    for model in (student, teacher):
        outputs: list[torch.Tensor] = []
        normed = model.hidden_states(batch.inputs, batch.documents, outputs=outputs)
        both.append((outputs, normed))
    (ours, our_norm), (theirs, their_norm) = both
    learned, kept = batch.weights > 0, batch.documents != PADDING_DOCUMENT
    cases = [
        ({}, [ours[0], our_norm], [theirs[0], their_norm], kept),
        ({"last_state": "pre_norm"}, ours, theirs, kept),
        ({"tokens": "all", "layer_map": [(0, 1)]}, [ours[0]], [their_norm], None),
        ({"tokens": "response", "layer_map": [(1, 0)], "last_state": "pre_norm"}, [ours[1]], [theirs[0]], learned),
    ]
    for fields, mine, other, tokens in cases:
        config = DistillationConfig(teacher="x", **fields)
        part = Distillation(config, OpenTeacher(teacher))(student, batch).parts["square_head"]
        assert float(part) == pytest.approx(float(square_head(mine, other, tokens, epsilon=2.0**-7)), rel=1e-6), fields


def test_in_evaluation_the_loss_is_the_cross_entropy(models) -> None:
    student, teacher = models
    objective = Distillation(DistillationConfig(teacher="x"), OpenTeacher(teacher))
    student.eval()
    assert torch.equal(objective(student, make_batch()).loss, NextTokenCrossEntropy()(student, make_batch()).loss)


# What is refused before a start


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    fields = {"deep": "num_layers=4", "wide": "hidden_size=128", "short": "seq_length=8", "other": "vocab_size=97"}
    fields["heads"] = "num_attention_heads=2"
    for name, field in fields.items():
        config = run_config([*MODEL, f"model.{field}"])
        weights = dict(build_model(config, V).named_parameters())
        with ModelFolderWriter(folder / name, config, {tensor: torch.float32 for tensor in weights}) as writer:
            for tensor in writer.names:
                writer.write(tensor, weights[tensor].detach()[: writer.specs[tensor].shape[0]])
    return folder


@pytest.mark.parametrize(
    ("teacher", "settings", "words"),
    [
        ("missing", [], "distillation.teacher: .*missing: no model folder there; must be"),
        ("deep", [], "distillation.layer_map: unset, but the teacher has 4 layers and the student 2; must be pairs"),
        ("deep", ["distillation.layer_map=[[0, 1], [2, 3]]"], "the student has no block 2; must be 0 to 1"),
        ("deep", ["distillation.layer_map=[[0, 1], [1, 4]]"], "the teacher has no block 4; must be 0 to 3"),
        ("wide", [], "has hidden_size 128, the run 64; must be equal"),
        (
            "other",
            ["model.vocab_size=98"],
            "a vocabulary of 97 entries, the run one of 98; must be a teacher of the same",
        ),
        ("short", [], "model.seq_length: 16 exceeds the 8 positions of distillation.teacher .*; must be at most 8"),
        ("other", ["stacking.num_layers=1"], "stacking.num_layers: 1 with distillation.teacher; must be unset"),
        ("heads", ["parallel.tensor_parallel_size=4"], "heads: parallel.tensor_parallel_size: 4 does not divide"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(folder, teacher, settings, words) -> None:
    config = run_config([*MODEL, f"distillation.teacher={folder / teacher}", *settings])
    with pytest.raises(ConfigError, match=words):
        distillation_warnings(config, config.model.vocab_size)


def test_teachers_that_fit_are_not(folder) -> None:
    for teacher, settings in [
        ("other", []),
        ("deep", ["distillation.layer_map=[[0, 1], [1, 3]]"]),
        ("deep", ["distillation.hidden_weight=0", "distillation.logits_weight=1"]),
        ("wide", ["distillation.hidden_weight=0", "distillation.logits_weight=1"]),
    ]:
        config = run_config([*MODEL, f"distillation.teacher={folder / teacher}", *settings])
        check_run(config, 1)
        assert distillation_warnings(config, V) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["distillation.cross_entropy_weight=0", "distillation.hidden_weight=0"],
            "all 0; must be above 0 for at least one",
        ),
        (["distillation.layer_map=[[0, 1], [0, 0]]"], "names a block of the student twice"),
        (["distillation.layer_map=[]"], "layer_map: no pair"),
        (["distillation.temperature=0"], "temperature"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, words) -> None:
    with pytest.raises(ConfigError, match=words):
        run_config([*MODEL, "distillation.teacher=x", *settings])


def test_answers_need_supervised_data() -> None:
    config = run_config([*MODEL, "distillation.teacher=x", "distillation.tokens=response"])
    check_response_tokens(config, supervised=True)
    with pytest.raises(ConfigError, match="distillation.tokens: response needs supervised data"):
        check_response_tokens(config, supervised=False)
