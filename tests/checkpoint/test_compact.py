"""Compact folders: what comes back, what cannot be stored silently, and what is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_files import files_of_at_most
from tiny_states import STEP, TinyState, content, dense_config, write_model, write_run
from tool_calls import call

from megasparse.checkpoint.compact.manifest import MANIFEST, checksum_of, read_manifest, size_report, tensor_file
from megasparse.checkpoint.compact.reader import CompactReader, unpack_run
from megasparse.checkpoint.compact.writer import pack
from megasparse.checkpoint.model_folder import TOPOLOGY
from megasparse.checkpoint.reader import Checkpoint
from megasparse.checkpoint.saved_state import RunFacts, sparse_parameters
from megasparse.checkpoint.store import CheckpointError
from megasparse.checkpoint.weights import find_checkpoint
from megasparse.conversion.sparsify import MaskedState, sparsify
from megasparse.sparsity.topology import pack_bits

UP = "layers.0.mlp.up"


def sparse_config(block_size: int = 8, **more):
    return dense_config(algorithm="static", density=0.3, block_size=block_size, **more)


def sparse_state(config) -> MaskedState:
    return sparsify(TinyState(dense_config()), config, "magnitude", STEP)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("form", [None, "bits", "list"])
@pytest.mark.parametrize("block_size", [1, 8])
def test_a_run_comes_back_bit_for_bit(tmp_path, block_size, form) -> None:
    config = sparse_config(block_size, per_weight_step_counts=True)
    saved = sparse_state(config)
    pack(saved, config, tmp_path / "small", weights_only=False, form=form)
    unpack_run(CompactReader(tmp_path / "small"), tmp_path / "run")
    again = Checkpoint(find_checkpoint(tmp_path / "run")[0])
    assert (again.facts, again.step, again.shapes) == (saved.facts, saved.step, saved.shapes)
    assert list(again.shapes) == list(saved.shapes)
    for name in saved.shapes:
        assert again.kinds(name) == saved.kinds(name)
        for kind in saved.kinds(name):
            assert same_bits(again.tensor(name, kind), saved.tensor(name, kind)), (name, kind)
    assert all(torch.equal(bits, again.topology()[key]) for key, bits in saved.topology().items())


def test_what_has_ever_lived_comes_back(tmp_path) -> None:
    config = sparse_config()
    saved = sparse_state(config)
    topology = saved.topology()
    topology[f"ever/{UP}"] |= 1
    saved.topology = lambda: topology
    pack(saved, config, tmp_path / "small", weights_only=False)
    found = CompactReader(tmp_path / "small").topology()
    assert all(torch.equal(bits, found[key]) for key, bits in topology.items()) and set(found) == set(topology)


def test_entries_of_inactive_units_that_are_not_alike_are_never_pruned(tmp_path) -> None:
    """A stray weight, negative zeros among zeros, and ages of several values: stored whole, and they come back."""
    config = sparse_config(per_weight_step_counts=True)
    saved = sparse_state(config)
    sparse = sparse_parameters(config, saved.shapes, [UP])[f"{UP}.weight"]
    inactive = sparse.inactive_entries(sparse.mask(saved.topology()[f"active/{UP}"]))
    changed = {kind: saved.tensor(f"{UP}.weight", kind) for kind in saved.kinds(f"{UP}.weight")}
    place = tuple(inactive.nonzero()[5].tolist())
    changed["fp32"][place], changed["exp_avg"][place], changed["weight_steps"][place] = 3.5, -0.0, 2
    plain = saved.tensor
    saved.tensor = lambda name, kind: changed[kind] if name == f"{UP}.weight" else plain(name, kind)
    pack(saved, config, tmp_path / "small", weights_only=False)
    compact = CompactReader(tmp_path / "small")
    for kind, tensor in changed.items():
        assert same_bits(compact.tensor(f"{UP}.weight", kind), tensor), kind
        assert (compact.manifest.parameters[f"{UP}.weight"].fill(kind) is None) == (kind != "exp_avg_sq")
    row = next(row for row in size_report(compact.manifest) if row.name == f"{UP}.weight")
    assert row.expected <= row.compact < row.expected + 700 and row.factor < 1.5


def test_ages_that_are_alike_in_all_inactive_units_cost_nothing(tmp_path) -> None:
    """In a run the ages of inactive weights count on, all alike: one number, not one each."""
    config = sparse_config(per_weight_step_counts=True)
    saved, name = sparse_state(config), f"{UP}.weight"
    age = saved.tensor(name, "weight_steps")
    sparse = saved.sparse[name]
    age[sparse.inactive_entries(sparse.mask(saved.topology()[f"active/{UP}"]))] = 3
    plain = saved.tensor
    saved.tensor = lambda n, kind: age if (n, kind) == (name, "weight_steps") else plain(n, kind)
    pack(saved, config, tmp_path / "small", weights_only=False)
    compact = CompactReader(tmp_path / "small")
    assert compact.manifest.parameters[name].fill("weight_steps") == 3 and same_bits(
        compact.tensor(name, "weight_steps"), age
    )


def test_a_model_folder_comes_back_with_its_dtype(tmp_path) -> None:
    saved, config = TinyState(dense_config()), dense_config()
    words = ["--density", "0.3", "--block-size", "8"]
    write_model(tmp_path / "dense", saved, config)
    assert call("sparsify", "--model", tmp_path / "dense", *words, "--output", tmp_path / "model")[0] == 0
    half = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(tmp_path / "model/model.safetensors").items()}
    metadata = {"format": "pt", "megasparse_model_folder": "1", "megasparse_facts": '{"step": 5}'}
    save_file(half, tmp_path / "model" / "model.safetensors", metadata)
    assert call("compact_checkpoint", "pack", "--model", tmp_path / "model", "--output", tmp_path / "small")[0] == 0
    status, printed = call("compact_checkpoint", "unpack", "--input", tmp_path / "small", "--output", tmp_path / "back")
    assert status == 0, printed
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(half) and all(same_bits(back[name], tensor) for name, tensor in half.items())
    assert (tmp_path / "back" / TOPOLOGY).read_bytes() == (tmp_path / "model" / TOPOLOGY).read_bytes()
    with pytest.raises(CheckpointError, match="it holds weights only, so no run can go on from it"):
        unpack_run(CompactReader(tmp_path / "small"), tmp_path / "run")


class LargeState:
    """144 MB of weights and moments, no tensor above 4 MB, made when they are asked for."""

    step, facts = 3, RunFacts(3, {}, {}, [])
    shapes = {f"matrix.{i}.weight": (1024, 1024) for i in range(12)}

    def kinds(self, name: str) -> list[str]:
        return ["fp32", "exp_avg", "exp_avg_sq"]

    def tensor(self, name: str, kind: str) -> torch.Tensor:
        return torch.tril(torch.ones(1024, 1024))

    def topology(self) -> dict[str, torch.Tensor]:
        bits = pack_bits(torch.tril(torch.ones(1024, 1024, dtype=torch.bool)))
        layers = [name.removesuffix(".weight") for name in self.shapes]
        return {f"{kind}/{layer}": bits.clone() for kind in ("active", "ever") for layer in layers}

    def loss_scaler(self) -> dict[str, float]:
        return {}

    def division(self, name: str) -> dict:
        return {}


@contextlib.contextmanager
def peak_of_memory() -> Iterator[list[int]]:
    """Most memory of the process's own meanwhile, in bytes: pages of mapped files come and go as the system likes."""
    process, done = psutil.Process(), threading.Event()

    def own() -> int:
        memory = process.memory_info()
        return memory.rss - memory.shared

    start, peak = own(), [0]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], own() - start)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def test_memory_holds_one_parameter_at_a_time(tmp_path) -> None:
    with peak_of_memory() as peak:
        pack(LargeState(), sparse_config(1), tmp_path / "small", weights_only=False)
        unpack_run(CompactReader(tmp_path / "small"), tmp_path / "run")
    # Of 144 MB; a parameter with its moments is 12 MB, and choosing by masks takes some more (35 to 70 measured).
    assert peak[0] < 80e6, peak


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    config = sparse_config()
    folder = tmp_path_factory.mktemp("packed") / "small"
    pack(sparse_state(config), config, folder, weights_only=False)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def change(**values):
    def write(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return write


FILE = tensor_file(f"{UP}.weight")


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        (FILE, Path.unlink, f"{FILE} is missing"),
        (FILE, cut, f"{FILE} has "),
        (FILE, alter, f"{FILE} does not have the checksum of the manifest"),
        ("config.yaml", alter, "config.yaml does not have the checksum"),
        (MANIFEST, Path.unlink, "manifest.json is missing"),
        (MANIFEST, cut, "manifest.json is not readable"),
        (MANIFEST, change(version=1), "version 1; must be 2"),
        (MANIFEST, change(format="other"), "its manifest.json is not of a compact folder"),
        (MANIFEST, change(step=7), "manifest.json does not have its own checksum"),
    ],
)
def test_damage_is_refused_and_the_output_left_as_it_was(packed, tmp_path, name, damage, reason) -> None:
    shutil.copytree(packed, tmp_path / "small")
    damage(tmp_path / "small" / name)
    (tmp_path / "out").mkdir()
    before = content(tmp_path)
    status, printed = call("compact_checkpoint", "unpack", "--input", tmp_path / "small", "--output", tmp_path / "out")
    assert status == 2 and reason in printed and "Traceback" not in printed, printed
    assert content(tmp_path) == before and sorted(path.name for path in tmp_path.iterdir()) == ["out", "small"]
    assert not any((tmp_path / "out").iterdir())


