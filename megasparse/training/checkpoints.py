"""Saving and restoring a run: weights and moments, training methods, position and random states, as one checkpoint.

    checkpointer = Checkpointer(folder, config, mesh, engine, methods)
    found = checkpointer.restore()             # the newest good one, whatever layout wrote it
    with checkpointer:
        checkpointer.save(state)               # a thread copies the state to the host and writes it
        checkpointer.wait_for_copy()           # before weights or moments change
        checkpointer.finish()                  # waits for the thread

``Checkpointing`` is the callback that saves where it is due.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from threading import Event, Thread

import torch
from torch import Tensor

from megasparse.checkpoint.index import Index, read_index
from megasparse.checkpoint.packed import own_numbers
from megasparse.checkpoint.reader import METHOD, RANDOM, Checkpoint, index_damage
from megasparse.checkpoint.stacked import StackedCheckpoint
from megasparse.checkpoint.store import PREFIX, CheckpointError, CheckpointStore, check_model
from megasparse.checkpoint.writing import HostCopy, RankTensors, commit, join_parts, write_part
from megasparse.config.schema import RunConfig
from megasparse.config.stages import growth_step, is_of_small, is_small, small_stage
from megasparse.engine.restore import StagedState, apply_state, loss_scaler_state, optimizer_step, read_state
from megasparse.engine.training_engine import TrainingEngine
from megasparse.launching.failures import MaskError
from megasparse.methods.callback import Beat, Callback, Step, TrainingMethod
from megasparse.methods.mixed_sparsity import MixedSparsityTraining
from megasparse.parallel import Mesh
from megasparse.sparsity.slots import carried_slots
from megasparse.sparsity.topology import unpack_bits
from megasparse.training.build_engine import RunStorage, capacities_of
from megasparse.training.state import TrainState
from megasparse.utils.files import describe_failure, sync_files

WINDOW = "window"
"""Beginning of the names of a rank's own sums of losses in its file: `window/loss`, `window/<part>`."""
MESSAGE_BYTES = 1000
"""Of a message that ranks tell each other, at most."""


@dataclass
class Restored:
    """Where a run goes on. state: None where there is no checkpoint."""

    state: TrainState | None = None
    passed_over: list[str] = field(default_factory=list)
    """What is wrong with newer ones."""
    is_grown: bool = False
    """It is of the small model (section `stacking`), whose layers have been copied."""
    capacities: Mapping[str, int] | None = None
    """It needs an engine of these capacities of packed storage; nothing is restored yet."""
    step: int | None = None
    """Finished steps of the checkpoint that needs it."""
    needs_small: bool = False
    """The whole model has no good one, and the small one has some that it goes on from itself."""


@dataclass(frozen=True)
class FailedSave:
    """A checkpoint that could not be written."""

    step: int
    reason: str

    def __str__(self) -> str:
        return f"the checkpoint of step {self.step:,} was not saved: {self.reason}"


