"""Fine-tuning of few entries by hand, on every rank: curves, what was chosen, what was trained."""

from __future__ import annotations

from pathlib import Path

import torch
from engine_runs import Layout, divided, make_batches, run_config
from torch import Tensor

from megasparse.checkpoint.adapter_file import Adaptation
from megasparse.checkpoint.model_folder import ModelFolder, pad_rows
from megasparse.engine.training_engine import TrainingEngine
from megasparse.methods.adapter import AdapterTuning
from megasparse.methods.callback import Step
from megasparse.parallel import Mesh
from megasparse.training.build_engine import build_engine
from megasparse.training.checkpoints import Checkpointer
from megasparse.training.initial_weights import load_initial_weights
from megasparse.training.state import TrainState

# Blocks of 16 hang over the edges of the MLP.
MODEL = [
    "sparsity.algorithm=dense",
    "model.hidden_size=32",
    "model.ffn_hidden_size=72",
    "model.bias=true",
    "model.tie_embeddings=true",
]
RUN = [*MODEL, "optimizer.schedule=constant", "optimizer.weight_decay=0.01", "train.steps=10"]
Case = tuple[str, list[str], Layout]


class Run:
    """A run on this rank, standing at a step."""

    def __init__(self, mesh: Mesh, layout: Layout, words: list[str], folder: Path | None = None) -> None:
        self.config, self.mesh = run_config([*RUN, *words], layout), divided(mesh, layout.tensor)
        self.methods, self.engine = build_engine(self.config, self.config.model.vocab_size, self.mesh)
        self.index = 0
        if folder is None:
            load_initial_weights(self.config, self.methods, self.engine)
        else:
            self.index = self.checkpointer(folder).restore().state.step
        for method in self.methods:
            method.begin_run(Step(self.index - 1))
        self.curve: list[float] = []

    def checkpointer(self, folder: Path) -> Checkpointer:
        return Checkpointer(folder, self.config, self.mesh, self.engine, self.methods)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with self.checkpointer(folder) as checkpointer:
            checkpointer.save(TrainState(step=self.index))
            checkpointer.finish()

    def advance(self, steps: int) -> None:
        for batch in make_batches(self.config)[self.index : self.index + steps]:
            self.curve.append(self.step(batch))
            self.index += 1

    def step(self, batch: Tensor) -> float:
        step, engine, total = Step(self.index), self.engine, torch.zeros((), dtype=torch.float64)
        size, axis = self.config.train.micro_batch_size, self.mesh.data_parallel
        for method in self.methods:
            method.begin_step(step)
        for micro in range(engine.accumulation_steps):
            start = (micro * axis.size + axis.rank) * size
            loss = engine.forward(batch[start : start + size, :-1], batch[start : start + size, 1:])
            engine.backward(loss)
            total += loss.detach().double() / engine.accumulation_steps
        engine.gradient_norm()
        for method in self.methods:
            method.after_backward(step)
        engine.step(self.config.optimizer.lr, skip_update=step.skip_update)
        for method in self.methods:
            method.after_step(step)
        return float(axis.sum_(total) / axis.size)

    @property
    def method(self) -> AdapterTuning:
        (found,) = (method for method in self.methods if isinstance(method, AdapterTuning))
        return found

    def optimizer_bytes(self) -> int:
        """Of moments and step counts, whatever they belong to."""
        states = self.engine.optimizer.state.values()
        return sum(tensor.nbytes for state in states for tensor in state.values() if tensor.dim())

    def result(self) -> dict:
        with torch.no_grad():
            # Puts the last step into the weights.
            batch = make_batches(self.config)[0][: self.config.train.micro_batch_size]
            self.engine.forward(batch[:, :-1], batch[:, 1:])
        found = self.method.adaptation()
        return {
            "curve": self.curve,
            "numbers": dict(found.numbers),
            "values": dict(found.values),
            "base": dict(found.base),
            "weights": frozen_weights(self.engine),
            "bytes": self.optimizer_bytes(),
            "trained": sum(tensor.numel() for tensor in self.engine.model.parameters()),
        }


def frozen_weights(engine: TrainingEngine) -> dict[str, Tensor]:
    """What the model computes with, by name of the buffer."""
    buffers = engine.model.named_buffers()
    return {name: tensor.clone() for name, tensor in buffers if name.rpartition(".")[2] in ("weight", "bias")}


def adaptation(result: dict) -> Adaptation:
    unit = next(iter(result["values"].values())).shape[-1]
    return Adaptation("", unit, "", result["numbers"], result["values"], result["base"])


def check_entries(result: dict, base: Path, density: float) -> None:
    """That share of each tuned matrix of the base is trained, nothing else, and the values are what has been added."""
    source, trained = ModelFolder(base), adaptation(result)
    for name in source.names:
        before, after, layer = source.tensor(name), result["weights"][name], name.removesuffix(".weight")
        if before.dim() == 2:
            before = pad_rows(before, after.shape[0])
        if layer in trained.numbers:
            numbers = trained.numbers[layer]
            assert len(numbers) == round(density * before.numel()) and torch.equal(numbers, numbers.unique())
            assert torch.equal(trained.merged(layer, before), after)
        else:
            assert torch.equal(before, after), name
    assert result["trained"] == sum(values.numel() for values in result["values"].values())
    assert result["curve"][-1] < result["curve"][0] - 0.05


def check_resumed(straight: dict, again: dict) -> None:
    """Bit for bit."""
    assert again["curve"] == straight["curve"]
    for kind in ("numbers", "values", "weights"):
        assert all(torch.equal(tensor, straight[kind][key]) for key, tensor in again[kind].items()), kind


def run_cases(mesh: Mesh, cases: list[Case], folder: Path, stops: tuple[int, ...]) -> dict[str, dict]:
    """Each case straight through; of those named with `stopped` a second run saves and is built anew at each stop."""
    found = {}
    for name, words, layout in cases:
        try:
            run = Run(mesh, layout, words)
            run.advance(run.config.train.steps)
            found[name] = run.result()
            if name.startswith("stopped"):
                found[f"{name} again"] = _stopped(mesh, layout, words, folder / name, stops)
        except Exception as error:
            raise RuntimeError(f"case {name}") from error
    return found


def _stopped(mesh: Mesh, layout: Layout, words: list[str], folder: Path, stops: tuple[int, ...]) -> dict:
    run, curve = Run(mesh, layout, words), []
    for stop in stops:
        run.advance(stop - run.index)
        run.save(folder)
        curve += run.curve
        run = Run(mesh, layout, words, folder)
    run.advance(run.config.train.steps)
    return run.result() | {"curve": curve + run.curve}
