"""What takes part in a run besides the loop: callbacks, and training methods, which are callbacks with more to say.

    class LossWatch(Callback):
        def after_step(self, step):
            step.notes.append(f"step {step.number}: learning rate {step.lr}")

    pretrain(config, environment, callbacks=[LossWatch()])

The loop calls the hooks of all of them in the order of a list, methods before callbacks, on every rank, so that a hook
may communicate. What a step has to tell travels in its ``Step``: values for the line of metrics, records, notes and
pictures; those who write it down (``metrics.Metrics``) stand last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from megasparse.checkpoint.model_folder import ModelFolder
from megasparse.config.schema import RunConfig
from megasparse.cost.ledger import StepWork
from megasparse.engine.optimizer import Multipliers, ParameterGroup
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup, Mesh
from megasparse.sparsity.controller import OpenWeight
from megasparse.sparsity.state import Importance, StateAccess

if TYPE_CHECKING:
    # Plans import this module, and must do without DeepSpeed.
    from megasparse.engine.training_engine import TrainingEngine


class Beat(Protocol):
    """Tells the watchdog where the run is. slow: what follows may take as long as the slowest thing."""

    def __call__(self, place: str, *, slow: bool = False) -> None: ...


def no_beat(place: str, *, slow: bool = False) -> None:
    """Nobody watches."""


@dataclass
class Step:
    """One optimizer step, filled in as it goes."""

    index: int
    """Of the step, from 0: steps that were finished before it."""
    skipped_before: int = 0
    """Steps right before it that were skipped, one after another."""
    work: StepWork = field(default_factory=StepWork)
    """What is computed; methods fill it in before the forward passes."""
    skipped: str | None = None
    """Why the step is skipped: its gradients change nothing, and ``after_backward`` is not called."""
    losses: dict[str, float] = field(default_factory=dict)
    """Means over this rank's micro-batches, by name, `loss` the sum; known after the backward passes."""
    skip_update: bool = False
    """Leave weights and moments as they are; a method may set it after the backward passes."""
    lr: float = 0.0
    """Base learning rate."""
    norm: Tensor | float = 0.0
    """The gradient norm; after the optimizer step a scalar on the device."""
    stop_asked: bool = False
    """A rank had been asked to stop when the gradient norm was taken: the run ends after this step."""
    line_due: bool = False
    """A line of metrics is to be written after this step."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Values for the line of metrics."""
    records: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    """Lines for `<name>.jsonl`, by name."""
    pictures: dict[str, Tensor] = field(default_factory=dict)
    """Masks, bool [rows, columns], by name of the layer."""
    notes: list[str] = field(default_factory=list)
    """Lines for the person who watches."""
    importance: Importance | None = None
    """What weights are worth in a topology update of this step; a method may offer it before the forward passes."""
    beat: Beat = no_beat

    @property
    def number(self) -> int:
        """Steps that are finished with it."""
        return self.index + 1

    @property
    def gradient_norm(self) -> float:
        """Over all ranks, before clipping; not finite where a gradient or a loss is not. In ``after_step`` it is that
        of the gradients that were used, and the first to ask waits until the device has made the step."""
        self.norm = float(self.norm)
        return self.norm


class Callback:
    """Hooks that do nothing; override those that are wanted.

    Between the end of a step and ``after_backward`` of the next one weights and moments may still be being copied for a
    checkpoint: hooks that run in between must not change them.
    """

    def begin_run(self, step: Step) -> None:
        """Before the first step of this start, and of the second stage of a run that grows (section `stacking`). step:
        the one that was finished last; index -1 at the very beginning."""

    def begin_step(self, step: Step) -> None:
        """Before the forward passes."""

    def after_backward(self, step: Step) -> None:
        """After the last backward pass of the step; gradients are averaged over the ranks and not yet clipped. Methods
        come after all other callbacks: until then nothing of the step before has changed. Not called for a step that is
        skipped because of its gradients, in which nothing changes."""

    def after_step(self, step: Step) -> None:
        """After the optimizer step; the state of training counts it as finished."""

    def release_engine(self) -> None:
        """The engine and the training methods are about to be replaced, as packed storage changes its capacity
        (`sparsity.storage`): a callback that holds them must let go of them, or two engines are in memory."""

    def take_engine(self, engine: TrainingEngine, methods: Sequence[TrainingMethod]) -> None:
        """The new ones, which stand where the old ones stood. Methods are made anew and load what the old ones saved,
        as in a run that goes on; ``begin_run`` of theirs follows."""

    def end_run(self, reason: str) -> None:
        """After the last step of this start or of a stage, whether the run is finished or was stopped."""


class Engine(Protocol):
    """What a method may ask of the engine."""

    @property
    def state(self) -> StateAccess:
        """This rank's pieces of the sparse matrices, which may be edited between the last backward pass and the step;
        ask anew in each step."""
        ...

    def access(self, weights: Mapping[str, nn.Parameter]) -> StateAccess: ...


class TrainingMethod(Callback):
    """A way to train for less: what it does in a step, its parameter groups, its part of the plan and of checkpoints.

    A plan calls ``begin_step`` and ``after_step`` of a method that was never attached to an engine: then it must say
    what the steps will do (`step.work`) without weights, masks or ranks.
    """

    name = ""
    """Names its part of a checkpoint: letters, digits, `_` and `-`."""

    def start(self, opened: OpenWeight) -> None:
        """Set first masks and weights, before the optimizer copies them. opened(weight): puts one together that ZeRO
        stage 3 keeps in pieces, as a context."""

    def attach(self, engine: Engine, mesh: Mesh) -> None:
        """The engine has been built; all ranks are there."""

    def start_from(self, folder: ModelFolder) -> None:
        """The run starts from the weights of `train.init_from`, which are loaded next: take over what else is there."""

    def initial_weight(self, name: str, weight: Tensor) -> Tensor:
        """A whole weight of that folder as it shall enter the run. name: of the parameter; all ranks ask for all."""
        return weight

    def groups(self) -> Sequence[tuple[ParameterGroup, Sequence[nn.Parameter]]]:
        """Parameters that want learning rate and weight decay of their own."""
        return ()

    def multipliers(self, group: str) -> Multipliers:
        """For the present step. group: name of one of its groups."""
        return Multipliers()

    def next_change(self, index: int, steps: int) -> int:
        """The first step after `index`, at most `steps`, whose work may differ from that of step `index`."""
        return steps

    def plan_lines(self) -> list[str]:
        """What it will do, for the plan."""
        return []

    def summary(self) -> dict[str, Any]:
        """What it has to say at the end of the run."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Its part of a checkpoint, the same on all ranks, which all call it. Empty: it has none.

        Where a run grows in depth, keys with the name of a layer (`active/layers.0.mlp.up`) are copied with it."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` gave, once weights and moments are restored. Raises ValueError where it does not
        fit."""

    def check_state(self) -> None:
        """Raise RuntimeError where weights that were loaded contradict what it knows of them."""


MethodFactory = Callable[[RunConfig, GPT, CommunicationGroup], TrainingMethod | None]
"""(configuration, this rank's shard of the model, its tensor-parallel ranks) -> a method; None: not asked for."""