class Checkpointer:
    """The checkpoints of one run, on every rank. storage: of a run with packed storage."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        mesh: Mesh,
        engine: TrainingEngine,
        methods: Sequence[TrainingMethod],
        storage: RunStorage | None = None,
    ) -> None:
        self.store = CheckpointStore(folder, config.train.keep_checkpoints)
        self._config, self._mesh, self._storage = config, mesh, storage
        self.take_engine(engine, methods)
        self._thread: Thread | None = None
        self._copied = Event()
        self._step = 0
        self._saves = 0
        self._failure: FailedSave | None = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """After an error that all ranks raise alike, the checkpoint that is being written is waited for. After others
        it is not: a rank that has died would not write its part."""
        if kind is not None and issubclass(kind, ArithmeticError | MaskError):
            self._join()

    def release_engine(self) -> None:
        """Let go of the engine, for another one to be built: what is being saved of it is waited for."""
        self._join()
        del self._engine, self._methods, self._copy

    def take_engine(self, engine: TrainingEngine, methods: Sequence[TrainingMethod]) -> None:
        self._engine, self._methods = engine, methods
        self._copy = HostCopy(engine)

    def save(self, state: TrainState) -> None:
        """Begin a checkpoint of the finished step; every rank calls it. The next step may begin when it returns, and
        change weights after ``wait_for_copy``: a thread copies the state, during the forward and backward passes, and
        writes the copy. Waits for the checkpoint before, whose failure is to be asked for first.

        Raises MaskError, before anything is written, where a rank's masks are wrong.
        """
        self._join()
        self._step, self._saves, self._failure = state.step, self._saves + 1, None
        others = {
            f"{METHOD}/{method.name}/{key}": tensor
            for method in self._methods
            for key, tensor in method.state().items()
        }
        others |= self._copy.slots()
        others = others if self._mesh.is_first else {}
        others[f"{RANDOM}/cpu"] = torch.get_rng_state()
        # The sums of losses since the last line of metrics are each rank's own; all else in the state is common.
        sums = {name: torch.tensor([total], dtype=torch.float64) for name, total in state.window.losses.items()}
        others |= {f"{WINDOW}/{name}": total for name, total in sums.items()}
        failure: Exception | None = None
        if self._mesh.is_first:
            try:
                self.store.begin(state.step)
            except OSError as error:
                failure = error
        means = self._mesh.control.sum_(torch.cat(list(sums.values()))) / self._mesh.world_size
        # A copy: it must hold still while training goes on.
        common = TrainState.from_dict(state.to_dict())
        common.window.set_losses(dict(zip(sums, means.tolist(), strict=True)))
        index = self._index(common)
        copy = self._copy.begin({name: tensor.clone() for name, tensor in others.items()})
        if self._mesh.agree_any(failure is not None):
            self._fail(failure or CheckpointError("rank 0 could not begin a checkpoint"))
            return
        self._copied.clear()
        self._thread = Thread(target=self._write, args=(copy, index), name="checkpoint", daemon=True)
        self._thread.start()

    def wait_for_copy(self) -> None:
        """Wait until weights and moments may change."""
        if self._thread is not None:
            self._copied.wait()

    def failure(self, *, wait: bool = False) -> FailedSave | None:
        """The last save, where it has failed as far as this rank knows; told once. wait: until it has ended."""
        if wait or (self._thread is not None and not self._thread.is_alive()):
            self._join()
        failure, self._failure = self._failure, None
        return failure

    def finish(self) -> Path:
        """Wait until the last save has ended on all ranks; its folder.

        Every rank calls it. Raises CheckpointError on all where it failed on one.
        """
        failure = self.failure(wait=True)
        if message := self._first_message(None if failure is None else str(failure)):
            if self._mesh.is_first:
                # Again: a rank that was still writing may have put its file down after the first time.
                self.store.abandon(self._step)
            raise CheckpointError(message)
        return self.store.folder / self.store.name(self._step)

    def restore(self, newest: int | None = None) -> Restored:
        """Go on from the newest good checkpoint, which rank 0 chooses; every rank calls it. newest: from that of this
        step or from an older one.

        Of a run with two stages (section `stacking`) those that the other stage goes on from are left aside. The whole
        model grows from one of the small one, which is at the end of its stage.

        Raises CheckpointError where it is of another model or past the end of the run, or where there are checkpoints
        and none is good; RuntimeError where weights contradict masks.
        """
        found = Restored()
        folders = self.store.folders() if self._mesh.is_first else []
        own = [folder for folder in folders if self._is_of_this_stage(folder) is not False]
        candidates = self._numbers([int(folder.name.removeprefix(PREFIX)) for folder in own])
        candidates = [step for step in candidates if newest is None or step <= newest]
        for step in candidates:
            folder = self.store.folder / self.store.name(step)
            # Rank 0 looks first: the others may hold a view of a shared folder that is older. Of many files each rank
            # looks at those that it needs.
            reason = self._first_message(index_damage(folder) if self._mesh.is_first else None)
            if reason is None:
                checkpoint, failure, is_final = self._open(folder)
                staged = None
                if checkpoint is not None and failure is None:
                    staged, failure, is_final = self._read(checkpoint)
                reason = self._first_message(failure)
                if checkpoint is not None and reason is not None:
                    checkpoint.close()
                if self._mesh.agree_any(is_final):
                    raise CheckpointError(reason)
            if reason is not None:
                found.passed_over.append(reason)
                continue
            assert checkpoint is not None and staged is not None
            with checkpoint:
                if not isinstance(staged, StagedState):
                    found.capacities, found.step = staged, step
                    return found
                found.is_grown = self._grows_from(checkpoint.index)
                found.state = self._apply(checkpoint, staged)
            return found
        others = any(self._is_of_this_stage(folder) is False for folder in folders)
        found.needs_small = self._mesh.agree_any(others and not is_small(self._config))
        if found.passed_over and not found.needs_small:
            raise CheckpointError(
                f"run.name: {self._config.run.name} has no good checkpoint to go on from; must be another run.name, or "
                f"mend or remove them: {'; '.join(found.passed_over)}"
            )
        return found

    def _open(self, folder: Path) -> tuple[Checkpoint | None, str | None, bool]:
        """The checkpoint, or why it cannot be gone on from, and whether older ones are of no use either."""
        try:
            checkpoint = Checkpoint(folder)
        except CheckpointError as error:
            return None, str(error), False
        index, steps = checkpoint.index, self._config.train.steps
        try:
            expected = small_stage(self._config) if self._grows_from(index) else self._config
            check_model(folder, index.model, expected.model.model_dump(mode="json"))
        except CheckpointError as error:
            return checkpoint, str(error), True
        if index.step > steps:
            past = (
                f"checkpoint {folder} is past the end of the run: train.steps is {steps}; must be at least {index.step}"
            )
            return checkpoint, past, True
        return checkpoint, None, False

    def _read(self, checkpoint: Checkpoint) -> tuple[StagedState | Mapping[str, int] | None, str | None, bool]:
        """What this rank needs of it, or of which capacities of packed storage the engine must be to read it; or why it
        cannot be read, and whether older ones are of no use either."""
        try:
            source = self._source(checkpoint)
            topology = source.method_state(MixedSparsityTraining.name)
            checkpoint.check_slots()
            if self._storage is not None:
                capacities = self._storage.plan.capacities(self._storage.rung_of_saved(checkpoint.index.step, topology))
                if capacities != capacities_of(self._engine):
                    return capacities, None, False
            staged = read_state(self._engine, source, self._slots(checkpoint, topology))
            for method in self._methods:
                source.method_state(method.name)
        except CheckpointError as error:
            return None, str(error), False
        except ValueError as error:
            return None, f"checkpoint {checkpoint.folder}: {error}", True
        return staged, None, False

    def _slots(self, checkpoint: Checkpoint, topology: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The block in each slot of this rank's packed layers, by layer: as it was where the layout is the same."""
        ranks, found = self._mesh.tensor_parallel, {}
        is_same = checkpoint.index.layout.get("tensor_parallel_size") == ranks.size
        for name, layer in self._engine.packed_layers.items():
            mask = unpack_bits(topology[f"active/{layer.name}"], prod(layer.grid.shape)).view(layer.grid.shape)
            saved = checkpoint.slots(name) if is_same else None
            if saved is not None:
                saved = own_numbers(layer.grid, ranks.rank, saved.chunk(layer.grid.size)[ranks.rank])
            found[layer.name] = carried_slots(saved, layer.grid.shard(mask, ranks.rank), layer.capacity)
        return found

    def _apply(self, checkpoint: Checkpoint, staged: StagedState) -> TrainState:
        apply_state(self._engine, staged)
        source = self._source(checkpoint)
        try:
            for method in self._methods:
                method.load_state(source.method_state(method.name))
                method.check_state()
        except ValueError as error:
            raise CheckpointError(f"checkpoint {checkpoint.folder}: {error}") from error
        index, state = checkpoint.index, TrainState.from_dict(checkpoint.index.train_state)
        if self._grows_from(index):
            # What was usual for the small model says nothing of the whole one.
            state.norms.recent.clear()
        state.window.set_losses(self._window_losses(checkpoint, state))
        if self._is_same_layout(index) and (random := checkpoint.random_state(self._mesh.rank)) is not None:
            torch.set_rng_state(random)
        return state

    def _window_losses(self, checkpoint: Checkpoint, state: TrainState) -> dict[str, float]:
        """The sums of losses that this rank goes on from: its own in the same layout. In another one the means of those
        that were, as they are averaged over the ranks when they are logged; `state` has those of the parts."""
        losses, found = checkpoint.index.window_losses, {}
        if losses:
            found["loss"] = sum(losses) / len(losses)
        if self._is_same_layout(checkpoint.index):
            if len(losses) == self._mesh.world_size:
                found["loss"] = losses[self._mesh.rank]
            own = {name: checkpoint.own_tensor(self._mesh.rank, f"{WINDOW}/{name}") for name in state.window.losses}
            found |= {name: float(total) for name, total in own.items() if total is not None}
        return found

    def _is_of_this_stage(self, folder: Path) -> bool | None:
        """Whether the run goes on from a checkpoint with the model that the engine has; None: it is damaged."""
        small = goes_on_small(folder, self._config)
        return None if small is None else small == is_small(self._config)

    def _grows_from(self, index: Index) -> bool:
        """Whether a checkpoint is of the small model, and the engine has the whole one."""
        return not is_small(self._config) and is_of_small(self._config, index.model)

    def _source(self, checkpoint: Checkpoint) -> Checkpoint | StackedCheckpoint:
        """A checkpoint as one of the engine's model."""
        if not self._grows_from(checkpoint.index):
            return checkpoint
        return StackedCheckpoint(checkpoint, small_stage(self._config).model.num_layers, self._config.model.num_layers)

    def _is_same_layout(self, index: Index) -> bool:
        return index.layout == self._layout()

    def _layout(self) -> dict[str, int]:
        return {
            "world_size": self._mesh.world_size,
            "tensor_parallel_size": self._mesh.tensor_parallel.size,
            "zero_stage": self._config.deepspeed.zero_stage,
        }

    def _index(self, state: TrainState) -> Index:
        """state: with the means of the losses in the window."""
        return Index(
            step=state.step,
            model=self._config.model.model_dump(mode="json"),
            optimizer_step=optimizer_step(self._engine),
            train_state=state.to_dict(),
            window_losses=[state.window.loss],
            loss_scaler=loss_scaler_state(self._engine),
            layout=self._layout(),
            parameters=self._copy.parameters(),
            aliases=self._copy.aliases(),
        )

    def _write(self, copy: Callable[[], RankTensors], index: Index) -> None:
        """In the thread."""
        try:
            try:
                content = copy()
            finally:
                self._copied.set()
            partial, rank, size = self.store.partial(index.step), self._mesh.rank, self._mesh.world_size
            seconds = self._config.train.distributed_timeout_seconds
            write_part(partial, rank, content)
            join_parts(partial, rank, size, seconds, self._failure_of)
            if self._mesh.is_first:
                # Of what goes on from here no line of metrics may be missing after a power cut.
                sync_files(self.store.folder.parent, "*.jsonl")
                commit(self.store, index, size, seconds, self._failure_of)
        except Exception as error:
            failure = self._fail(error)
            if self._mesh.is_first:
                self.store.abandon(index.step)
            else:
                with contextlib.suppress(RuntimeError):
                    self._mesh.post(self._key(self._mesh.rank), failure.reason)

    def _failure_of(self, rank: int) -> str | None:
        """Why another rank cannot write its part of this checkpoint, once it has told."""
        return self._mesh.posted(self._key(rank))

    def _key(self, rank: int) -> str:
        """Under it a rank tells its failure. All ranks count the saves alike, those of each model of a run anew."""
        return f"save {self._saves} of {self._config.model.num_layers} layers failed on rank {rank}"

    def _fail(self, error: Exception) -> FailedSave:
        reason = describe_failure(error) if isinstance(error, OSError) else str(error)
        self._failure = FailedSave(self._step, reason)
        return self._failure

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _first_message(self, message: str | None) -> str | None:
        """That of the first rank that has one, on all ranks."""
        content = (message or "").encode()[:MESSAGE_BYTES]
        rank = self._mesh.first_rank_where(bool(content))
        if rank is None:
            return None
        row = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
        row[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
        text = bytes(self._mesh.from_rank(row, rank).tolist()).rstrip(b"\0").decode(errors="ignore")
        return text if rank == 0 else f"rank {rank}: {text}"

    def _numbers(self, numbers: list[int]) -> list[int]:
        """The list of rank 0, on all ranks."""
        count = int(self._mesh.from_first(torch.tensor(len(numbers))))
        return self._mesh.from_first(torch.tensor((numbers + [0] * count)[:count], dtype=torch.int64)).tolist()


def goes_on_small(folder: Path, config: RunConfig) -> bool | None:
    """Whether a run goes on from a checkpoint with the small model of section `stacking`; None: it is damaged.

    What model it is of decides, not its step alone: a run that is made longer after it has grown does not shrink.
    """
    try:
        index = read_index(folder)
    except CheckpointError:
        return None
    growth = growth_step(config)
    return growth is not None and is_of_small(config, index.model) and index.step < growth


def begins_small(store: CheckpointStore, config: RunConfig) -> bool:
    """Whether a run with two stages goes on, or begins, with the first; the newest checkpoint that is whole decides."""
    found = (goes_on_small(folder, config) for folder in store.folders())
    return next((small for small in found if small is not None), True)


def begin_capacities(storage: RunStorage | None, store: CheckpointStore | None, mesh: Mesh) -> Mapping[str, int] | None:
    """Capacities of packed storage with which a run begins, or goes on from the newest checkpoint of `store` that can
    be read, by rank 0; every rank calls it. ``restore`` says so where another one is taken after all."""
    if storage is None:
        return None
    rung = storage.plan.at(0)
    for folder in store.folders() if mesh.is_first and store is not None else ():
        try:
            with Checkpoint(folder) as checkpoint:
                topology = checkpoint.method_state(MixedSparsityTraining.name)
                rung = storage.rung_of_saved(checkpoint.index.step, topology)
        except ValueError:
            # Of a damaged checkpoint, or of one of another model, it is told when it is restored.
            continue
        break
    return storage.plan.capacities(int(mesh.from_first(torch.tensor([rung]))[0]))


class Checkpointing(Callback):
    """Saves every `train.save_interval` steps, and at the end of a run that has made a step since.

    note: shows a line to the person who watches.
    """

    def __init__(
        self, checkpointer: Checkpointer, interval: int, state: TrainState, note: Callable[[str], None], beat: Beat
    ) -> None:
        self._checkpointer, self._interval, self._state = checkpointer, interval, state
        self._note, self._beat, self._saved_step, self._saved = note, beat, state.step, False
        self._due = False

    def release_engine(self) -> None:
        self._checkpointer.release_engine()

    def take_engine(self, engine: TrainingEngine, methods: Sequence[TrainingMethod]) -> None:
        self._checkpointer.take_engine(engine, methods)

    def after_backward(self, step: Step) -> None:
        self._checkpointer.wait_for_copy()

    def after_step(self, step: Step) -> None:
        self._tell(self._checkpointer.failure())
        self._due |= self._interval > 0 and step.number % self._interval == 0
        # After a skipped step it waits for one that is not: a run that skips on and on, whose weights may be bad, must
        # not push good checkpoints out.
        if self._due and not step.skipped:
            self._save()

    def end_run(self, reason: str) -> None:
        unsaved = self._saved_step != self._state.step
        if unsaved:
            self._save()
        # A slow disk must not pass for a run that hangs.
        self._beat(f"step {self._state.step}: checkpoint", slow=True)
        if self._saved:
            folder = self._checkpointer.finish()
            if unsaved:
                self._note(f"checkpoint {folder.name} saved")

    def _save(self) -> None:
        self._beat(f"step {self._state.step}: checkpoint", slow=True)
        self._tell(self._checkpointer.failure(wait=True))
        self._checkpointer.save(self._state)
        self._saved_step, self._saved, self._due = self._state.step, True, False

    def _tell(self, failure: FailedSave | None) -> None:
        if failure is not None:
            self._note(f"warning: {failure}; training goes on")
