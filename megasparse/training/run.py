"""A whole run, from a checked configuration to the report in its folder.

summary = pretrain(config, LaunchEnvironment.from_variables(os.environ))

It is prepared, which finds what the user must mend before any process starts to wait for another; built; and trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megasparse.checkpoint.store import CHECKPOINTS, CheckpointStore
from megasparse.config.loader import ConfigError, load_config, save_config
from megasparse.config.resuming import announced_changes
from megasparse.config.schema import RunConfig
from megasparse.config.stages import growth_step, is_small, small_stage
from megasparse.cost.attention_kernels import agree_on_dense_fallback
from megasparse.cost.layer_kernels import running_kernels
from megasparse.cost.storage_choice import agree_on_storage
from megasparse.data.record import RECORD
from megasparse.engine.training_engine import TrainingEngine
from megasparse.inference.sampling import sample_text
from megasparse.kernels.common import tables
from megasparse.launching import LaunchEnvironment, open_mesh
from megasparse.launching.host_memory import return_memory
from megasparse.launching.identity import agree, check_steps, run_identity
from megasparse.launching.watchdog import Watchdog
from megasparse.methods.callback import Callback, MethodFactory, TrainingMethod
from megasparse.models.gpt import GPT
from megasparse.monitoring.console import (
    Progress,
    QuietProgress,
    make_console,
    print_plan,
    print_summary,
    print_warnings,
    quiet,
)
from megasparse.monitoring.records import RunRecords
from megasparse.objectives.objective import Objective
from megasparse.parallel import Mesh
from megasparse.sparsity.schedule import build_density_schedule
from megasparse.training.build_engine import Renewal, RunStorage, build_engine
from megasparse.training.checkpoints import Checkpointer, Checkpointing, Restored, begin_capacities, begins_small
from megasparse.training.initial_weights import load_initial_weights
from megasparse.training.loop import GROWTH, Trainer
from megasparse.training.metrics import Metrics
from megasparse.training.preparation import Prepared, build_kernels, fit_to_machine, prepare, take_folder
from megasparse.training.profile import Profile
from megasparse.training.signals import StopSignal
from megasparse.training.state import TrainState
from megasparse.training.validation import TaskMeasurement, Validation
from megasparse.utils.files import describe_failure, make_folders, write_at_once, write_json
from megasparse.utils.hardware import describe_hardware, package_versions

DENSITY_DIFFERENCE = 5e-4
"""Smaller changes at a resume are not worth a warning: a schedule of a few more steps is hardly another one."""


@dataclass(frozen=True)
class Extensions:
    """What a run uses besides what its configuration asks for."""

    objective: Objective | None = None
    """What is trained for; None: what the configuration asks for."""
    methods: Sequence[MethodFactory] = ()
    callbacks: Sequence[Callback] = ()


@dataclass(frozen=True)
class Stage:
    """Model and engine of a run, or of one of its two stages (section `stacking`), where it goes on."""

    config: RunConfig
    """Of the stage."""
    methods: list[TrainingMethod]
    engine: TrainingEngine
    checkpointer: Checkpointer
    state: TrainState
    found: Restored
    storage: RunStorage | None = None
    """Of a run with packed storage."""


@dataclass
class Built:
    """A run on this rank, ready for its next step."""

    config: RunConfig
    """With what the ranks have agreed on; of the whole model."""
    mesh: Mesh
    extensions: Extensions
    progress: Progress | QuietProgress
    watchdog: Watchdog
    records: RunRecords | None
    """Of rank 0."""
    notes: list[str]
    """What the user should know of where it goes on."""
    closing: ExitStack
    """Holds what must be closed with the trainer's engine."""
    trainer: Trainer = field(init=False)


