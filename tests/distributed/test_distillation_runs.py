"""Students of a teacher: on every layout the curve of one process, with packed supervised data; what is logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import Layout, run_config
from harness import run_distributed
from test_supervised_runs import COMMON, SEQUENCE, distance, write_examples
from trainer_runs import run_trainers

from megasparse.checkpoint.model_folder import ModelFolder, ModelFolderWriter, load_weights
from megasparse.data import Batch
from megasparse.models.build import build_model
from megasparse.objectives.teacher import open_teacher
from megasparse.parallel import CommunicationGroup
from megasparse.training.build_engine import RunStorage

STUDENT = [
    *COMMON,
    "model.vocab_size=61",  # divided by no number of ranks: the logits of both are padded
    "distillation.logits_weight=0.5",
    "distillation.hidden_weight=0.7",
    "distillation.temperature=2",
]
EVOLVING = [
    "sparsity.algorithm=mst",
    "sparsity.density=0.25",
    "sparsity.update_interval=2",
    "sparsity.warmup_end=0.3",
    "sparsity.restoration_start=0.5",
    "sparsity.restoration_end=0.8",
]
PACKED = ["sparsity.storage=packed", "sparsity.capacity_change_cost=0"]
LAYER_MAP = ["distillation.layer_map=[[0, 1], [1, 2]]", "distillation.tokens=response"]

# Hidden states of several float32 layers, and ratios of sums of them: a little more than a cross entropy alone. A loss
# normalised over micro-batches instead of samples shows as 1e-3.
LOSS_RTOL = 1e-5
PARTS = ("cross_entropy", "divergence", "square_head")


def settings(folder: Path, *more: str) -> list[str]:
    return [*STUDENT, f"data.train=[{{path: {folder / 'tasks'}}}]", f"distillation.teacher={folder / 'teacher'}", *more]


def one_rank(mesh, folder: Path) -> dict[str, Any]:
    deep = [*settings(folder), *LAYER_MAP, f"distillation.teacher={folder / 'deep'}"]
    cases = [
        ("alone", settings(folder), Layout(), []),
        ("accumulated", settings(folder), Layout(accumulation=4), []),
        ("resumed", settings(folder), Layout(), [5]),
        ("mapped", deep, Layout(), []),
        ("reference", settings(folder, "distillation.ratio_over=micro_batch"), Layout(), []),
        ("evolving", settings(folder, *EVOLVING), Layout(zero=2), []),
        ("packed", settings(folder, *EVOLVING, *PACKED), Layout(zero=2), [7]),
    ]
    return run_trainers(mesh, cases, folder / "one")


def two_ranks(mesh, folder: Path) -> dict[str, Any]:
    deep = [*settings(folder), *LAYER_MAP, f"distillation.teacher={folder / 'deep'}"]
    cases = [
        ("stage 1", settings(folder), Layout(data=2, zero=1, accumulation=2), []),
        ("stage 2", settings(folder), Layout(data=2, zero=2), []),
        ("stage 3", settings(folder), Layout(data=2, zero=3), []),
        ("tensor", settings(folder), Layout(tensor=2), []),
        ("sequence", settings(folder, *SEQUENCE), Layout(tensor=2, accumulation=2), []),
        ("mapped stage 3", deep, Layout(data=2, zero=3, accumulation=2), []),
        ("mapped sequence", [*deep, *SEQUENCE], Layout(tensor=2), []),
        ("bf16 stage 3", settings(folder, "train.precision=bf16"), Layout(data=2, zero=3), []),
    ]
    return run_trainers(mesh, cases, folder / "two")


def divided_teacher(mesh, folder: Path) -> float:
    """How far its states and logits are from those of the whole model; it must lie in pieces, before and after."""
    config = run_config(settings(folder), Layout(data=2, zero=3))
    teacher, whole = open_teacher(config, 61, mesh), build_model(config, 61)
    load_weights(whole, ModelFolder(folder / "teacher"))
    tokens = torch.arange(16).view(1, 16)
    batch = Batch(tokens, tokens, torch.zeros_like(tokens))
    outputs: list[torch.Tensor] = []
    with torch.no_grad():
        normed = whole.hidden_states(batch.inputs, batch.documents, outputs=outputs)
        logits = whole.head(normed).flatten(0, 1)[3:9]
    far = 0.0
    for _ in range(2):
        assert all(parameter.numel() == 0 for parameter in teacher.model.parameters()), "a weight is whole"
        found = teacher.states(batch)
        assert found.normed.is_inference() and not any(p.requires_grad for p in teacher.model.parameters())
        with teacher.logits(found.normed) as of_tokens:
            pairs = [
                *zip(found.outputs, outputs, strict=True),
                (found.normed, normed),
                (of_tokens(slice(3, 9)), logits),
            ]
            far = max(far, *(float((mine - other).abs().max()) for mine, other in pairs))
    return far


def write_teacher(folder: Path, *more: str) -> None:
    config = run_config([*COMMON, "model.vocab_size=61", "sparsity.algorithm=dense", "run.seed=5", *more])
    weights = dict(build_model(config, 61).named_parameters())
    with ModelFolderWriter(folder, config, {name: torch.float32 for name in weights}) as writer:
        for name in writer.names:
            # Larger than initial weights, so that its distributions are not all alike.
            writer.write(name, 2 * weights[name].detach()[: writer.specs[name].shape[0]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_examples(folder / "tasks", vocab_size=61)
    write_teacher(folder / "teacher")
    write_teacher(folder / "deep", "model.num_layers=3")
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, list[dict]]:
    return run_distributed(one_rank, 1, folder)[0]


@pytest.fixture(scope="module")
def divided(folder) -> dict[str, list[dict]]:
    first, second = run_distributed(two_ranks, 2, folder)
    assert first == second
    return first


def test_at_stage_3_a_teacher_lies_in_pieces_and_computes_the_same(folder) -> None:
    assert max(run_distributed(divided_teacher, 2, folder)) < 1e-5


def test_the_parts_are_logged_and_fall(alone) -> None:
    first, *_, last = alone["alone"]
    for line in (first, last):
        parts = [line[name] for name in PARTS]
        assert line["loss"] == pytest.approx(parts[0] + 0.5 * parts[1] + 0.7 * parts[2], rel=1e-5)
    assert last["square_head"] < 0.9 * first["square_head"] and last["divergence"] < first["divergence"]


def test_the_validation_loss_is_the_cross_entropy(alone) -> None:
    line = next(line for line in alone["alone"] if "val_loss" in line)
    assert line["val_loss"] == pytest.approx(line["cross_entropy"], rel=0.05) and line["loss"] > 1.1 * line["val_loss"]


def test_the_curve_does_not_depend_on_accumulation(alone) -> None:
    assert distance(alone["accumulated"], alone["alone"]) < LOSS_RTOL
    assert distance(alone["reference"], alone["alone"]) > 20 * LOSS_RTOL


def test_a_student_with_packed_storage_has_the_curve_of_dense_storage(alone, folder) -> None:
    config = run_config(settings(folder, *EVOLVING, *PACKED), Layout(zero=2))
    storage = RunStorage.of(config, 61, CommunicationGroup())
    assert len(storage.plan.changes) > 2, "the engine is built anew, with the teacher"
    assert distance(alone["packed"], alone["evolving"]) < LOSS_RTOL
    assert distance(alone["evolving"], alone["alone"]) > 20 * LOSS_RTOL


def test_a_student_resumes_exactly(alone) -> None:
    assert alone["resumed"] == alone["alone"]


@pytest.mark.parametrize("name", ["stage 1", "stage 2", "stage 3", "tensor", "sequence"])
def test_every_layout_gives_the_curve_of_one_process(alone, divided, name) -> None:
    assert distance(divided[name], alone["alone"]) < LOSS_RTOL
    for part in PARTS:
        assert divided[name][-1][part] == pytest.approx(alone["alone"][-1][part], rel=10 * LOSS_RTOL), part


@pytest.mark.parametrize("name", ["mapped stage 3", "mapped sequence"])
def test_a_deeper_teacher_is_the_same_in_every_layout(alone, divided, name) -> None:
    assert distance(divided[name], alone["mapped"]) < LOSS_RTOL


def test_bfloat16_follows_the_curve(alone, divided) -> None:
    """8 bits of a product, and of each state: some percent of a loss that averages over them."""
    assert distance(divided["bf16 stage 3"], alone["alone"]) < 0.03
