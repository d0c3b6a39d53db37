"""A run before it starts: all that can be checked, opened and chosen without another rank.

    prepared = prepare(config, world_size)      # raises ValueError for what the user must mend
    refusal = take_folder(prepared, held, note)
    prepared = build_kernels(fit_to_machine(prepared, config, environment), world_size)

``check_start`` does the first alone, for jobs that will start elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megasparse.checkpoint.store import CHECKPOINTS, CheckpointStore
from megasparse.config.checks import check_run
from megasparse.config.loader import ConfigError, load_config
from megasparse.config.resuming import check_resume
from megasparse.config.schema import RunConfig
from megasparse.cost.attention_kernels import prepare_attention, resolve_dense_fallback
from megasparse.cost.cpu_kernels import prepare_cpu_kernels
from megasparse.cost.layer_kernels import prepare_kernels, target_device
from megasparse.cost.storage_choice import StorageChoice
from megasparse.data.build import build_data, open_tokenizer, vocabulary_size
from megasparse.data.record import changes_since, make_record
from megasparse.data.tokenizer import Tokenizer
from megasparse.engine.training_engine import check_precision
from megasparse.evaluation.supervised_tasks import SupervisedTask, open_task
from megasparse.launching import LaunchEnvironment
from megasparse.launching.run_lock import hold_folder, owner_of
from megasparse.methods.callback import MethodFactory
from megasparse.monitoring.console import make_console, print_warnings
from megasparse.monitoring.trackers import check_trackers
from megasparse.objectives.checks import check_response_tokens
from megasparse.training.plan import check_sample_prompt, plan_run, resolve_storage
from megasparse.tuning.first_start import fit_tables
from megasparse.utils.files import describe_failure


@dataclass(frozen=True)
class Prepared:
    """A run of which everything is known that can be known before it starts."""

    config: RunConfig
    folder: Path
    plan: dict[str, Any]
    tokenizer: Tokenizer | None
    vocab_size: int
    train_data: Any
    valid_data: Any
    record: dict[str, Any]
    """What the run keeps of its data, see ``data.record``."""
    changed_data: list[str]
    """What differs in it from the run that is gone on with, where that is allowed."""
    task: SupervisedTask | None = None
    """Measured at each validation."""
    choice: StorageChoice | None = None
    """How `sparsity.storage` auto was resolved."""


def prepare(
    config: RunConfig, world_size: int, device: str | None = None, methods: Sequence[MethodFactory] = ()
) -> Prepared:
    """Check all that can be checked, and open the data; nothing is built or written.

    device: that trains; None: that of this machine. Raises ValueError for what the user must mend.
    """
    check_run(config, world_size)
    folder = Path(config.run.folder) / config.run.name
    if device is None:
        check_precision(config, torch.device(target_device()))
    device = device or target_device()
    tokenizer = open_tokenizer(config)
    check_sample_prompt(config, tokenizer)
    vocab_size = vocabulary_size(config, tokenizer)
    config, choice = _resolved(config, folder, vocab_size, world_size, device)
    plan = plan_run(config, vocab_size, world_size, device, methods, choice=choice)
    train_data, valid_data = build_data(config, vocab_size)
    check_response_tokens(config, supervised=train_data.target_share(0) is not None)
    check_trackers(config.train.trackers)
    check_folder(folder, config)
    record = make_record(config, tokenizer)
    going_on = config.train.resume == "auto" and CheckpointStore(folder / CHECKPOINTS, 1).folders()
    changed = changes_since(folder, record, allowed=config.data.allow_changed) if going_on else []
    task = None if config.task.path is None else open_task(config.task, tokenizer, config.model.seq_length)
    return Prepared(config, folder, plan, tokenizer, vocab_size, train_data, valid_data, record, changed, task, choice)


def check_start(config: RunConfig, world_size: int, device: str | None = None) -> None:
    """Raise ValueError for all that ``pretrain`` would refuse before it starts; nothing is built or written."""
    prepare(config, world_size, device or target_device())


def take_folder(prepared: Prepared, held: ExitStack, note: Callable[[str], None]) -> str | None:
    """Keep other runs out of the run folder until `held` is closed; why that cannot be, for all ranks to raise."""
    try:
        held.enter_context(hold_folder(prepared.folder, note))
        # Again: another run may have been here since.
        check_folder(prepared.folder, prepared.config)
    except ConfigError as error:
        return str(error)
    except OSError as error:
        return f"run.folder: {describe_failure(error)}; must be a folder that can be written"
    return None


def fit_to_machine(
    prepared: Prepared, given: RunConfig, environment: LaunchEnvironment, methods: Sequence[MethodFactory] = ()
) -> Prepared:
    """The run as it is once the tables that choose kernels know this machine, which may take some seconds of measuring.

    The first rank of each node measures, before it comes to where all ranks meet; the others read the tables anew after
    that. given: the configuration before anything in it was resolved for a machine.
    """
    if given.kernels.tune == "never" or environment.local_rank != 0:
        return prepared
    console, device = make_console(), prepared.plan["kernels"]["device"]

    def tell(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    told = tell if environment.rank == 0 else None
    if not fit_tables(given, prepared.plan, tell=told, warn=lambda text: print_warnings([text], console)):
        return prepared
    vocab_size, world_size = prepared.vocab_size, environment.world_size
    config, choice = _resolved(given, prepared.folder, vocab_size, world_size, device)
    plan = plan_run(config, vocab_size, world_size, device, methods, choice=choice)
    return replace(prepared, config=config, plan=plan, choice=choice)


def build_kernels(prepared: Prepared, world_size: int, methods: Sequence[MethodFactory] = ()) -> Prepared:
    """Compile the kernels that the plan wants to use, and plan without those that cannot be, nor with packed storage
    that was chosen for them.

    Raises ConfigError where one cannot that was asked for by name.
    """
    config, plan, device = prepared.config, prepared.plan, prepared.plan["kernels"]["device"]
    by_device = (prepare_attention, prepare_cpu_kernels)
    if all([prepare_kernels(config, plan), *(is_ready(config, device) for is_ready in by_device)]):
        return prepared
    choice = prepared.choice
    if choice is not None and choice.storage == "packed" and not choice.is_kept:
        choice = StorageChoice("dense", "a kernel that it needs cannot be built")
        config = choice.applied_to(config)
    plan = plan_run(config, prepared.vocab_size, world_size, device, methods, planned_kernels=False, choice=choice)
    return replace(prepared, config=config, plan=plan, choice=choice)


def check_folder(folder: Path, config: RunConfig) -> None:
    """Raise ConfigError where the run would overwrite another one, or is another one than it is to go on with."""
    traces = [folder / "metrics.jsonl", folder / "checkpoints"]
    if config.train.resume == "never" and any(trace.exists() for trace in traces):
        owner = owner_of(folder)
        raise ConfigError(
            f"run.name: {folder.absolute()} holds a run already{f' ({owner})' if owner else ''}; must be another "
            "run.name, or train.resume=auto to go on"
        )
    saved = folder / "config.yaml"
    if config.train.resume == "auto" and saved.is_file() and CheckpointStore(folder / CHECKPOINTS, 1).folders():
        try:
            before = load_config([saved])
        except ConfigError:
            return  # said when it goes on, if the checkpoint fits
        check_resume(before, config)


def _resolved(
    config: RunConfig, folder: Path, vocab_size: int, world_size: int, device: str
) -> tuple[RunConfig, StorageChoice | None]:
    """With a list of patterns in place of attention.dense_fallback: true, and dense or packed in place of
    sparsity.storage: auto; a run that goes on keeps both."""
    before = folder / "config.yaml" if config.train.resume == "auto" else None
    return resolve_storage(resolve_dense_fallback(config, device, before), vocab_size, world_size, device, before)
