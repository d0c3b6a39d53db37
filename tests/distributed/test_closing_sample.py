"""The text that a run leaves at its end is the same however it came there, in one go or resumed at the very end."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from extensions_setup import SETTINGS, write_corpus
from harness import run_distributed

from megasparse.config.loader import load_config
from megasparse.launching import LaunchEnvironment
from megasparse.methods.callback import Callback, Step
from megasparse.training.run import pretrain

WORDS = [
    *SETTINGS,
    "model.vocab_size=320",
    "data.tokenizer=bytes",
    "train.sample_tokens=60",
    "attention.stride=4",
]


class Terminate(Callback):
    """SIGTERM in the last step."""

    def begin_step(self, step: Step) -> None:
        if step.number == 12:
            os.kill(os.getpid(), signal.SIGTERM)


def samples(words: Sequence[str], folder: Path) -> dict[str, tuple[str, bool]]:
    """Text, and whether the run counts as finished."""
    found = {}

    def train(title: str, name: str, *more: str, callbacks: Sequence[Callback] = ()) -> None:
        environment = LaunchEnvironment.from_variables(os.environ)
        (folder / name / "sample.txt").unlink(missing_ok=True)
        summary = pretrain(load_config([], [*words, f"run.name={name}", *more]), environment, callbacks=callbacks)
        found[title] = ((folder / name / "sample.txt").read_text(), summary["finished"])

    train("in one go", "straight")
    train("gone on with at the end", "straight", "train.resume=auto")
    train("terminated in the last step", "terminated", callbacks=[Terminate()])
    train("gone on with after that", "terminated", "train.resume=auto")
    train("full attention", "full", "attention.phases={}")
    return found


def test_a_run_that_is_gone_on_with_at_its_end_leaves_the_same_sample(tmp_path: Path) -> None:
    found = run_distributed(samples, 1, [*WORDS, *write_corpus(tmp_path)], tmp_path, with_mesh=False)[0]
    other, _ = found.pop("full attention")
    assert all(sample == found["in one go"] for sample in found.values()), found
    assert found["in one go"][1] and other != found["in one go"][0], "patterns make no difference here"
