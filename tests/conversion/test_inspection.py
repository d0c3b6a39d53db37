"""What is told of saved states of every kind, how two differ, and that damage is named and nothing is executed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_files import FILE, write_good
from tiny_states import STEP, TinyState, dense_config, write_model, write_run
from tool_calls import call

from megasparse.checkpoint.compact.manifest import MANIFEST, tensor_file
from megasparse.checkpoint.compact.writer import pack
from megasparse.checkpoint.index import INDEX
from megasparse.checkpoint.model_folder import TOPOLOGY
from megasparse.config.loader import load_config
from megasparse.conversion.folder_state import write_model_folder
from megasparse.conversion.sparsify import sparsify

UP = "layers.0.mlp.up"


class Intruder:
    """Would make a folder if it were unpickled as plain pickle does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The same sparse state in every form; `huggingface` has the tensors alone."""
    folder, config = tmp_path_factory.mktemp("made"), dense_config(algorithm="static", density=0.3)
    saved = sparsify(TinyState(dense_config()), config, "magnitude", STEP)
    write_run(folder / "run", saved, config)
    pack(saved, config, folder / "small", weights_only=False)
    write_model_folder(saved, config, {}, folder / "model")
    (folder / "huggingface").mkdir()
    (folder / "huggingface" / "config.json").write_text("{}")
    save_file(load_file(folder / "model" / "model.safetensors"), folder / "huggingface" / "model.safetensors")
    return folder


@pytest.fixture
def forms(made, tmp_path) -> Path:
    """A copy of them."""
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


CHECKPOINT = "run/checkpoints/step-00000006"
KINDS = {
    "run": "run", CHECKPOINT: "checkpoint", "small": "compact folder", "model": "model folder",
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_form_tells_the_same(made, name) -> None:
    status, printed = call("inspect_checkpoint", "--json", made / name)
    assert status == 0, printed
    found = json.loads(printed)
    assert found["kind"] == KINDS[name] and found["density"] == pytest.approx(0.3, abs=0.01)
    assert found["step"] == STEP and found["algorithm"] == "static" and found["tokens"] == 99
    assert found["moments"] == ([] if name == "model" else ["exp_avg", "exp_avg_sq"])
    rows = {row["name"]: row for row in found["tensors"]}
    assert found["parameters"] == 96 * 32 + 16 * 32 + sum(
        row["shape"][0] * (row["shape"][1] if len(row["shape"]) == 2 else 1)
        for name, row in rows.items() if not name.startswith("embedding")
    )  # fmt: skip
    up = rows[f"{UP}.weight"]
    assert (up["layer"], up["block_size"], up["shape"]) == (UP, 8, [128, 32]) and up["density"] == up["active"] / 64
    assert rows["final_norm.weight"]["density"] is None
    inactive = sum(
        round(row["shape"][0] * row["shape"][1] * (1 - row["density"])) for row in rows.values() if row["layer"]
    )
    assert found["active_parameters"] == found["parameters"] - inactive
    assert found["files"] and all(size > 0 for size, _ in found["files"].values())


def test_tables_show_it_and_values_are_read_where_asked_for(made) -> None:
    status, printed = call("inspect_checkpoint", made / "run")
    assert status == 0
    for part in ("step", "0.29", f"{UP}.weight", "128 x 32", "exp_avg, exp_avg_sq", FILE):
        assert part in printed, printed
    found = json.loads(call("inspect_checkpoint", "--json", "--values", made / "huggingface")[1])
    assert found["kind"] == "Hugging Face folder" and found["density"] == 1.0 and found["step"] == 0
    rows = {row["name"]: row["values"] for row in found["tensors"]}
    assert 0.6 < rows[f"{UP}.weight"]["zeros"] < 0.8 and rows[f"{UP}.weight"]["largest"] > 0.1
    assert rows["final_norm.weight"] == {"zeros": 0.0, "largest": pytest.approx(1.2, abs=0.3), "not_finite": 0}


def test_a_checkpoint_alone_is_shown_too(tmp_path) -> None:
    found = json.loads(call("inspect_checkpoint", "--json", write_good(tmp_path))[1])
    assert found["moments"] == ["exp_avg", "exp_avg_sq", "weight_steps"] and found["algorithm"] is None


@pytest.mark.parametrize("name", [*KINDS, "huggingface"])
def test_what_is_whole_is_well(made, name) -> None:
    assert call("inspect_checkpoint", "--verify", made / name) == (0, "all is well\n")


def test_forms_of_one_state_do_not_differ(made) -> None:
    for first, second in (("run", "small"), ("run", "model"), ("small", "huggingface")):
        found = json.loads(call("inspect_checkpoint", "--diff", "--json", made / first, made / second)[1])
        alike = second == "small"
        assert found["tensors"] == [] and found["equal"] == alike, found
        # What is not there is named: the moments.
        assert len(found["only_first"]) == (0 if alike else 2 * 28), found["only_first"]
    assert [layer["block_size"] for layer in found["layers"]] == ["sparse in the first only"] * 8
    printed = call("inspect_checkpoint", "--diff", made / "small", made / "huggingface")[1]
    assert "only in the first: 48 more" in printed and "28 tensors in both, 0 of them differ" in printed


def test_differences_are_told_layer_by_layer(made, tmp_path) -> None:
    config = dense_config(algorithm="static", density=0.5)
    other = sparsify(TinyState(dense_config(), step=8), config, "magnitude", 8)
    write_run(tmp_path / "other", other, config)
    status, printed = call("inspect_checkpoint", "--diff", "--json", made / "run", tmp_path / "other")
    found = json.loads(printed)
    assert status == 0 and not found["equal"]
    assert found["settings"] == ["sparsity.density: 0.3 -> 0.5"]
    assert found["progress"] == {"step": [6, 8], "optimizer steps": [6, 8]}
    layer = next(layer for layer in found["layers"] if layer["layer"] == UP)
    # The larger topology holds the smaller one: both keep the largest.
    assert layer["only_first"] == 0 and layer["only_second"] == 32 - layer["both"] and layer["both"] == 19
    change = next(row for row in found["tensors"] if (row["name"], row["kind"]) == (f"{UP}.weight", "fp32"))
    a = load_file(made / "model" / "model.safetensors")[f"{UP}.weight"]
    b = other.tensor(f"{UP}.weight", "fp32")
    assert change["largest"] == pytest.approx(float((a - b).abs().max()))
    assert change["relative"] == pytest.approx(float((a - b).norm() / a.norm()))
    assert change["entries"] == int((a != b).sum()) == 13 * 64
    assert len(found["tensors"]) == 8 * 3 and found["compared"] == 28 * 3
    printed = call("inspect_checkpoint", "--diff", made / "run", tmp_path / "other")[1]
    assert "sparsity.density: 0.3 -> 0.5" in printed and "84 tensors in both, 24 of them differ" in printed


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_in_the_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("folder", "damages"),
    [
        ("run", {f"{CHECKPOINT}/{FILE}": (flip_in_the_middle, "does not have its checksum")}),
        (CHECKPOINT, {f"{CHECKPOINT}/{INDEX}": (cut, "index.json is not readable")}),
        ("small", {f"small/{tensor_file(UP + '.weight')}": (cut, "bytes instead of"),
                   "small/config.yaml": (flip, "does not have its checksum")}),
        ("small", {f"small/{MANIFEST}": (cut, "manifest.json is not readable")}),
        ("model", {"model/model.safetensors": (cut, "bytes instead of"), f"model/{TOPOLOGY}": (Path.unlink, "is")}),
        ("model", {"model/checksums.json": (cut, "not readable")}),
        ("huggingface", {"huggingface/model.safetensors": (cut, "is not readable")}),
    ],
)  # fmt: skip
def test_every_bad_file_is_named(forms, folder, damages) -> None:
    for name, (damage, _) in damages.items():
        damage(forms / name)
    status, printed = call("inspect_checkpoint", "--verify", forms / folder)
    assert status == 1, printed
    lines = printed.splitlines()
    assert lines[-1] == f"{len(damages)} problems"
    for name, (_, reason) in damages.items():
        (line,) = [line for line in lines if line.startswith(f"{forms / name}: ")]
        assert reason in line
    assert "Traceback" not in call("inspect_checkpoint", forms / folder)[1]


def test_a_shard_that_the_index_lists_is_missed(forms) -> None:
    folder = forms / "huggingface"
    index = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(3)}, folder / "model-00001-of-00002.safetensors")
    status, printed = call("inspect_checkpoint", "--verify", folder)
    assert status == 1 and "model-00002-of-00002.safetensors: is missing" in printed
    status, printed = call("inspect_checkpoint", folder)
    assert status == 2 and "model-00002-of-00002.safetensors is missing" in printed


def test_weights_that_active_where_the_mask_is_inactive_are_named(forms) -> None:
    """Good checksums of bad numbers."""
    folder = forms / "model"
    weights = load_file(folder / "model.safetensors")
    inactive = (weights[f"{UP}.weight"] == 0).nonzero()[:3]
    weights[f"{UP}.weight"][inactive[:, 0], inactive[:, 1]] = 0.5
    config = load_config([folder / "config.yaml"])

    class Weights(TinyState):
        def tensor(self, name: str, kind: str) -> torch.Tensor:
            return weights[name]

    topology = (folder / TOPOLOGY).read_bytes()
    shutil.rmtree(folder)
    write_model(folder, Weights(dense_config()), config)
    (folder / TOPOLOGY).write_bytes(topology)
    status, printed = call("inspect_checkpoint", "--verify", folder)
    assert status == 1 and f"{UP}.weight: 3 entries of fp32 of inactive units are not 0" in printed


def test_nothing_is_executed_from_any_file(forms, tmp_path) -> None:
    trap = tmp_path / "broken-in"
    hugging_face = forms / "huggingface"
    (hugging_face / "model.safetensors").unlink()
    torch.save({"weight": Intruder(trap)}, hugging_face / "pytorch_model.bin")
    bad = forms / CHECKPOINT / FILE
    torch.save({"param": Intruder(trap)}, bad)
    for folder, file in (
        (forms / "run", bad),
        (hugging_face, hugging_face / "pytorch_model.bin"),
    ):
        for words in (["--verify", folder], ["--values", folder], ["--diff", folder, forms / "model"]):
            status, printed = call("inspect_checkpoint", *words)
            assert status == (1 if words[0] == "--verify" else 2), printed
            assert file.name in printed and "Traceback" not in printed and not trap.exists()
    # The trap works where it is let.
    function, arguments = Intruder(trap).__reduce__()
    function(*arguments)
    assert trap.is_dir()


def test_tensors_in_a_plain_file_of_torch_are_shown(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"w": torch.tensor([0.0, torch.nan])}, tmp_path / "pytorch_model.bin")
    found = json.loads(call("inspect_checkpoint", "--json", "--values", tmp_path)[1])
    assert found["tensors"][0]["values"] == {"zeros": 0.5, "largest": 0.0, "not_finite": 1}


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(tmp_path) -> None:
    write_good(tmp_path, 3)
    (write_good(tmp_path, 5) / FILE).unlink()
    (tmp_path / "config.yaml").write_text("model: {num_layers: 1}\n")
    status, printed = call("inspect_checkpoint", tmp_path / "checkpoints" / "step-00000005")
    assert status == 2 and f"{FILE} is missing" in printed
    (tmp_path / "config.yaml").unlink()
    status, printed = call("inspect_checkpoint", tmp_path)
    assert status == 0 and "passed over: checkpoint" in printed and f"{FILE} is missing" in printed
    status, printed = call("inspect_checkpoint", "--verify", tmp_path)
    assert status == 1 and f"{FILE} is missing" in printed


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["{made}/nowhere"], "no such folder; must be a run folder"),
        (["{made}"], "nothing that is known; must be a run folder"),
        (["{made}/run", "--step", "7"], "has no checkpoint of step 7; must be 6"),
        (["{made}/small", "--step", "6"], "--step: 6; must be unset"),
        (["--diff", "{made}/run"], "two with --diff"),
        (["{made}/run", "{made}/small"], "otherwise one"),
        (["--verify", "{made}/nowhere"], "no such folder"),
    ],
)
def test_what_cannot_be_asked_is_refused(made, words, reason) -> None:
    status, printed = call("inspect_checkpoint", *(word.format(made=made) for word in words))
    assert status == 2 and reason in printed and "Traceback" not in printed, printed
