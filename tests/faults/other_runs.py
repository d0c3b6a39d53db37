"""What does not belong together: ranks with other settings, other data after a stop, two runs in one folder."""

from __future__ import annotations

import random
import re

from attempt import REFUSED, SILENT, Attempt
from comparison import read_lines
from forked_ranks import Ranks
from planted import wrap
from tiny_run import LIMIT_SECONDS

OTHER_SETTINGS = [
    "optimizer.lr=4e-3",
    "optimizer.beta1=0.8",
    "optimizer.epsilon=1e-6",
    "optimizer.weight_decay=0.2",
    "train.global_batch_size=16",
    "train.micro_batch_size=1",
    "train.steps=14",
    "train.log_interval=2",
    "attention.stride=4",
    "sparsity.density=0.3",
    "sparsity.update_fraction=0.2",
    "run.seed=7",
    "data.train=[{path: data/other}]",
]


def ranks_that_differ(attempt: Attempt) -> None:
    """One rank has another setting, or other data: refused before the first step."""
    attempt.begin_anywhere()
    setting = attempt.chance.choice(OTHER_SETTINGS)
    for path in (attempt.folder / "data").glob("corpus*"):
        content = bytearray(path.read_bytes())
        if path.suffix == ".bin":
            _swap_tokens(content, attempt.chance)
        path.with_name(path.name.replace("corpus", "other")).write_bytes(content)
    rank = attempt.chance.randrange(attempt.layout.ranks)
    attempt.fault = f"rank {rank} has {setting}"
    ended = attempt.start(of_rank={rank: [setting]})
    if any(ended.statuses) and attempt.layout.ranks > 1:
        attempt.finish()
    elif attempt.layout.ranks > 1:
        attempt.compare(ended)


def other_code(attempt: Attempt) -> None:
    """One rank runs another version of the code: refused before the first step."""
    attempt.begin_anywhere()
    rank, number = attempt.chance.randrange(attempt.layout.ranks), attempt.chance.randrange(10**6)
    attempt.fault = f"a source of rank {rank} is another one"

    def prepare(own: int) -> None:
        if own == rank:
            wrap("megasparse.launching.identity:_code", lambda original: changed(original(), number))

    def changed(digests: dict[str, str], number: int) -> dict[str, str]:
        name = sorted(digests)[number % len(digests)]
        return digests | {name: digests[name][::-1]}

    ended = attempt.start(prepare=prepare)
    if any(ended.statuses) and attempt.layout.ranks > 1:
        attempt.finish()
    elif attempt.layout.ranks > 1:
        attempt.found.append((SILENT, "ranks of different code have trained together"))


def data_replaced(attempt: Attempt) -> None:
    """The tokens change between a stop and the next start, at the same size: refused, or told."""
    attempt.begin_stopped(6)
    path = attempt.folder / "data" / "corpus.bin"
    content = bytearray(path.read_bytes())
    _swap_tokens(content, attempt.chance)
    path.write_bytes(content)
    attempt.fault = "two thousand pairs of tokens have changed places"
    ended = attempt.start()
    if not any(ended.statuses):
        if re.search(r"warning.*\b(data|corpus)\b.*", ended.text):
            attempt.found.append((REFUSED, "told that the data changed"))
        else:
            attempt.compare(ended)


def two_runs(attempt: Attempt) -> None:
    """A second start while the first one trains: it is refused, and the first one does not notice."""
    attempt.begin_anywhere()
    at = attempt.random_time()
    attempt.fault = f"a second start after {at:.2f} s"
    second: list[Ranks] = []

    def start_second(seconds: float) -> None:
        if not second and seconds > at:
            second.append(attempt.launch_beside())

    first = attempt.launch()
    try:
        ended = first.wait(LIMIT_SECONDS, start_second)
        others = [ranks.wait(LIMIT_SECONDS) for ranks in second]
    finally:
        for ranks in (first, *second):
            ranks.end()
    attempt.judge(ended)
    for other in others:
        attempt.judge(other)
    attempt.compare(ended)
    if any(status for one in (ended, *others) for status in one.statuses):
        attempt.finish()
    elif any(line["step"] is None for line in read_lines(attempt.run / "metrics.jsonl")):
        attempt.found.append((SILENT, "mixed lines"))


def _swap_tokens(content: bytearray, chance: random.Random) -> None:
    for _ in range(2000):
        first, second = (2 * chance.randrange(len(content) // 2) for _ in range(2))
        pairs = content[first : first + 2], content[second : second + 2]
        content[second : second + 2], content[first : first + 2] = pairs
