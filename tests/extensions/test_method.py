"""A training method and a callback from outside the package: loop, plan and checkpoints take them as they come.

The method lets the last block learn ever more slowly: nothing that anybody needs, but it uses every hook.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from extensions_setup import SETTINGS, write_corpus
from harness import run_distributed

from megasparse.checkpoint.reader import Checkpoint
from megasparse.config.loader import load_config
from megasparse.config.schema import RunConfig
from megasparse.engine.optimizer import Multipliers, ParameterGroup
from megasparse.launching import LaunchEnvironment
from megasparse.methods.callback import Callback, Step, TrainingMethod
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup
from megasparse.training.run import pretrain


class SlowingBlocks(TrainingMethod):
    """Multiplies the learning rate of the last block by 0.8 in each step, and computes it for ever fewer tokens (so it
    says, for the ledger)."""

    name = "slowing"

    def __init__(self, config: RunConfig, model: GPT, tensor_parallel: CommunicationGroup) -> None:
        self.block = model.layers[-1]
        self.names = [name for name, _ in model.named_modules() if name.startswith("layers.1.")]
        self.factor = torch.ones(1, dtype=torch.float64)

    def groups(self) -> Sequence[tuple[ParameterGroup, Sequence[torch.nn.Parameter]]]:
        return [(ParameterGroup("slowing"), list(self.block.parameters()))]

    def multipliers(self, group: str) -> Multipliers:
        return Multipliers(lr=float(self.factor))

    def begin_step(self, step: Step) -> None:
        self.factor = torch.tensor([0.8**step.number], dtype=torch.float64)
        step.work.computed |= dict.fromkeys(self.names, float(self.factor))

    def next_change(self, index: int, steps: int) -> int:
        return index + 1

    def after_step(self, step: Step) -> None:
        step.metrics["slowing"] = float(self.factor)
        if step.number % 4 == 0:
            step.records["slowing"] = [{"step": step.number, "factor": float(self.factor)}]

    def plan_lines(self) -> list[str]:
        return ["the last block learns ever more slowly"]

    def summary(self) -> dict[str, Any]:
        return {"slowing": float(self.factor)}

    def state(self) -> dict[str, torch.Tensor]:
        return {"factor": self.factor}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        if set(state) != {"factor"}:
            raise ValueError("slowing: the checkpoint holds no part of it")
        self.factor = state["factor"]


class Gradients(Callback):
    """Leaves the gradient norm of each step in a file of records."""

    def after_step(self, step: Step) -> None:
        step.records["norms"] = [{"step": step.number, "norm": step.gradient_norm}]


def train(words: list[str]) -> dict[str, Any]:
    """On every rank; in processes of their own, for DeepSpeed changes torch for the rest of a process."""
    environment = LaunchEnvironment.from_variables(os.environ)
    return pretrain(load_config([], words), environment, methods=[SlowingBlocks], callbacks=[Gradients()])


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("zero_stage", "ranks"), [pytest.param(0, 1, marks=pytest.mark.exhaustive), (3, 2)])
def test_a_method_from_outside_takes_part_in_all_of_a_run(tmp_path: Path, zero_stage: int, ranks: int) -> None:
    words = [*SETTINGS, *write_corpus(tmp_path), f"deepspeed.zero_stage={zero_stage}", "train.save_interval=6"]
    whole = run_distributed(train, ranks, [*words, "run.name=whole"], with_mesh=False)[0]
    assert whole["slowing"] == pytest.approx(0.8**12) and whole["finished"]
    metrics = lines(tmp_path / "whole", "metrics")
    assert [line["slowing"] for line in metrics] == pytest.approx([0.8**step for step in (3, 6, 9, 12)])
    assert [line["step"] for line in lines(tmp_path / "whole", "slowing")] == [4, 8, 12]
    norms = lines(tmp_path / "whole", "norms")
    assert [line["step"] for line in norms] == list(range(1, 13)) and all(line["norm"] > 0 for line in norms)
    plan = json.loads((tmp_path / "whole" / "plan.json").read_text())
    assert plan["methods"] == ["the last block learns ever more slowly"]
    assert metrics[-1]["flops_algorithmic"] == pytest.approx(plan["flops"]["algorithmic"], rel=1e-6)
    newest = tmp_path / "whole" / "checkpoints" / "step-00000012"
    with Checkpoint(newest) as saved:
        assert float(saved.method_state("slowing")["factor"]) == pytest.approx(0.8**12)

    run_distributed(train, ranks, [*words, "run.name=parts", "train.stop_after=6"], with_mesh=False)
    run_distributed(train, ranks, [*words, "run.name=parts", "train.resume=auto"], with_mesh=False)
    again = lines(tmp_path / "parts", "metrics")
    assert [line["loss"] for line in again] == [line["loss"] for line in metrics], "bit for bit"
    assert lines(tmp_path / "parts", "slowing") == lines(tmp_path / "whole", "slowing")


def test_a_checkpoint_without_its_part_is_refused(tmp_path: Path) -> None:
    words = [*SETTINGS, *write_corpus(tmp_path), "run.name=run", "train.stop_after=6"]
    run_distributed(train_plainly, 1, words, with_mesh=False)
    with pytest.raises(Exception, match="slowing: the checkpoint holds no part of it"):
        run_distributed(train, 1, [*words[:-1], "train.resume=auto"], with_mesh=False)


def test_a_few_steps_are_profiled_on_every_rank(tmp_path: Path) -> None:
    words = [*SETTINGS, *write_corpus(tmp_path), "run.name=run", "train.profile_steps=2"]
    run_distributed(train_plainly, 2, words, with_mesh=False)
    traces = sorted((tmp_path / "run" / "profile").iterdir())
    assert [path.name for path in traces] == ["rank-00000.json", "rank-00001.json"]
    for path in traces:
        events = [event["name"] for event in json.loads(path.read_text())["traceEvents"] if "name" in event]
        # Two micro-batches a rank and step are one with two ranks: the embedding is looked up once in each step.
        assert events.count("aten::embedding") == 2 * 2, "two steps, and two tables"


def test_it_multiplies_what_the_other_methods_ask_for(tmp_path: Path) -> None:
    """The last block's matrices belong to MST's groups too; without the method they learn faster."""
    words = [*SETTINGS, *write_corpus(tmp_path)]
    run_distributed(train, 1, [*words, "run.name=with"], with_mesh=False)
    run_distributed(train_plainly, 1, [*words, "run.name=without"], with_mesh=False)
    slowed, plain = (lines(tmp_path / name, "metrics")[-1] for name in ("with", "without"))
    assert slowed["loss"] > plain["loss"] and slowed["flops_executed"] < plain["flops_executed"]
    assert slowed["flops_dense"] == plain["flops_dense"] and "slowing" not in plain


def train_plainly(words: list[str]) -> dict[str, Any]:
    return pretrain(load_config([], words), LaunchEnvironment.from_variables(os.environ))
