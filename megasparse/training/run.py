"""A whole run, from a checked configuration to the report in its folder.

summary = pretrain(config, LaunchEnvironment.from_variables(os.environ))
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from megasparse.checkpoint.store import CheckpointError
from megasparse.config.loader import ConfigError, changed_settings, load_config, save_config
from megasparse.config.schema import RunConfig
from megasparse.cost.attention_kernels import agree_on_dense_fallback, prepare_attention, resolve_dense_fallback
from megasparse.cost.layer_kernels import prepare_kernels, target_device
from megasparse.data.build import build_data, open_tokenizer, vocabulary_size
from megasparse.data.tokenizer import Tokenizer
from megasparse.engine.training_engine import check_precision
from megasparse.inference.sampling import sample_text
from megasparse.launching import LaunchEnvironment, choose_accelerator, open_mesh
from megasparse.launching.watchdog import Watchdog
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
from megasparse.monitoring.trackers import check_trackers
from megasparse.parallel import Mesh
from megasparse.training.build_engine import build_engine
from megasparse.training.checkpoints import Checkpointer
from megasparse.training.initial_weights import load_initial_weights
from megasparse.training.loop import Trainer
from megasparse.training.objectives import Objective
from megasparse.training.plan import make_plan
from megasparse.training.signals import StopSignal
from megasparse.training.state import TrainState
from megasparse.utils.files import write_at_once, write_json
from megasparse.utils.hardware import describe_hardware, package_versions


def pretrain(config: RunConfig, environment: LaunchEnvironment, objective: Objective | None = None) -> dict[str, Any]:
    """Train, and return the summary. Raises ValueError for what the user must mend, before any process group starts.

    objective: what is trained for; None: next-token prediction.
    """
    folder = Path(config.run.folder) / config.run.name
    before = folder / "config.yaml" if config.train.resume == "auto" else None
    config = resolve_dense_fallback(config, target_device(), before)
    plan = make_plan(config, environment.world_size)
    tokenizer = open_tokenizer(config)
    vocab_size = vocabulary_size(config, tokenizer)
    train_data, valid_data = build_data(config, vocab_size)
    check_precision(config, torch.device(choose_accelerator(os.environ)))
    check_trackers(config.train.trackers)
    check_folder(folder, config)
    if environment.rank == 0:
        print_plan(plan, make_console())
    ready = prepare_kernels(config, plan), prepare_attention(config, plan["kernels"]["device"])
    if not all(ready):
        known, plan = plan["warnings"], make_plan(config, environment.world_size, planned_kernels=False)
        if environment.rank == 0:
            print_warnings([warning for warning in plan["warnings"] if warning not in known], make_console())
    with ExitStack() as stack:
        timeout, size = config.train.distributed_timeout_seconds, config.parallel.tensor_parallel_size
        mesh = stack.enter_context(open_mesh(environment, timeout, size))
        config = agree_on_dense_fallback(config, mesh)
        watchdog = stack.enter_context(Watchdog(mesh, folder / "hangs", config.train.step_timeout_seconds, timeout))
        controller, engine = build_engine(config, vocab_size, mesh, objective)
        checkpointer = Checkpointer(folder / "checkpoints", config, mesh, engine, controller)
        state, notes = _restore(checkpointer, config, _changes_since_start(folder, config))
        if config.train.init_from is not None and state.step == 0:
            load_initial_weights(config, controller, engine)
            notes = [*notes, f"starting from the weights of {config.train.init_from}"]
        # Only now: a resume that is refused must leave the run as it was, and all ranks have read what is replaced.
        mesh.barrier()
        if mesh.is_first:
            _write_start(folder, config, plan)
        progress = Progress(config.train.steps, start_step=state.step) if mesh.is_first else quiet()
        trainer = Trainer(
            config=config,
            mesh=mesh,
            engine=engine,
            controller=controller,
            train_data=train_data,
            valid_data=valid_data,
            checkpointer=checkpointer,
            records=_open_records(folder, config, plan, mesh, state, progress, stack),
            progress=progress,
            state=state,
            watchdog=watchdog,
        )
        with progress, StopSignal(mesh) as stop:
            for note in notes:
                progress.message(note)
            reason = trainer.run(stop)
        watchdog.beat("the end of the run", slow=True)
        summary = summarise(config, plan, trainer, reason)
        # Every rank takes part: the model may be divided among them.
        text = _sample(config, engine.model, tokenizer)
        if mesh.is_first:
            _write_end(folder, text, summary)
        mesh.barrier()
    if environment.rank == 0:
        # The process group has ended: drawing takes seconds, and no rank need wait for it, nor import what draws.
        from megasparse.reporting.report import write_report

        page = write_report(folder)
        print_summary(summary)
        progress.message(f"report: {page}")
    return summary


def check_start(config: RunConfig, world_size: int, device: str | None = None) -> None:
    """Raise ValueError for all that ``pretrain`` would refuse before it starts; nothing is written."""
    make_plan(config, world_size, device)
    build_data(config, vocabulary_size(config, open_tokenizer(config)))
    check_trackers(config.train.trackers)
    check_folder((Path(config.run.folder) / config.run.name).absolute(), config)


def check_folder(folder: Path, config: RunConfig) -> None:
    """Raise ConfigError where the run would overwrite another one."""
    traces = [folder / "metrics.jsonl", folder / "checkpoints"]
    if config.train.resume == "never" and any(trace.exists() for trace in traces):
        raise ConfigError(
            f"run.name: {folder} holds a run already; must be another run.name, or train.resume=auto to go on"
        )


def summarise(config: RunConfig, plan: dict[str, Any], trainer: Trainer, reason: str) -> dict[str, Any]:
    """The final numbers of a run, as written to ``summary.json``."""
    state = trainer.state
    return {
        "run": config.run.name,
        "steps": state.step,
        "tokens": state.tokens,
        "loss": state.last_loss,
        "val_loss": state.last_val_loss,
        "best_val_loss": state.best_val_loss,
        "final_density": trainer.controller.density(),
        "flops_dense": state.ledger.flops.dense,
        "flops_algorithmic": state.ledger.flops.algorithmic,
        "flops_executed": state.ledger.flops.executed,
        "seconds": state.ledger.seconds.total,
        "seconds_by_part": state.ledger.by_part(),
        "kernels": {**plan["kernels"], "layers_at_end": trainer.kernel_counts()},
        "parameters": plan["parameters"]["total"],
        "hardware": describe_hardware(trainer.mesh.device, trainer.mesh.world_size),
        "versions": package_versions(),
        "finished": state.step == config.train.steps,
        "reason": reason,
    }


def _changes_since_start(folder: Path, config: RunConfig) -> list[str]:
    """Settings that differ from those that the run in the folder was last started with."""
    saved = folder / "config.yaml"
    if not saved.is_file():
        return []
    try:
        changes = changed_settings(load_config([saved]), config)
    except ConfigError as error:
        return [f"the saved configuration is not readable: {error}"]
    passing = ("train.resume:", "train.universal:", "train.stop_after:")
    return [change for change in changes if not change.startswith(passing)]


def _restore(checkpointer: Checkpointer, config: RunConfig, changes: list[str]) -> tuple[TrainState, list[str]]:
    """Where the run goes on, and what to tell the user about it.

    Raises CheckpointError where there are checkpoints and none is good: starting over would replace the run's records.
    """
    if config.train.resume != "auto":
        return TrainState(), []
    damaged = checkpointer.store.damaged()
    state = checkpointer.restore()
    if state is None and damaged:
        raise CheckpointError(
            f"run.name: {config.run.name} has no good checkpoint to go on from; must be another run.name, or "
            f"mend or remove them: {'; '.join(damaged)}"
        )
    if state is None:
        return TrainState(), []
    notes = [f"warning: passed over: {reason}" for reason in damaged]
    notes += [f"warning: changed since the run was last started: {change}" for change in changes]
    return state, [*notes, f"going on from step {state.step}"]


def _open_records(
    folder: Path,
    config: RunConfig,
    plan: dict[str, Any],
    mesh: Mesh,
    state: TrainState,
    progress: Progress | QuietProgress,
    stack: ExitStack,
) -> RunRecords | None:
    if not mesh.is_first:
        return None
    records = RunRecords(
        folder,
        resume_step=state.step,
        trackers=config.train.trackers,
        parameters={**config.model_dump(mode="json"), "plan": plan},
        warn=progress.warning,
    )
    return stack.enter_context(records)


def _write_start(folder: Path, config: RunConfig, plan: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")
    write_json(folder / "plan.json", plan)


def _sample(config: RunConfig, model: GPT, tokenizer: Tokenizer | None) -> str | None:
    if tokenizer is None or not config.train.sample_tokens:
        return None
    train = config.train
    return sample_text(model, tokenizer, train.sample_prompt, train.sample_tokens, seed=config.run.seed)


def _write_end(folder: Path, sample: str | None, summary: dict[str, Any]) -> None:
    write_json(folder / "summary.json", summary)
    if sample is not None:
        write_at_once(folder / "sample.txt", sample)
