"""Runs that start from a model folder, or born sparse, at several tensor-parallel sizes and ZeRO stages: the same
weights, bit for bit, with the vocabulary padded anew, and the same first losses; topologies are taken over where they
fit."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from engine_runs import Layout, run_config
from harness import run_distributed
from initial_runs import BORN_SPARSE, MODEL, STATIC, run_starts, write_folder

from megasparse.checkpoint.model_folder import ModelFolder, pad_rows
from megasparse.models.build import build_model
from megasparse.sparsity.topology import unpack_bits

LAYOUTS = {
    1: [Layout(zero=0)],
    2: [Layout(data=2, zero=3), Layout(tensor=2, zero=1), Layout(data=2, zero=2)],
    4: [Layout(data=2, tensor=2, zero=3), Layout(tensor=4, zero=2), Layout(data=4, zero=1)],
}
RANKS = [1, 2, pytest.param(4, marks=pytest.mark.exhaustive)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("initial")
    write_folder(folder / "dense", MODEL)
    write_folder(folder / "sparse", STATIC, topology_seed=77)
    return folder


@cache
def results(ranks: int, folder: Path) -> dict[str, dict]:
    """Result by name, of all cases on so many ranks: rank 0's, as all must agree."""
    cases = []
    for layout in LAYOUTS[ranks]:
        from_dense, from_sparse = (f"train.init_from={folder / name}" for name in ("dense", "sparse"))
        cases += [
            (f"dense {layout}", [*MODEL, from_dense], layout),
            (f"sparse {layout}", [*STATIC, from_sparse], layout),
            (f"random {layout}", [*STATIC, from_dense], layout),
            (f"born {layout}", BORN_SPARSE, layout),
        ]
        if layout.zero:
            cases.append((f"bf16 {layout}", [*MODEL, from_dense, "train.precision=bf16"], layout))
    return run_distributed(run_starts, ranks, cases)[0]


@pytest.fixture(params=RANKS)
def starts(request, folders) -> dict[str, dict]:
    return results(request.param, folders)


@pytest.fixture
def reference(folders) -> dict[str, list[float]]:
    """First losses of a single rank by kind."""
    return {name.split()[0]: result["losses"] for name, result in results(1, folders).items()}


def test_masters_are_the_folders_weights_bit_for_bit(starts, folders) -> None:
    for name, result in starts.items():
        if name.startswith("born"):
            continue
        source = ModelFolder(folders / ("sparse" if name.startswith("sparse") else "dense"))
        for parameter, found in result["masters"].items():
            wanted = pad_rows(source.tensor(parameter), found.shape[0])
            if name.startswith("random"):
                wanted = torch.where(found == 0, 0, wanted)
            assert torch.equal(found, wanted), f"{name}: {parameter}"
        assert result["masters"]["head.weight"].shape[0] == 128


def test_weights_born_sparse_have_the_scale_of_their_density(starts) -> None:
    drawn = {name: weight.detach() for name, weight in build_model(run_config(MODEL), 97).named_parameters()}
    for result in (result for name, result in starts.items() if name.startswith("born")):
        for name, found in result["masters"].items():
            wanted, bits = drawn[name], result["topology"].get(f"active/{name.removesuffix('.weight')}")
            if bits is not None:
                grid = found.shape[0] // 16, found.shape[1] // 16
                mask = torch.kron(unpack_bits(bits, grid[0] * grid[1]).view(grid), torch.ones(16, 16)).bool()
                wanted = torch.where(mask, wanted * float(mask.double().mean()) ** -0.5, 0)
            assert torch.equal(found, wanted), name


def test_topologies_are_taken_over_where_they_fit(starts, folders) -> None:
    saved = ModelFolder(folders / "sparse").topology()
    for name, result in starts.items():
        active = torch.cat([bits for key, bits in sorted(result["topology"].items()) if key.startswith("active/")])
        wanted = torch.cat([bits for key, bits in sorted(saved.items()) if key.startswith("active/")])
        if name.startswith("sparse"):
            assert torch.equal(active, wanted), name
        elif name.startswith("random"):
            assert not torch.equal(active, wanted), name
            zeros = (result["masters"]["layers.0.mlp.up.weight"] == 0).float().mean()
            assert zeros == pytest.approx(0.75, abs=0.05)


def test_all_layouts_start_with_the_same_losses(starts, reference) -> None:
    for name, result in starts.items():
        kind = name.split()[0]
        # Rounding differs between layouts; bfloat16 has 8 significant bits.
        tolerance = {"rel": 1e-2} if kind == "bf16" else {"rel": 1e-5}
        assert result["losses"] == pytest.approx(reference["dense" if kind == "bf16" else kind], **tolerance), name
