"""An evaluation, from checked settings to the JSON file.

record = evaluate(EvaluationSettings(run=Path("runs/x"), task="perplexity", input="test.txt"), environment)

Everything a user can get wrong is checked before the process group starts: the model is opened and the input read and
encoded on every rank. The ranks then share the windows; see ``scoring``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megasparse.config.loader import ConfigError, check_values
from megasparse.config.task import TaskConfig
from megasparse.evaluation.continuations import LastWord, MultipleChoice, last_word_task, multiple_choice_task
from megasparse.evaluation.detokenizers import DETOKENIZERS
from megasparse.evaluation.inputs import is_token_file, open_tokens, read_jsonl, read_text
from megasparse.evaluation.perplexity import Perplexity, text_perplexity, token_file_perplexity
from megasparse.evaluation.results import print_results, show_progress
from megasparse.evaluation.scoring import DTYPES, Scorer
from megasparse.evaluation.supervised_tasks import Asking, SupervisedTask, open_task
from megasparse.inference.compression import KERNELS, compress_model
from megasparse.inference.trained import TrainedModel, open_trained
from megasparse.launching import LaunchEnvironment, open_mesh
from megasparse.models.gpt import GPT
from megasparse.monitoring.console import make_console
from megasparse.parallel import CommunicationGroup
from megasparse.utils.files import write_json
from megasparse.utils.hardware import describe_hardware, package_versions

SUPERVISED = ("classification", "answer")
TASKS = ("perplexity", "last-word", "multiple-choice", *SUPERVISED)
TIMEOUT_SECONDS = 1800
"""How long a rank waits for the others, whose share is of the same size."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What the command line says; names and meanings are in ``launch/evaluate.py --help``."""

    run: Path
    task: str
    input: str
    step: int | None = None
    window: int | None = None
    stride: int | None = None
    detokenizer: str = "none"
    precision: str = "fp32"
    batch_size: int | None = None
    device: str = "cpu"
    limit: int | None = None
    choices: tuple[str, ...] | None = None
    marker: str | None = None
    max_tokens: int | None = None
    output: Path | None = None
    kernels: str = "auto"


def evaluate(settings: EvaluationSettings, environment: LaunchEnvironment) -> dict[str, Any]:
    """Evaluate, print and write; every rank returns the record. Raises ValueError for what the user must mend."""
    check_settings(settings)
    trained = open_trained(settings.run, settings.step)
    task = make_task(settings, trained)
    console = make_console() if environment.rank == 0 else None
    if console is not None:
        for reason in trained.passed_over:
            console.print(f"warning: passed over: {reason}", style="yellow", soft_wrap=True, markup=False)
    started = time.perf_counter()
    with sharing_ranks(environment, settings.device) as (ranks, device), show_progress(console) as advance:
        model = place(trained.model, device, settings.precision)
        plan = compress_model(model, settings.kernels)
        if console is not None and plan.num_packed:
            for line in plan.lines():
                console.print(line, soft_wrap=True, markup=False)
        if isinstance(task, SupervisedTask):
            batch_size = settings.batch_size or TaskConfig().batch_size
            results = task.measure(model, Asking(batch_size, ranks, advance=advance))
        else:
            scorer = Scorer(model, batch_size=settings.batch_size, ranks=ranks, advance=advance)
            batch_size, results = scorer.batch_size, task.results(scorer.scores(task.windows))
    record = {
        "task": settings.task,
        "input": settings.input,
        "model": str(settings.run),
        "step": trained.step,
        "settings": {
            **task.settings,
            "limit": settings.limit,
            "attention": trained.pattern,
            "tokenizer": trained.tokenizer.name,
            "precision": settings.precision,
            "packed_layers": plan.num_packed,
            "batch_size": batch_size,
        },
        "results": {**results, "seconds": round(time.perf_counter() - started, 3)},
        "hardware": describe_hardware(device, environment.world_size),
        "versions": package_versions(),
    }
    if console is not None:
        print_results(record, console)
        name = f"{settings.task}-{Path(settings.input).name}-step-{trained.step}.json"
        path = settings.output or settings.run / "evaluations" / name
        try:
            write_json(path, record, allow_nan=False)
        except OSError as error:
            raise ConfigError(f"--output: {path} cannot be written ({error})") from None
        console.print(f"written: {path}", soft_wrap=True, markup=False)
    return record