def write_values(folder: Path, values: dict) -> None:
    """A manifest that has its checksum."""
    (folder / MANIFEST).write_text(json.dumps({**values, "checksum": checksum_of(values)}))


def rewrite(folder: Path, **changes) -> None:
    """A manifest of good checksum that says something else of a parameter."""
    values = json.loads((folder / MANIFEST).read_text())
    values["parameters"][f"{UP}.weight"] |= changes
    write_values(folder, values)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_size": 7}, "manifest.json makes no sense"),
        ({"active": 1000}, "manifest.json makes no sense"),
        ({"active": 3}, "active units where 3 are announced|values of 3 active units"),
        ({"index": "2:4"}, "a mask of form '2:4'; must be one of bits, list"),
        ({"kinds": {"fp32": {"dtype": "complex64", "fill": 0}}}, "manifest.json makes no sense"),
        ({"kinds": {"fp32": {"dtype": "float16", "fill": 0}}}, "holds fp32 as torch.float32, not torch.float16"),
        ({"kinds": {"fp32": {"dtype": "float32", "fill": None}}}, r"has fp32 of shape \(\d+, 8, 8\), not \(128, 32\)"),
    ],
)
def test_a_manifest_that_contradicts_the_files_is_refused(packed, tmp_path, changes, reason) -> None:
    shutil.copytree(packed, tmp_path / "small")
    rewrite(tmp_path / "small", **changes)
    with pytest.raises(CheckpointError, match=reason):
        CompactReader(tmp_path / "small").tensor(f"{UP}.weight", "fp32")