def pretrain(
    config: RunConfig,
    environment: LaunchEnvironment,
    objective: Objective | None = None,
    *,
    methods: Sequence[MethodFactory] = (),
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train, and return the summary. Raises ValueError for what the user must mend, before any process group starts.

    objective: what is trained for; None: what the configuration asks for. methods, callbacks: besides those that the
    configuration asks for.
    """
    extensions, console = Extensions(objective, methods, callbacks), make_console()
    prepared = prepare(config, environment.world_size, methods=methods)
    with ExitStack() as held:
        refusal = None
        if environment.rank == 0:
            refusal = take_folder(prepared, held, lambda text: print_warnings([text], console))
        if refusal is None:
            prepared = fit_to_machine(prepared, config, environment, methods)
        if environment.rank == 0:
            print_plan(prepared.plan, console)
        identity = run_identity(config, prepared.record, prepared.plan["kernels"]["device"])
        known, prepared = prepared.plan["warnings"], build_kernels(prepared, environment.world_size, methods)
        if environment.rank == 0:
            print_warnings([warning for warning in prepared.plan["warnings"] if warning not in known], console)
        with ExitStack() as stack:
            built = build(
                prepared, environment, extensions, stack, lambda store: agree(store, environment, identity, refusal)
            )
            summary = train(prepared, built)
        if environment.rank == 0:
            # The process group has ended: drawing takes seconds, for which no other rank need wait.
            message = _leave_report(prepared.folder)
            print_summary(summary)
            built.progress.message(message)
    return summary


def build(
    prepared: Prepared,
    environment: LaunchEnvironment,
    extensions: Extensions,
    stack: ExitStack,
    agree: Callable[[dist.Store], None],
) -> Built:
    """Start the process groups, and put model, engine and callbacks together where the run goes on.

    stack: holds what must be closed when the run ends. agree: see ``open_mesh``.
    """
    config, folder = prepared.config, prepared.folder
    timeout, start_seconds = config.train.distributed_timeout_seconds, config.train.start_timeout_seconds
    size = config.parallel.tensor_parallel_size
    mesh = stack.enter_context(open_mesh(environment, timeout, size, start_seconds=start_seconds, agree=agree))
    if config.kernels.tune == "auto":
        # All ranks have come: the first one of this node has measured what was missing.
        tables.forget()
    config = agree_on_storage(agree_on_dense_fallback(config, mesh), mesh)
    watchdog = stack.enter_context(Watchdog(mesh, folder / "hangs", config.train.step_timeout_seconds, timeout))
    closing = stack.enter_context(ExitStack())
    stage = enter_stage(config, prepared, mesh, extensions, closing, going_on=config.train.resume == "auto")
    state, saved = stage.state, folder / "config.yaml"
    notes = _notes(stage, [*_changes_since_start(folder, config), *prepared.changed_data])
    check_steps(mesh, state.step)
    notes += _density_change(saved, config, state.step)
    if config.train.init_from is not None and state.step == 0:
        load_initial_weights(stage.config, stage.methods, stage.engine)
        notes = [*notes, f"starting from the weights of {config.train.init_from}"]
    # Only now: a resume that is refused must leave the run as it was, and all ranks have read what is replaced.
    mesh.barrier()
    if mesh.is_first:
        stage.checkpointer.store.clear()
        _write_start(prepared, config)
    progress = Progress(config.train.steps, start_step=state.step) if mesh.is_first else quiet()
    records = None
    if mesh.is_first:
        records = stack.enter_context(_open_records(prepared, config, state, progress.message))
    built = Built(config, mesh, extensions, progress, watchdog, records, notes, closing)
    profile = [Profile(config, folder, mesh)] if config.train.profile_steps else []
    built.trainer = make_trainer(stage, prepared, built, profile)
    return built


def enter_stage(
    config: RunConfig, prepared: Prepared, mesh: Mesh, extensions: Extensions, closing: ExitStack, *, going_on: bool
) -> Stage:
    """Model and engine with which the run goes on, standing where it goes on; every rank calls it.

    going_on: from the newest checkpoint where there is one.
    """
    store = CheckpointStore(prepared.folder / CHECKPOINTS, config.train.keep_checkpoints)
    stages = [config]
    if growth_step(config) is not None:
        small = mesh.agree_any(mesh.is_first and begins_small(store, config))
        # Where no checkpoint of the whole model can be read after all, the small one goes on.
        stages = [small_stage(config)] if small else [config, small_stage(config)]
    storage = RunStorage.of(config, prepared.vocab_size, mesh.tensor_parallel)
    capacities = begin_capacities(storage, store if going_on else None, mesh)
    passed_over: list[str] = []
    newest = None
    while stages:
        own, more = stages[0], (extensions.objective, extensions.methods)
        methods, engine = build_engine(own, prepared.vocab_size, mesh, *more, capacities=capacities)
        checkpointer = Checkpointer(store.folder, own, mesh, engine, methods, storage)
        found = checkpointer.restore(newest) if going_on else Restored()
        found.passed_over = list(dict.fromkeys([*passed_over, *found.passed_over]))
        if not found.needs_small and found.capacities is None:
            closing.enter_context(checkpointer)
            return Stage(own, methods, engine, checkpointer, found.state or TrainState(), found, storage)
        if found.needs_small:
            stages.pop(0)
        else:
            capacities, newest = found.capacities, found.step
        passed_over = found.passed_over
        engine.close()
        del methods, engine, checkpointer
        return_memory(mesh.device)
    raise AssertionError("the small model has no stage after it")


def make_trainer(stage: Stage, prepared: Prepared, built: Built, profile: Sequence[Profile] = ()) -> Trainer:
    """The loop of a stage with its callbacks."""
    config, engine, state, mesh = stage.config, stage.engine, stage.state, built.mesh
    # The last loss of the small model, and the first one of the whole model, as copied.
    lines_at = {growth_step(config) or 0} if is_small(config) else {state.step + 1} if stage.found.is_grown else set()
    trainer = Trainer(config, mesh, engine, stage.methods, prepared.train_data, state, watchdog=built.watchdog)
    if stage.storage is not None:
        more = (built.extensions.objective, built.extensions.methods)
        trainer.renewal = Renewal(config, prepared.vocab_size, mesh, stage.storage, *more)
    note, beat = built.progress.message, built.watchdog.beat
    trainer.callbacks = [
        *built.extensions.callbacks,
        *([] if prepared.valid_data is None else [Validation(config, engine, prepared.valid_data, mesh, state)]),
        *([] if prepared.task is None else [TaskMeasurement(config, engine, prepared.task, mesh, state)]),
        *profile,
        Metrics(config, mesh, state, built.records, built.progress, lines_at),
        Checkpointing(stage.checkpointer, config.train.save_interval, state, note, beat),
    ]
    return trainer


def grow(prepared: Prepared, built: Built) -> None:
    """Go on with the whole model, in the same way as a run that was stopped here; every rank calls it."""
    built.watchdog.beat("the copy of the layers", slow=True)
    built.closing.close()
    lines = built.trainer.state.lines
    built.trainer.engine.close()
    # Engines hold themselves in cycles: the small one must go before the whole one comes.
    del built.trainer
    return_memory(built.mesh.device)
    stage = enter_stage(built.config, prepared, built.mesh, built.extensions, built.closing, going_on=True)
    # The records, which go on, count them.
    stage.state.lines = lines
    for note in _notes(stage, []):
        built.progress.message(note)
    built.trainer = make_trainer(stage, prepared, built)


def train(prepared: Prepared, built: Built) -> dict[str, Any]:
    """Go through the steps that are left, and write sample and summary. Returns the summary."""
    mesh = built.mesh
    with built.progress, StopSignal() as stop:
        for note in built.notes:
            built.progress.message(note)
        reason = built.trainer.run(stop)
        if reason == GROWTH:
            grow(prepared, built)
            reason = built.trainer.run(stop)
    trainer = built.trainer
    built.watchdog.beat("the end of the run", slow=True)
    summary = summarise(prepared.plan, trainer, reason)
    if mesh.is_first:
        write_json(prepared.folder / "summary.json", summary, make_folder=False)
    # Every rank takes part: the model may be divided among them.
    _leave_sample(prepared, trainer, built.progress.message)
    mesh.barrier()
    return summary


def summarise(plan: dict[str, Any], trainer: Trainer, reason: str) -> dict[str, Any]:
    """The final numbers of a run, as written to ``summary.json``."""
    state, config = trainer.state, trainer.config
    state.ledger.seconds.settle()
    kernels = list(running_kernels(trainer.engine.model).values())
    return {
        "run": config.run.name,
        "steps": state.step,
        "tokens": state.tokens,
        "loss": state.last_loss,
        "val_loss": state.last_val_loss,
        "best_val_loss": state.best_val_loss,
        **_task_results(config, state),
        "skipped_steps": state.norms.skipped,
        **{key: value for method in trainer.methods for key, value in method.summary().items()},
        "flops_dense": state.ledger.flops.dense,
        "flops_algorithmic": state.ledger.flops.algorithmic,
        "flops_executed": state.ledger.flops.executed,
        "bytes_sent": dict(state.ledger.sent),
        "seconds": state.ledger.seconds.total,
        "seconds_by_part": state.ledger.by_part(),
        "kernels": {**plan["kernels"], "layers_at_end": {kernel: kernels.count(kernel) for kernel in set(kernels)}},
        "parameters": plan["parameters"]["total"],
        "hardware": describe_hardware(trainer.mesh.device, trainer.mesh.world_size),
        "versions": package_versions(),
        "finished": state.step == config.train.steps,
        "reason": reason,
    }


def _task_results(config: RunConfig, state: TrainState) -> dict[str, float | None]:
    if config.task.path is None:
        return {}
    return {"task_accuracy": state.last_task_accuracy, "best_task_accuracy": state.best_task_accuracy}


def _changes_since_start(folder: Path, config: RunConfig) -> list[str]:
    """Settings that differ from those that the run in the folder was last started with."""
    saved = folder / "config.yaml"
    if not saved.is_file():
        return []
    try:
        changes = announced_changes(load_config([saved]), config)
    except ConfigError as error:
        return [f"the saved configuration is not readable: {error}"]
    passing = ("train.resume:", "train.stop_after:", "data.allow_changed:")
    return [change for change in changes if not change.startswith(passing)]


def _density_change(saved: Path, config: RunConfig, step: int) -> list[str]:
    """Where the schedule has another density at `step` than when the run was last started: what happens to it.

    A longer run puts the step at an earlier part of the schedule: a finished one, dense again, becomes sparse.
    """
    try:
        before = load_config([saved]) if step and saved.is_file() else config
    except ConfigError:
        # Said already, with the other changes.
        return []
    old, new = (build_density_schedule(run.sparsity).density(step / run.train.steps) for run in (before, config))
    if abs(new - old) < DENSITY_DIFFERENCE:
        return []
    happens = "weights are dropped until it is reached" if new < old else "weights come back until it is reached"
    return [
        f"warning: density: {old:.4f} at step {step} of {before.train.steps} before, {new:.4f} at step {step} of "
        f"{config.train.steps} now: {happens}"
    ]


def _notes(stage: Stage, changes: list[str]) -> list[str]:
    """What to tell the user about where the run goes on. changes: since it was last started."""
    found, step = stage.found, stage.state.step
    if found.state is None:
        return []
    notes = [f"warning: passed over: {reason}" for reason in found.passed_over]
    notes += [f"warning: changed since the run was last started: {change}" for change in changes]
    config = stage.config
    copied = f", {config.stacking.num_layers} layers copied to {config.model.num_layers}" if found.is_grown else ""
    return [*notes, f"going on from step {step}{copied}"]


def _open_records(prepared: Prepared, config: RunConfig, state: TrainState, note: Callable[[str], None]) -> RunRecords:
    """Of rank 0."""
    return RunRecords(
        prepared.folder,
        resume_step=state.step,
        lines=state.lines,
        trackers=config.train.trackers,
        parameters={**config.model_dump(mode="json"), "plan": prepared.plan},
        warn=lambda text: note(f"warning: {text}"),
    )


def _write_start(prepared: Prepared, config: RunConfig) -> None:
    """config: with what the ranks have agreed on."""
    folder = prepared.folder
    make_folders(folder)
    save_config(config, folder / "config.yaml")
    write_json(folder / "plan.json", prepared.plan)
    write_json(folder / RECORD, prepared.record)


def _leave_report(folder: Path) -> str:
    """Where it is, or why there is none: like the sample, it can be made again from what is there."""
    # Here: the other ranks need not import what draws.
    from megasparse.reporting.report import write_report

    try:
        return f"report: {write_report(folder)}"
    except OSError as error:
        return f"warning: no report was left: {describe_failure(error)}"


def _leave_sample(prepared: Prepared, trainer: Trainer, note: Callable[[str], None]) -> None:
    """Write ``sample.txt``. The run has ended well: what goes wrong here is said, and changes nothing of that."""
    config, tokenizer = trainer.config, prepared.tokenizer
    train = config.train
    if tokenizer is None or not train.sample_tokens:
        return
    model: GPT = trainer.engine.model
    try:
        text = sample_text(model, tokenizer, train.sample_prompt, train.sample_tokens, seed=config.run.seed)
        if trainer.mesh.is_first:
            write_at_once(prepared.folder / "sample.txt", text, make_folder=False)
    except Exception as error:
        reason = describe_failure(error) if isinstance(error, OSError) else str(error)
        note(f"warning: no sample was left: {reason}")
