"""The universal form of a checkpoint: its files, what damages it, what it is refused for, and its use of memory."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from deepspeed.checkpoint.universal_checkpoint import SubparamShape, load_hp_checkpoint_state
from deepspeed.utils.tensor_fragment import fragment_address
from saved_files import MODEL_STATES, content, layout, parameters, write, write_good

from megasparse.checkpoint.store import MANIFEST, TOPOLOGY, CheckpointError
from megasparse.checkpoint.universal import UniversalReader, has_universal, verify_universal, write_universal
from megasparse.engine.safe_checkpoint import load_data
from megasparse.parallel.shard_spec import ShardSpec


def test_it_holds_every_tensor_whole_and_the_state_of_the_run(tmp_path: Path) -> None:
    folder, weights, done = write_good(tmp_path), parameters(), []
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert write_universal(folder, done.append)
    assert done == [4 * 24, 4 * 28]
    universal = UniversalReader(folder)
    assert (universal.step, universal.shapes) == (3, {"table.weight": (6, 4), "norm.weight": (4,)})
    assert universal.kinds("table.weight") == ["fp32", "exp_avg", "exp_avg_sq", "weight_steps"]
    assert universal.kinds("norm.weight") == ["fp32", "exp_avg", "exp_avg_sq"]
    for name, weight in weights.items():
        for kind, factor in (("fp32", 1), ("exp_avg", 2), ("exp_avg_sq", 3)):
            assert torch.equal(universal.tensor(name, kind), factor * weight)
    assert universal.tensor("table.weight", "weight_steps").dtype == torch.int16
    assert universal.topology()["active/table"].tolist() == [3]
    assert (universal.manifest.train_state, universal.manifest.window_losses) == ({"step": 3}, [0.1, 0.3])
    verify_universal(folder)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_second_time_nothing_is_written(tmp_path: Path) -> None:
    folder = write_good(tmp_path)
    assert not has_universal(folder)
    assert write_universal(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not write_universal(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_left_overs_of_an_interrupted_writing_go(tmp_path: Path) -> None:
    folder = write_good(tmp_path)
    (folder / "partial-universal" / "zero").mkdir(parents=True)
    assert not has_universal(folder)
    assert write_universal(folder)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["universal"]


SHAPES = {
    "column": ShardSpec((8, 4), 0),
    "row": ShardSpec((8, 4), 1),
    "gate_up": ShardSpec((8, 4), 0, 1, (4, 4)),
    "qkv": ShardSpec((8, 4), 0, 1, (4, 2, 2)),
    "norm": ShardSpec((4,)),
}


@pytest.fixture
def divided(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A universal form of parameters that are divided in every way, and their weights."""
    weights = {name: torch.randn(partition.shape) for name, partition in SHAPES.items()}
    state = {
        number: {"step": torch.tensor(3.0), "exp_avg": 2 * weight, "exp_avg_sq": 3 * weight}
        for number, weight in enumerate(weights.values())
    }
    saved = {"module": weights, "optimizer": {"state": state}, "train_state": {}, "window_losses": [0.0]}
    folder = write(tmp_path, 3, {MODEL_STATES: saved}, layout(parameters=SHAPES, aliases={}, groups=[list(SHAPES)]))
    write_universal(folder)
    return folder / "universal" / "zero", weights


def test_files_say_how_to_divide_what_they_hold(divided) -> None:
    folder, _ = divided
    found = {name: load_data(folder / name / "fp32.pt") for name in SHAPES}
    assert {name: {k: v for k, v in values.items() if k != "param"} for name, values in found.items()} == {
        "column": {"cat_dim": 0, "param_n_sub_params": 1},
        "row": {"cat_dim": 1, "param_n_sub_params": 1},
        "gate_up": {"cat_dim": 0, "param_n_sub_params": 2},
        "qkv": {"sub_param_shape": SubparamShape(patterns=["qkv"], shape=((4, 2, 2), 4), partition_dim=0)},
        "norm": {},
    }


class Fragment:
    """What DeepSpeed's loader asks of a parameter whose rank holds all of its shard."""

    def __init__(self, numel: int) -> None:
        self.lp_fragment_address = fragment_address(numel=numel, start=0)
        self.weights, self.optim_fragment = torch.zeros(numel), {}

    def get_hp_fragment(self) -> torch.Tensor:
        return self.weights


@pytest.mark.parametrize("name", SHAPES)
def test_deepspeed_divides_them_as_we_do(divided, name) -> None:
    folder, weights = divided
    partition = dataclasses.replace(SHAPES[name], size=2)
    for rank in (0, 1):
        parameter = torch.nn.Parameter(torch.zeros(partition.local_shape))
        parameter._hp_mapping = Fragment(parameter.numel())
        step = load_hp_checkpoint_state(parameter, str(folder / name), rank, 2)
        expected = partition.shard(weights[name], rank).reshape(-1)
        assert step == 3 and torch.equal(parameter._hp_mapping.weights, expected)
        for kind, factor in (("exp_avg", 2), ("exp_avg_sq", 3)):
            assert torch.equal(parameter._hp_mapping.optim_fragment[kind], factor * expected), kind


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes().rstrip()[:-1])