def test_names_that_lead_elsewhere_are_refused(packed, tmp_path) -> None:
    shutil.copytree(packed, tmp_path / "small")
    values = json.loads((tmp_path / "small" / MANIFEST).read_text())
    values["parameters"]["../../escape"] = values["parameters"].pop(f"{UP}.weight")
    write_values(tmp_path / "small", values)
    with pytest.raises(CheckpointError, match="is no name of a parameter"):
        read_manifest(tmp_path / "small")


def test_a_folder_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path) -> None:
    with files_of_at_most(5000), pytest.raises(OSError, match="File too large") as raised:
        pack(TinyState(dense_config()), dense_config(), tmp_path / "small", weights_only=True)
    assert raised.value.filename.endswith(".safetensors") and not list(tmp_path.iterdir())


BAD_PACKING = [
    (["--run", "{run}", "--step", "7"], "has no checkpoint of step 7; must be 6"),
    (["--run", "{nothing}"], "has no good checkpoint"),
]


@pytest.mark.parametrize(("words", "reason"), BAD_PACKING)
def test_what_cannot_be_packed_is_refused_and_nothing_is_left(tmp_path, words, reason) -> None:
    write_run(tmp_path / "run", TinyState(dense_config()), dense_config())
    before = content(tmp_path)
    filled = [word.format(run=tmp_path / "run", nothing=tmp_path / "nothing") for word in words]
    status, printed = call("compact_checkpoint", "pack", *filled, "--output", tmp_path / "small")
    assert status == 2 and reason in printed and "Traceback" not in printed, printed
    assert content(tmp_path) == before and not (tmp_path / "small").exists()


def test_an_output_that_is_there_is_left_alone(packed, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("kept")
    status, printed = call("compact_checkpoint", "unpack", "--input", packed, "--output", tmp_path / "run")
    assert status == 2 and "holds something already" in printed
    assert content(tmp_path) == {"run/precious": b"kept"}
