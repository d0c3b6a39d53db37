"""Kills and signals at chosen and at random moments of a step, of a save, of a start and of the end of a run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from attempt import Attempt
from forked_ranks import Ranks
from planted import at_call

ENGINE = "megasparse.engine.training_engine:TrainingEngine"
CHECKPOINTS = "megasparse.training.checkpoints"
WRITING = "megasparse.checkpoint.writing"
STORE = "megasparse.checkpoint.store"
RUN = "megasparse.training.run"

Moments = dict[str, int]
"""Function -> how often it is called in a run, about."""

OF_A_STEP: Moments = {
    f"{ENGINE}.forward": 24,
    f"{ENGINE}.backward": 24,
    "megasparse.sparsity.controller:Controller.update_topology": 4,
    f"{ENGINE}.step": 12,
    "megasparse.training.state:TrainState.advance": 12,
    f"{ENGINE}.evaluate": 3,
    "megasparse.monitoring.records:RunRecords.record": 6,
}
OF_A_SAVE: Moments = {
    f"{WRITING}:HostCopy.begin": 6,
    f"{WRITING}:HostCopy._copy": 6,
    f"{CHECKPOINTS}:Checkpointer.wait_for_copy": 12,
    f"{STORE}:CheckpointStore.begin": 6,
    f"{CHECKPOINTS}:write_part": 6,
    "megasparse.checkpoint.rank_file:_write_tensor": 400,
    "os:fsync": 40,
    f"{WRITING}:write_json": 6,
    f"{WRITING}:parse_file": 12,
    f"{WRITING}:write_index": 6,
    f"{STORE}:CheckpointStore.commit": 6,
    "os:replace": 25,
    f"{STORE}:sync_folder": 12,
    "shutil:rmtree": 4,
}
OF_A_START: Moments = {
    "megasparse.config.loader:load_config": 1,
    f"{RUN}:prepare": 1,
    "megasparse.training.preparation:build_data": 1,
    f"{RUN}:open_mesh": 1,
    f"{RUN}:build_engine": 1,
    f"{CHECKPOINTS}:Checkpointer.restore": 1,
    f"{CHECKPOINTS}:Checkpointer._read": 1,
    f"{CHECKPOINTS}:Checkpointer._apply": 1,
    f"{RUN}:_write_start": 1,
    f"{RUN}:save_config": 1,
    "megasparse.monitoring.records:RunRecords.__init__": 1,
    "megasparse.monitoring.records:_drop_lines_after": 2,
    "megasparse.training.loop:Trainer.run": 1,
}
OF_THE_END: Moments = {f"{RUN}:summarise": 1, f"{RUN}:_leave_sample": 1, f"{RUN}:write_json": 2}

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def kill_in(moments: Moments) -> Callable[[Attempt], None]:
    """A rank, or each of them, is killed at a moment; the run goes on at the next start."""

    def kind(attempt: Attempt) -> None:
        attempt.begin_anywhere()
        attempt.start(prepare=_planted(attempt, moments, (signal.SIGKILL,)), alone=_is_alone(attempt), deaths=True)
        attempt.finish()

    return kind


def signal_in(moments: Moments) -> Callable[[Attempt], None]:
    """A rank, or each of them, is asked to stop at a moment."""

    def kind(attempt: Attempt) -> None:
        attempt.begin_anywhere()
        attempt.start(prepare=_planted(attempt, moments, SIGNALS), deaths=True)
        attempt.finish()

    return kind


def kill_at_any_time(attempt: Attempt) -> None:
    """From outside, one rank or all at once, up to three times in a row."""
    attempt.begin_new()
    for _ in range(attempt.chance.randint(1, 3)):
        attempt.start(meanwhile=_at_random_time(attempt, (signal.SIGKILL,)), deaths=True)
    attempt.finish()


def signal_at_any_time(attempt: Attempt) -> None:
    attempt.begin_anywhere()
    attempt.start(meanwhile=_at_random_time(attempt, SIGNALS), deaths=True)
    attempt.finish()


def signal_twice(attempt: Attempt) -> None:
    """Ctrl-C for all, and again shortly after: the second one interrupts at once."""
    attempt.begin_anywhere()
    first = attempt.random_time()
    times = [first, first + attempt.chance.uniform(0, 0.2)]

    def send(ranks: Ranks, seconds: float) -> None:
        while times and seconds > times[0]:
            times.pop(0)
            for rank in range(attempt.layout.ranks):
                ranks.signal(rank, signal.SIGINT)

    attempt.fault = f"SIGINT at {times[0]:.2f} and {times[1]:.2f} s"
    attempt.start(meanwhile=send, deaths=True)
    attempt.finish()


def _is_alone(attempt: Attempt) -> bool:
    """Whether the other ranks are left to notice by themselves, which takes them seconds."""
    return attempt.chance.random() < 0.1


def _planted(attempt: Attempt, moments: Moments, numbers: tuple[signal.Signals, ...]) -> Callable[[int], None]:
    chance = attempt.chance
    target = chance.choice(list(moments))
    call, number = chance.randint(1, moments[target]), chance.choice(numbers)
    when, delay = chance.choice(["before", "after", "within"]), chance.uniform(0, 0.02)
    hit = chance.choice([*range(attempt.layout.ranks), "every"])
    attempt.fault = f"{number.name} {when} call {call} of {target} of rank {hit}"

    def prepare(rank: int) -> None:
        if hit in (rank, "every"):
            at_call(target, call, lambda: os.kill(os.getpid(), number), when=when, delay=delay)

    return prepare


def _at_random_time(attempt: Attempt, numbers: tuple[signal.Signals, ...]) -> Callable[[Ranks, float], None]:
    chance = attempt.chance
    at, number = attempt.random_time(), chance.choice(numbers)
    hit = list(range(attempt.layout.ranks)) if chance.random() < 0.5 else [chance.randrange(attempt.layout.ranks)]
    attempt.fault = f"{number.name} to ranks {hit} after {at:.3f} s"

    def send(ranks: Ranks, seconds: float) -> None:
        if hit and seconds > at:
            for rank in hit:
                ranks.signal(rank, number)
            hit.clear()

    return send