def alter(path: Path) -> None:
    """Another byte where the tensor's numbers are: sizes stay."""
    found = bytearray(path.read_bytes())
    at = found.index(parameters()["table.weight"].numpy().tobytes())
    found[at] ^= 1
    path.write_bytes(bytes(found))


def exchange(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "topology_sha256": "0" * 64}))


def age_of_format(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 9}))


WEIGHT_FILE = "zero/table.weight/fp32.pt"


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        (WEIGHT_FILE, Path.unlink, "fp32.pt is missing"),
        (WEIGHT_FILE, cut, r"fp32.pt has \d+ bytes instead of \d+"),
        (MANIFEST, Path.unlink, "it is not there"),
        (MANIFEST, cut, "manifest.json is not readable"),
        (MANIFEST, exchange, "made from another checkpoint"),
        (MANIFEST, age_of_format, "format 9; must be 1"),
        (TOPOLOGY, cut, "topology.safetensors has"),
    ],
)
def test_damage_is_named_with_the_command_that_mends_it(tmp_path: Path, name, damage, reason) -> None:
    folder = write_good(tmp_path / "runs" / "first")
    write_universal(folder)
    damage(folder / "universal" / name)
    with pytest.raises(CheckpointError, match=reason) as caught:
        UniversalReader(folder)
    command = f"python tools/universal_checkpoint.py --run {tmp_path / 'runs' / 'first'} --step 3"
    assert command in str(caught.value)
    assert write_universal(folder)
    verify_universal(folder)


def test_altered_numbers_show_in_the_checksums(tmp_path: Path) -> None:
    folder = write_good(tmp_path)
    write_universal(folder)
    alter(folder / "universal" / WEIGHT_FILE)
    universal = UniversalReader(folder)
    reports = []
    for number in range(3):
        try:
            universal.check_files(number, 3)
        except CheckpointError as error:
            reports.append(str(error))
    (report,) = reports
    assert "zero/table.weight/fp32.pt does not have the checksum" in report
    with pytest.raises(CheckpointError, match="does not have the checksum"):
        verify_universal(folder)


def test_a_damaged_checkpoint_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    folder = write_good(tmp_path)
    cut(folder / MODEL_STATES)
    with pytest.raises(CheckpointError, match=f"{MODEL_STATES} has"):
        write_universal(folder)
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_verification_compares_with_the_checkpoint(tmp_path: Path) -> None:
    """A universal form with good checksums of its own, but of other numbers."""
    folder, other = write_good(tmp_path / "a"), write_good(tmp_path / "b", seed=1)
    write_universal(other)
    (other / "universal").rename(folder / "universal")
    with pytest.raises(CheckpointError, match="fp32 of table.weight differs from the checkpoint's"):
        verify_universal(folder)


def test_memory_holds_little_more_than_the_largest_tensor(tmp_path: Path) -> None:
    """100 MB of weights and moments, no tensor above 4 MB: far less of it may ever be in memory at once.

    Counted is memory of the process's own; pages of mapped files come and go with the system's need.
    """
    weights = {f"matrix.{i}": torch.randn(1024, 1024) for i in range(8)}
    state = {
        n: {"step": torch.tensor(3.0), "exp_avg": weight * 2, "exp_avg_sq": weight * 3}
        for n, weight in enumerate(weights.values())
    }
    saved = {"module": weights, "optimizer": {"state": state}, "train_state": {}, "window_losses": [0.0]}
    partitions = {name: ShardSpec((1024, 1024), 0) for name in weights}
    folder = write(tmp_path, 3, {MODEL_STATES: saved}, layout(parameters=partitions, aliases={}, groups=[[*weights]]))
    del saved, state, weights
    process, done = psutil.Process(), threading.Event()
    start = anonymous(process)
    peak = [start]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous(process))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        write_universal(folder)
    finally:
        done.set()
        watcher.join()
    # Measured: 4 to 17 MB, by what the allocator kept from before.
    assert peak[0] - start < 30e6, f"{(peak[0] - start) / 1e6:.1f} MB"


def anonymous(process: psutil.Process) -> int:
    memory = process.memory_info()
    return memory.rss - memory.shared


def test_before_the_first_step_there_are_only_weights(tmp_path: Path) -> None:
    folder = write_good(tmp_path, 0)
    write_universal(folder)
    universal = UniversalReader(folder)
    assert universal.step == 0 and universal.kinds("table.weight") == ["fp32"]
    assert not list(folder.rglob("step.pt"))


def test_content_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 3, {MODEL_STATES: {**content(parameters()), "module": {}}})
    with pytest.raises(CheckpointError, match="files are of another kind"):
        write_universal(folder)
