"""Runs that begin sparse, in the layouts that divide the model while it is built: ZeRO stage 3 with bfloat16."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from engine_runs import Layout, build, run_cases, run_config
from harness import run_distributed
from topology_digest import digest

from megasparse.engine.training_engine import model_construction
from megasparse.parallel import Mesh

COMMON = ["train.precision=bf16", "model.hidden_size=32", "train.steps=3", "sparsity.init_density_power=0.5"]
STARTS = {
    "blocks": ["sparsity.block_size=8", "sparsity.points=[[0,0.5],[1,0.5]]"],
    "weights": ["sparsity.block_size=1", "sparsity.algorithm=static", "sparsity.density=0.3"],
}


def starts(mesh: Mesh) -> dict[str, dict]:
    """By start and stage: digest of the first topology, and weights before the first step."""
    found = {}
    for name, overrides in STARTS.items():
        for stage in (1, 3):
            engine, controller = build(mesh, run_config([*COMMON, *overrides], Layout(data=2, zero=stage)))
            weights = {name: fragment.master for name, fragment in engine.state.fragments().items()}
            assert all(weight.dtype == torch.float32 for weight in weights.values())
            found[f"{name} {stage}"] = {
                "digest": digest(controller.topologies),
                "density": controller.density(),
                "square": mesh.data_parallel.sum_(sum(weight.square().sum() for weight in weights.values())),
            }
    return found


def constructors(mesh: Mesh) -> dict[str, str]:
    """Dtypes of what is made by name of float32 or by default while the model is built."""
    with model_construction(run_config(COMMON, Layout(data=2, zero=3)), mesh):
        linear = torch.nn.Linear(2, 2)
        made = {
            "empty": torch.empty(3, dtype=torch.float32),
            "zeros": torch.zeros(3),
            "tensor": torch.tensor([0.5]),
            "new": torch.Tensor(3),
        }
    return {"weight": str(linear.weight.dtype), **{name: str(tensor.dtype) for name, tensor in made.items()}}


def everything(mesh: Mesh) -> dict[str, dict]:
    cases = [(name, [*COMMON, *overrides], Layout(data=2, zero=3)) for name, overrides in STARTS.items()]
    return {"starts": starts(mesh), "constructors": constructors(mesh), "runs": run_cases(mesh, cases)}


@cache
def results() -> dict[str, dict]:
    return run_distributed(everything, 2, timeout=300)[0]


@pytest.mark.parametrize("name", STARTS)
def test_stage_3_starts_with_the_topology_and_weights_of_stage_1(name) -> None:
    divided, whole = (results()["starts"][f"{name} {stage}"] for stage in (3, 1))
    assert divided["digest"] == whole["digest"] and divided["density"] < 1
    # At stage 3 weights are rounded before and after they are scaled.
    assert float(divided["square"]) == pytest.approx(float(whole["square"]), rel=1e-3)


@pytest.mark.parametrize("name", STARTS)
def test_such_a_run_trains(name) -> None:
    run = results()["runs"][name]
    assert run["losses"].isfinite().all() and run["losses"][-1] < run["losses"][0]


def test_only_parameters_get_the_precision_of_training() -> None:
    """What else is drawn or counted in the meantime, such as random scores, keeps the dtype it was made with."""
    made = results()["constructors"]
    assert made.pop("weight") == "torch.bfloat16"
    assert set(made.values()) == {"torch.float32"}, made
