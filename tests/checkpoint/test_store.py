"""Checkpoint folders: whole or not at all, whatever happens to their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megasparse.checkpoint.store import (
    MANIFEST,
    TOPOLOGY,
    CheckpointError,
    CheckpointStore,
    Manifest,
    check_model,
    layout_differences,
    read_manifest,
)

MODEL = {"hidden_size": 64, "num_layers": 2, "vocab_size": None}


def write_parts(folder: Path, step: int) -> None:
    (folder / TOPOLOGY).write_bytes(b"topology of step %d" % step)
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"weights" * 100)


def save(store: CheckpointStore, step: int) -> Path:
    write_parts(store.folder / store.begin(step), step)
    return store.commit(Manifest(step=step, world_size=2, zero_stage=1, model=MODEL))


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=3)


def test_nothing_there_is_no_error(store) -> None:
    assert store.newest_good() is None and store.damaged() == []


def test_a_commit_is_found_and_described(store) -> None:
    folder = save(store, 100)
    found, manifest = store.newest_good()
    assert found == folder == store.folder / "step-00000100"
    assert (manifest.step, manifest.world_size, manifest.zero_stage, manifest.model) == (100, 2, 1, MODEL)
    assert manifest.files == {TOPOLOGY: len("topology of step 100"), "mp_rank_00_model_states.pt": 700}
    assert (store.folder / "latest").read_text() == "step-00000100"
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step-00000100"]
    check_model(found, manifest.model, MODEL)
    assert layout_differences(manifest, 2, 1, 1) == []


def test_the_newest_wins_and_old_ones_go(store) -> None:
    for step in (5, 20, 100, 1000, 9):
        save(store, step)
    names = sorted(path.name for path in store.folder.glob("step-*"))
    # Step 9 was asked for last, so it stays although higher steps are there.
    assert names == ["step-00000009", "step-00000020", "step-00000100", "step-00001000"]
    assert store.newest_good()[1].step == 1000


def test_the_same_step_can_be_saved_again(store) -> None:
    save(store, 5)
    write_parts(store.folder / store.begin(5), 77)
    store.commit(Manifest(step=5, world_size=1, zero_stage=0, model=MODEL))
    assert store.newest_good()[1].world_size == 1


def truncate(folder: Path) -> None:
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"weights" * 99)


def lose_a_file(folder: Path) -> None:
    (folder / "mp_rank_00_model_states.pt").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def cut_the_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])


def alter_the_topology(folder: Path) -> None:
    content = (folder / TOPOLOGY).read_bytes()
    (folder / TOPOLOGY).write_bytes(content[:-1] + b"?")


def change_manifest(**values):
    def change(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**content, **values}))

    return change


def replace_the_manifest(text: str):
    return lambda folder: (folder / MANIFEST).write_text(text)


DAMAGES = [
    (truncate, "mp_rank_00_model_states.pt has 693 bytes instead of 700"),
    (lose_a_file, "mp_rank_00_model_states.pt is missing"),
    (lose_the_manifest, "manifest.json is missing, so it was never finished"),
    (cut_the_manifest, "manifest.json is not readable"),
    (alter_the_topology, "topology.safetensors does not have the checksum"),
    (change_manifest(format=2), "format 2; must be 1"),
    (change_manifest(colour="red"), "manifest.json is not readable"),
    (change_manifest(files=[]), "manifest.json is not readable"),
    (replace_the_manifest("[1, 2]"), "manifest.json is not readable"),
    (replace_the_manifest("{}"), "manifest.json is not readable"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_damaged_folders_are_passed_over_with_a_reason(store, damage, reason) -> None:
    good, bad = save(store, 10), save(store, 20)
    damage(bad)
    assert store.newest_good()[0] == good
    (message,) = store.damaged()
    assert str(bad) in message and reason in message
    with pytest.raises(CheckpointError):
        read_manifest(bad)
    truncate(good)
    assert store.newest_good() is None and len(store.damaged()) == 2


def test_left_overs_of_interrupted_saves_are_no_checkpoints_and_go(store) -> None:
    good = save(store, 10)
    for step in (20, 30):
        write_parts(store.folder / store.begin(step), step)
    assert not (store.folder / store.partial_name(20)).exists()
    assert store.newest_good()[0] == good and store.damaged() == []
    save(store, 40)
    assert not list(store.folder.glob("partial-*"))


def test_damaged_checkpoints_do_not_crowd_out_good_ones(tmp_path) -> None:
    """A run that goes on from step 20, because 30 is cut off, must keep what it saves from then on."""
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 20)
    truncate(save(store, 30))
    write_parts(tmp_path / store.begin(25), 25)
    final = store.commit(Manifest(step=25, world_size=2, zero_stage=1, model=MODEL))
    assert final.is_dir() and store.newest_good()[0] == final
    assert not (tmp_path / "step-00000020").exists()


def test_misfits_name_every_field(store) -> None:
    folder = save(store, 10)
    _, manifest = store.newest_good()
    with pytest.raises(CheckpointError) as caught:
        check_model(folder, manifest.model, {**MODEL, "hidden_size": 128, "activation": "gelu"})
    for part in (
        str(folder), "model.hidden_size is 64 there and 128 here", "model.activation is None there and 'gelu' here",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert "num_layers" not in str(caught.value)
    assert layout_differences(manifest, 4, 2, 0) == [
        "it was saved by 2 ranks, this run has 4",
        "parallel.tensor_parallel_size is 1 there and 2 here",
        "deepspeed.zero_stage is 1 there and 0 here",
    ]


def test_a_universal_form_inside_a_checkpoint_goes_with_it_and_changes_nothing(store) -> None:
    for step in (5, 20, 100):
        folder = save(store, step)
        (folder / "universal").mkdir()
        (folder / "universal" / "manifest.json").write_text("{}")
    assert store.newest_good()[0] == folder and store.damaged() == []
    save(store, 1000)
    names = sorted(path.name for path in store.folder.glob("**/universal"))
    assert len(names) == 2 and not (store.folder / "step-00000005").exists()