def check_settings(settings: EvaluationSettings) -> None:
    """Raise ConfigError for settings that are wrong, or that the task would ignore."""
    for name, value, allowed in (
        ("task", settings.task, TASKS),
        ("detokenizer", settings.detokenizer, tuple(DETOKENIZERS)),
        ("precision", settings.precision, tuple(DTYPES)),
        ("kernels", settings.kernels, KERNELS),
    ):
        if value not in allowed:
            raise ConfigError(f"--{name}: {value}; must be one of {', '.join(allowed)}")
    for name, number in (("batch-size", settings.batch_size), ("limit", settings.limit)):
        if number is not None and number < 1:
            raise ConfigError(f"--{name}: {number}; must be 1 or more")
    if settings.precision == "fp16" and settings.device == "cpu":
        raise ConfigError("--precision: fp16 needs a GPU; on a CPU it must be fp32, bf16")
    if settings.output is not None and settings.output.is_dir():
        raise ConfigError(f"--output: {settings.output} is a folder; must be the name of a file")
    for name, of in (("choices", "classification"), ("marker", "answer"), ("max_tokens", "answer")):
        if settings.task != of and getattr(settings, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: only used with --task {of}")
    if settings.task != "perplexity":
        for name, usual in (("window", None), ("stride", None), ("detokenizer", "none")):
            if getattr(settings, name) != usual:
                raise ConfigError(f"--{name}: only used with --task perplexity")


Task = Perplexity | LastWord | MultipleChoice | SupervisedTask


def make_task(settings: EvaluationSettings, trained: TrainedModel) -> Task:
    """Read and encode the input."""
    length = trained.config.model.seq_length
    if settings.task in SUPERVISED:
        given = {
            "path": settings.input,
            "kind": settings.task,
            "choices": None if settings.choices is None else list(settings.choices),
            "marker": settings.marker,
            "max_tokens": settings.max_tokens,
            "limit": settings.limit,
        }
        asked = check_values(TaskConfig, {name: value for name, value in given.items() if value is not None})
        return open_task(asked, trained.tokenizer, length, option="--input")
    window = length if settings.window is None else settings.window
    if not min(2, length) <= window <= length:
        raise ConfigError(f"--window: {window}; must be 2 to {length}, the sequence length of the model")
    if settings.task == "perplexity" and is_token_file(settings.input):
        if settings.detokenizer != "none":
            raise ConfigError(f"--detokenizer: {settings.detokenizer}; {settings.input} holds tokens, not text")
        dataset = open_tokens(settings.input, trained.model.vocab_size, trained.tokenizer)
        return token_file_perplexity(dataset, trained.tokenizer, window, settings.stride, settings.limit)
    if settings.task == "perplexity":
        text = read_text(settings.input)
        return text_perplexity(text, trained.tokenizer, window, settings.stride, settings.detokenizer, settings.limit)
    records = read_jsonl(settings.input, settings.limit)
    if settings.task == "last-word":
        return last_word_task(records, trained.tokenizer, length)
    return multiple_choice_task(records, trained.tokenizer, length, trained.begin_token)


@contextlib.contextmanager
def sharing_ranks(environment: LaunchEnvironment, device: str) -> Iterator[tuple[CommunicationGroup, torch.device]]:
    """The ranks that share the windows, over gloo, and this rank's device. A process alone needs no group.

    device: `cpu` or `cuda`; DS_ACCELERATOR must say the same where there are several ranks.
    """
    if environment.world_size == 1:
        yield CommunicationGroup(), torch.device(device)
        return
    with open_mesh(environment, TIMEOUT_SECONDS) as mesh:
        assert mesh.device.type == device, (mesh.device, device)
        yield mesh.control, mesh.device


def place(model: GPT, device: torch.device, precision: str) -> GPT:
    """The model on its device, in its precision, in evaluation mode."""
    return model.to(device=device, dtype=DTYPES[precision]).eval()
