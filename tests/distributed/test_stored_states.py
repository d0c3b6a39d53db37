"""Students of hidden states on disk: the curve of a run with the teacher itself, in every layout; what is refused."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from engine_runs import Layout, run_config
from harness import run_distributed
from test_distillation_runs import LAYER_MAP, LOSS_RTOL, settings, write_teacher
from test_supervised_runs import SEQUENCE, distance, write_examples
from trainer_runs import run_trainers

from megasparse.checkpoint.model_folder import ModelFolder, load_weights
from megasparse.checkpoint.store import CheckpointError
from megasparse.config.loader import ConfigError, save_config
from megasparse.config.schema import RunConfig
from megasparse.data import split_samples
from megasparse.data.build import build_data
from megasparse.models.build import build_model
from megasparse.objectives.checks import distillation_warnings, teacher_bytes
from megasparse.objectives.stored_states import StoredTeacher, needed_states
from megasparse.objectives.write_states import write_states
from megasparse.parallel import TensorParallel

V = 61
HIDDEN = ["distillation.logits_weight=0"]


def live(folder: Path, *more: str) -> list[str]:
    return settings(folder, *HIDDEN, *more)


def stored(folder: Path, *more: str) -> list[str]:
    return live(folder, f"distillation.states={folder / 'states'}", *more)


def mapped(folder: Path) -> list[str]:
    return live(folder, *LAYER_MAP, f"distillation.teacher={folder / 'deep'}")


def with_states(config: RunConfig, states: Path) -> RunConfig:
    distillation = config.distillation.model_copy(update={"states": str(states)})
    return config.model_copy(update={"distillation": distillation})


def one_rank(mesh, folder: Path) -> dict[str, Any]:
    cases = [
        ("live", live(folder), Layout(), []),
        ("stored", stored(folder), Layout(), [5]),
        ("bfloat16", live(folder, f"distillation.states={folder / 'rounded'}"), Layout(), []),
    ]
    return run_trainers(mesh, cases, folder / "one")


def two_ranks(mesh, folder: Path) -> dict[str, Any]:
    cases = [
        ("stage 3", stored(folder), Layout(data=2, zero=3), []),
        ("sequence", stored(folder, *SEQUENCE), Layout(tensor=2), []),
    ]
    return run_trainers(mesh, cases, folder / "two")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_examples(folder / "tasks", vocab_size=V)
    write_teacher(folder / "teacher")
    write_teacher(folder / "deep", "model.num_layers=3")
    write_states(run_config(live(folder)), folder / "states", dtype="float32")
    write_states(run_config(live(folder)), folder / "rounded")
    return folder


def test_they_are_those_of_the_teacher_by_whatever_number_a_sample_goes(folder) -> None:
    config = run_config(live(folder))
    opened = StoredTeacher(folder / "states", TensorParallel(), torch.device("cpu"), torch.float32)
    teacher = build_model(run_config([*live(folder), "sparsity.algorithm=dense"]), V).eval()
    load_weights(teacher, ModelFolder(folder / "teacher"))
    data, _ = build_data(config, V)
    samples = torch.stack([torch.from_numpy(data[number]) for number in (7, 2, 40)])
    batch = split_samples(samples, 1.0)
    outputs: list[torch.Tensor] = []
    with torch.no_grad():
        normed = teacher.hidden_states(batch.inputs, batch.documents, outputs=outputs)
    found = opened.states(batch)
    assert opened.description.states == ["0", "normed"] and found.outputs[1].numel() == 0
    torch.testing.assert_close(found.outputs[0], outputs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.normed, normed, rtol=1e-5, atol=1e-5)
    samples, states, tokens, width = opened.description.shape
    # As documented: hidden size x states x 2 bytes a token in bfloat16.
    assert (folder / "rounded" / "states.bin").stat().st_size == samples * tokens * states * width * 2
    assert (samples, states, tokens, width) == (samples, 2, 32, 32) and samples <= len(data)
    assert teacher_bytes(config, 1) > 0 == teacher_bytes(run_config(stored(folder)), 1)
    with pytest.raises(CheckpointError, match="does not have a sample"):
        opened.states(batch._replace(inputs=batch.inputs.flip(1)))


def test_the_tool_writes_the_same_and_leaves_alone_what_is_there(folder, repository, tmp_path) -> None:
    save_config(run_config(live(folder)), tmp_path / "run.yaml")
    tool = [sys.executable, repository / "tools" / "teacher_states.py", "--config", tmp_path / "run.yaml"]
    output = ["--output", tmp_path / "states"]
    done = processes.run([*tool, "--dtype", "float32", *output])
    expected = (folder / "states" / "states.bin").read_bytes()
    assert done.returncode == 0, done.stderr
    assert f"{len(expected):,} bytes" in done.stdout and "states 0, normed" in done.stdout
    assert (tmp_path / "states" / "states.bin").read_bytes() == expected
    refused = processes.run([*tool, "distillation.hidden_weight=0", "--output", tmp_path / "none"])
    assert refused.returncode == 2 and refused.stderr.startswith("teacher_states: error: distillation.hidden_weight")
    again = processes.run([*tool, *output])
    assert again.returncode == 2 and str(tmp_path / "states") in again.stderr and "Traceback" not in again.stderr
    assert (tmp_path / "states" / "states.bin").read_bytes() == expected


def test_of_a_deeper_teacher_the_mapped_blocks_are_written(folder) -> None:
    config = run_config(mapped(folder))
    assert needed_states(config, 3) == ["1", "normed"]
    first_of_two = run_config([*mapped(folder), "distillation.layer_map=[[1, 1], [0, 1]]", "train.steps=2"])
    found = write_states(first_of_two, folder / "mapped")
    # Two pairs of one block of the teacher: it is stored once. 16 samples are read, all different.
    assert found.states == ["1"] and found.shape == (16, 1, 32, 32) and found.num_blocks == 3
    assert teacher_bytes(config, 1) > 0
    assert distillation_warnings(with_states(first_of_two, folder / "mapped"), V) == []


def test_the_curve_is_that_of_a_teacher_in_memory(folder) -> None:
    alone = run_distributed(one_rank, 1, folder)[0]
    assert distance(alone["stored"], alone["live"]) < LOSS_RTOL
    # Each state is rounded to 8 bits, and the ratios average over thousands of them.
    assert 0 < distance(alone["bfloat16"], alone["live"]) < 1e-3
    first, second = run_distributed(two_ranks, 2, folder)
    assert first == second
    assert max(distance(first[name], alone["live"]) for name in first) < LOSS_RTOL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["distillation.states=nowhere"], "distillation.states: nowhere: no states.json there; must be unset, or"),
        (["run.seed=7"], r"order.run.seed: \d+ before, 7 now; must be written with these settings"),
        (["data.valid_fraction=0.3"], r"order.data.valid_fraction: 0.2 before, 0.3 now; must be"),
        (["data.reset_positions=false"], "order.data.reset_positions: True before, False now; must be"),
        (["data.train=[{path: OTHER}]"], "data.*before, .* now; must be written with these settings"),
        (["distillation.teacher=ANOTHER"], "is of another teacher than distillation.teacher .*; must be written with"),
        (["distillation.last_state=pre_norm"], "has the states 0, normed, and 1 are asked for .*; must be among them"),
        (["train.steps=13"], r"covers 96 samples, train.steps x .* are 104; must be at most as many"),
        (["distillation.logits_weight=1"], "distillation.logits_weight: 1 with states; must be 0"),
        (["distillation.hidden_weight=0"], "states: .* with hidden_weight 0; must be unset"),
        (["distillation.teacher=null"], "states: .* without a teacher; must be unset"),
    ],
)
def test_what_does_not_match_is_refused(folder, tmp_path, changes, message) -> None:
    write_examples(tmp_path / "other", vocab_size=50)
    write_teacher(tmp_path / "another", "run.seed=9")
    places = {"ANOTHER": str(tmp_path / "another"), "OTHER": str(tmp_path / "other")}
    words = changes
    for word, path in places.items():
        words = [change.replace(word, path) for change in words]
    with pytest.raises(ConfigError, match=message):
        distillation_warnings(run_config([*stored(folder), *words]), V)


def test_a_folder_that_is_cut_off_and_runs_without_a_teacher_are_refused(folder, tmp_path) -> None:
    shutil.copytree(folder / "states", tmp_path / "cut")
    with (tmp_path / "cut" / "states.bin").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"must be a file of [\d,]+ bytes"):
        distillation_warnings(run_config([*stored(folder), f"distillation.states={tmp_path / 'cut'}"]), V)
    with pytest.raises(ConfigError, match="distillation.teacher: unset; must be set"):
        write_states(run_config([*live(folder), "distillation.teacher=null"]), tmp_path / "none")
    assert not (tmp_path / "none").exists()
