"""A run that stops while it is ultra-sparse, packed, unpacked elsewhere, and gone on with: bit for bit the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from runs import REPOSITORY, TINY, command, curve, run
from tiny_states import TinyState, write_run
from tool_calls import call

from megasparse.checkpoint.compact.manifest import read_manifest, size_report, tensor_file
from megasparse.checkpoint.compact.reader import CompactReader
from megasparse.checkpoint.model_folder import ModelFolder
from megasparse.checkpoint.reader import Checkpoint
from megasparse.checkpoint.weights import find_checkpoint, load_model_weights
from megasparse.config.loader import load_config
from megasparse.sparsity.topology import unpack_bits

STOP = 11
AGES = "sparsity.per_weight_step_counts=true"


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """A run from the first step to the last."""
    folder = tmp_path_factory.mktemp("whole")
    run(command(corpus, folder, "run.name=run", AGES, ranks=1))
    return folder / "run"


@pytest.fixture(scope="module")
def stopped(corpus, tmp_path_factory) -> Path:
    """The same run, left after step 11."""
    folder = tmp_path_factory.mktemp("stopped")
    run(command(corpus, folder, "run.name=run", AGES, f"train.stop_after={STOP}", ranks=1))
    return folder / "run"


@pytest.fixture(scope="module")
def packed(stopped, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "small"
    status, printed = call("compact_checkpoint", "pack", "--run", stopped, "--output", output)
    assert status == 0 and f"{output}: written" in printed, printed
    return output


def test_all_that_matters_comes_back_bit_for_bit(stopped, packed) -> None:
    checkpoint, _ = find_checkpoint(stopped)
    saved, compact = Checkpoint(checkpoint), CompactReader(packed)
    assert (compact.facts, compact.step, compact.shapes) == (saved.facts, saved.step, saved.shapes)
    for name in saved.shapes:
        assert compact.kinds(name) == saved.kinds(name)
        for kind in saved.kinds(name):
            ours, theirs = compact.tensor(name, kind), saved.tensor(name, kind)
            assert ours.dtype == theirs.dtype and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name
    topology = saved.topology()
    assert set(topology) == set(compact.topology())
    assert all(torch.equal(bits, compact.topology()[key]) for key, bits in topology.items())


def test_it_is_smaller_by_the_expected_factor(stopped, packed) -> None:
    manifest = read_manifest(packed)
    sparse = [row for row in size_report(manifest) if row.density < 1]
    assert len(sparse) == 8
    for row in sparse:
        # 14 bytes a weight: weight, two moments and an age; and the masks. A file begins with a short description.
        assert row.dense == 14 * row.dense // 14 and row.density == pytest.approx(0.2, abs=0.04)
        assert row.expected <= row.compact < row.expected + 700
        masks = 2 * -(-row.dense // 14 // 256 // 8)
        assert abs(row.expected - row.density * row.dense - masks) < 40
    dense, compact = sum(row.dense for row in sparse), sum(row.compact for row in sparse)
    assert 4.5 < dense / compact < 5.0
    name = sparse[0].name
    assert (packed / tensor_file(name)).stat().st_size == sparse[0].compact


def test_a_run_goes_on_elsewhere_with_the_same_curve(corpus, whole, stopped, packed, tmp_path) -> None:
    again = tmp_path / "elsewhere" / "again"
    status, printed = call("compact_checkpoint", "unpack", "--input", packed, "--output", again)
    assert status == 0 and f"to go on: python launch/pretrain.py --config {again}" in printed, printed
    entry = str(REPOSITORY / "launch" / "pretrain.py")
    settings = ["--config", str(again / "config.yaml"), "train.resume=auto"]
    resumed = run([sys.executable, entry, *settings]).stdout
    assert f"going on from step {STOP}" in resumed
    expected = curve(whole)
    assert curve(stopped) == expected[:STOP]
    assert curve(again) == expected[STOP:] and len(curve(again)) == 24 - STOP
    # Not only the curve: every weight of the end.
    ends = [load_model_weights(find_checkpoint(folder)[0]) for folder in (whole, again)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_weights_alone_become_a_model_folder_with_exact_zeros(stopped, tmp_path) -> None:
    small, model = tmp_path / "small", tmp_path / "model"
    status, printed = call("compact_checkpoint", "pack", "--run", stopped, "--weights-only", "--output", small)
    assert status == 0 and "layers.0.mlp.up.weight" in printed, printed
    status, printed = call("compact_checkpoint", "unpack", "--input", small, "--output", model)
    assert status == 0 and f"train.init_from={model}" in printed, printed
    folder = ModelFolder(model)
    folder.check_files()
    saved = Checkpoint(find_checkpoint(stopped)[0])
    for name in folder.names:
        rows = folder.shape(name)[0]
        assert torch.equal(folder.tensor(name), saved.tensor(name, "fp32")[:rows]), name
    topology = folder.topology()
    for key in saved.topology():
        if key.startswith("active/"):
            assert torch.equal(topology[key], saved.topology()[key])
    weight = folder.tensor("layers.1.mlp.up.weight")
    active = unpack_bits(topology["active/layers.1.mlp.up"], weight.numel() // 256).view(-1, weight.shape[1] // 16)
    inactive = ~active.repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert inactive.float().mean() > 0.7 and not weight.view(torch.int32)[inactive].any()


def test_what_was_unpacked_serves_the_other_tools(stopped, packed, tmp_path) -> None:
    again = tmp_path / "again"
    assert call("compact_checkpoint", "unpack", "--input", packed, "--output", again)[0] == 0
    status, printed = call("inspect_checkpoint", "--verify", again)
    assert status == 0, printed
    folder, _ = find_checkpoint(again)
    ours, theirs = load_model_weights(folder), load_model_weights(find_checkpoint(stopped)[0])
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    status, printed = call("convert_checkpoint", "from-run", "--input", again, "--output", tmp_path / "model")
    assert status == 0, printed
    status, printed = call("inspect_checkpoint", "--diff", "--json", stopped, again)
    difference = json.loads(printed)
    assert difference["equal"] and difference["compared"] > 50 and difference["progress"] == {}
    assert [line.partition(":")[0] for line in difference["settings"]] == ["run.name", "run.folder", "train.stop_after"]


def test_a_dense_run_made_sparse_goes_on_in_training(corpus, tmp_path) -> None:
    settings = [*TINY, "sparsity.algorithm=dense", "train.steps=8", f"data.train=[{{path: {corpus}}}]"]
    config = load_config([], settings)
    write_run(tmp_path / "dense", TinyState(config, step=4, vocab_size=257), config)
    words = ["--density", "0.2", "--block-size", "16", "--algorithm", "rigl", "sparsity.update_interval=2"]
    status, printed = call("sparsify", "--run", tmp_path / "dense", *words, "--output", tmp_path / "sparse")
    assert status == 0, printed
    entry = [sys.executable, str(REPOSITORY / "launch" / "pretrain.py"), "train.resume=auto"]
    resumed = run([*entry, "--config", str(tmp_path / "sparse" / "config.yaml")]).stdout
    assert "going on from step 4" in resumed
    lines = curve(tmp_path / "sparse")
    assert [line[0] for line in lines] == [5, 6, 7, 8]
    assert all(line[4] == pytest.approx(0.2, abs=0.01) for line in lines)


@pytest.mark.parametrize("tool", ["compact_checkpoint", "sparsify"])
def test_state_of_other_methods_is_not_lost_without_a_word(tool, corpus, tmp_path) -> None:
    words = ["run.name=run", "sparsity.algorithm=dense", "layer_tying.mode=dynamic", "train.stop_after=2"]
    run(command(corpus, tmp_path, *words, ranks=1))
    given = ("pack",) if tool == "compact_checkpoint" else ("--density", "0.5", "--block-size", "16")
    status, output = call(tool, *given, "--run", tmp_path / "run", "--output", tmp_path / "small")
    assert status == 2 and "holds the state of layer_tying, which would be lost" in output.replace("\n", " "), output
    assert not (tmp_path / "small").exists()
