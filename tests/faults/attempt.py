"""One try: starts of the run with a fault in one of them, and what came of it.

    attempt = Attempt(laboratory, "kill in a save", number=17, seed=0)
    attempt.start(prepare=plant_something)          # a start with the fault
    attempt.finish()                                # a start without, compared with the undisturbed run
    print(attempt.verdict())

A try is fully determined by kind, number and seed: `attempt.chance` draws all that is left to chance.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from comparison import differences, newest_step
from forked_ranks import Ended, Ranks
from planted import wrap
from tiny_run import LAYOUTS, LIMIT_SECONDS, Laboratory, Layout, start

SURVIVED, REFUSED, SILENT, HUNG, TRACEBACK, LOST = "survived", "refused", "silent", "hung", "traceback", "lost"
BAD = (SILENT, HUNG, TRACEBACK, LOST)
TAIL_CHARACTERS = 1500
"""Of what a bad try wrote, in its report."""

LOST_PEER_STATUS = 3
SENTENCE_STATUSES = (2, LOST_PEER_STATUS, 4)
"""Exit statuses that come with a sentence: something to mend, a lost peer, unequal masks."""
BY_FAULT = (
    *(-number for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)),
    128 + signal.SIGINT,
)
GOES_ON = re.compile(r"going on from step ([\d,]+)")


@dataclass
class Verdict:
    """What came of a try."""

    outcome: str
    reasons: list[str]
    fault: str
    """What was done, in words."""

    @property
    def is_bad(self) -> bool:
        return self.outcome in BAD


@dataclass
class Attempt:
    """See the head of this file. without_checksums: the product trusts what checkpoints hold, which must be found."""

    laboratory: Laboratory
    kind: str
    number: int
    seed: int = 0
    without_checksums: bool = False
    fault: str = ""
    found: list[tuple[str, str]] = field(default_factory=list)
    """Outcomes and their reasons, one or more for each start."""
    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(f"{self.seed}/{self.kind}/{self.number}")
        self.layout: Layout = LAYOUTS[self.number % len(LAYOUTS)]
        self.folder = self.laboratory.folder / "tries" / f"{self.kind.replace(' ', '-')}-{self.number}"
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "runs" / "run"

    @property
    def golden(self) -> Path:
        return self.laboratory.golden(self.layout)

    def random_time(self, first: float = 0.0) -> float:
        """Seconds after a start, up to the end of an undisturbed run; first: the part of it that is left out."""
        assert self.golden
        return self.chance.uniform(first, 1.1) * self.laboratory.start_seconds

    def begin_new(self) -> None:
        """A working folder without a run."""
        self.laboratory.new_folder(self.folder)

    def begin_stopped(self, step: int) -> None:
        """A working folder with the run, stopped after `step`."""
        shutil.copytree(self.laboratory.stopped(self.layout, step), self.folder)

    def begin_anywhere(self) -> None:
        """A working folder without a run, or with one that was stopped after 6 steps."""
        if self.chance.random() < 0.5:
            self.begin_new()
        else:
            self.begin_stopped(6)

    def launch(self, *overrides: str, **options) -> Ranks:
        """Start the run; ``judge`` takes how it ended."""
        if self.without_checksums:
            options["prepare"] = lambda rank: wrap("megasparse.checkpoint.rank_file:RankFile._fail", _say_nothing)
        return start(self.layout, self.folder, *overrides, name=f"output{len(self.texts)}", **options)

    def launch_beside(self) -> Ranks:
        """Start the run a second time, while it is running."""
        return start(self.layout, self.folder, name=f"beside{len(self.texts)}")

    def start(
        self,
        *overrides: str,
        meanwhile: Callable[[Ranks, float], None] = lambda ranks, seconds: None,
        deaths: bool = False,
        **options,
    ) -> Ended:
        """Start the run and wait for its end. deaths: ranks may die, for that is the fault."""
        ranks = self.launch(*overrides, **options)
        try:
            ended = ranks.wait(LIMIT_SECONDS, lambda seconds: meanwhile(ranks, seconds))
        finally:
            ranks.end()
        self.judge(ended, deaths=deaths)
        return ended

    def finish(self, *overrides: str, damaged: bool = False, **options) -> Ended:
        """Start without a fault, to the end, and compare. damaged: checkpoints are, so that older ones may be taken."""
        newest = newest_step(self.run)
        ended = self.start(*overrides, **options)
        self.compare(ended, newest=0 if damaged else newest)
        return ended

    def compare(self, ended: Ended, *, newest: int = 0) -> None:
        """Of a start that should have come to the end: its result is that of the undisturbed run, or it was refused."""
        if any(ended.statuses):
            return
        resumed = GOES_ON.search(ended.text)
        step = int(resumed[1].replace(",", "")) if resumed else 0
        if step < newest:
            self.found.append((LOST, f"went on from step {step} although {newest} was committed"))
        if odd := differences(self.run, self.golden):
            self.found.append((SILENT, "; ".join(odd[:5])))

    def judge(self, ended: Ended, *, deaths: bool = False) -> None:
        """What the way in which ranks ended says."""
        self.texts.append(ended.text)
        if ended.hung:
            self.found.append((HUNG, f"ranks or what they started were running after {ended.seconds:.0f} s"))
            return
        if "Traceback (most recent call last)" in ended.text or "terminate called" in ended.text:
            self.found.append((TRACEBACK, _last_line_of_traceback(ended.text)))
        # What all ranks find alike is said by the first one alone.
        sentence = re.search("^error.*", ended.text, re.MULTILINE)
        for rank, status in enumerate(ended.statuses):
            is_of_fault = deaths or rank in ended.killed
            if status in SENTENCE_STATUSES and sentence:
                # That a peer was lost is no refusal where the fault was its death.
                if status != LOST_PEER_STATUS or not (deaths or ended.killed):
                    self.found.append((REFUSED, sentence[0]))
            elif status and not (status in BY_FAULT and is_of_fault):
                self.found.append((TRACEBACK, f"rank {rank} ended with status {status} and no sentence"))

    def verdict(self) -> Verdict:
        """The worst of what was found."""
        order = (HUNG, TRACEBACK, LOST, SILENT, REFUSED)
        outcome = next((one for one in order if any(one == found for found, _ in self.found)), SURVIVED)
        return Verdict(outcome, [reason for found, reason in self.found if found == outcome], self.fault)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _say_nothing(*_: object) -> None: ...


def _last_line_of_traceback(text: str) -> str:
    after = text.partition("Traceback (most recent call last)")[2] or text.partition("terminate called")[2]
    return next((line for line in after.splitlines()[1:] if line[:1].strip()), "terminate called")
