"""Files of a stopped run that are damaged before it goes on: of checkpoints, of the run folder, lines of records."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from attempt import SILENT, Attempt
from tiny_run import SAVE_INTERVAL

STOPPED_AT = 6
PAGE = 4096

Damage = Callable[[Path, random.Random], str]
"""Damages a file and says how."""


def flip_byte(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at = chance.randrange(len(content))
    content[at] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return f"a bit of byte {at} of {len(content)} is flipped"


def zero_page(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    start = chance.randrange(-(-len(content) // PAGE)) * PAGE
    end = min(start + PAGE, len(content))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    return f"the page at byte {start} is zeroed"


def truncate(path: Path, chance: random.Random) -> str:
    content = path.read_bytes()
    size = chance.choice([0, chance.randrange(len(content))])
    path.write_bytes(content[:size])
    return f"cut off after {size} of {len(content)} bytes"


def remove(path: Path, chance: random.Random) -> str:
    path.unlink()
    return "removed"


def take_other_step(path: Path, chance: random.Random) -> str:
    """The file of the same name, or of the other rank, out of the other checkpoint, or that of the other rank."""
    others = [other for other in path.parents[1].glob("step-*/*") if other != path and other.suffix == path.suffix]
    other = chance.choice(sorted(others))
    path.write_bytes(other.read_bytes())
    return f"replaced by {other.parent.name}/{other.name}"


def in_checkpoints(damage: Damage) -> Callable[[Attempt], None]:
    """One file of the newest checkpoint is damaged, or one of each."""

    def kind(attempt: Attempt) -> None:
        attempt.begin_stopped(STOPPED_AT)
        folders = sorted((attempt.run / "checkpoints").glob("step-*"), reverse=True)
        every = attempt.chance.random() < 0.25
        told = []
        for folder in folders if every else folders[:1]:
            path = attempt.chance.choice(sorted(folder.iterdir()))
            told.append(f"{folder.name}/{path.name}: {damage(path, attempt.chance)}")
        attempt.fault = "; ".join(told)
        attempt.finish(damaged=True)

    return kind


def damaged_run_file(attempt: Attempt) -> None:
    """A file of the run folder that is no record: the next start writes it anew, or says that it cannot be read."""
    attempt.begin_stopped(STOPPED_AT)
    path = attempt.run / attempt.chance.choice(["config.yaml", "plan.json", "summary.json", "sample.txt"])
    damage = attempt.chance.choice([flip_byte, zero_page, truncate, remove])
    attempt.fault = f"{path.name}: {damage(path, attempt.chance)}"
    attempt.finish()


def damaged_lines(attempt: Attempt) -> None:
    """A line of metrics or of topology updates: kept or dropped, the user must hear of it."""
    attempt.begin_stopped(STOPPED_AT)
    path = attempt.run / attempt.chance.choice(["metrics.jsonl", "topology.jsonl"])
    damage = attempt.chance.choice([_spoil_byte, zero_page, truncate, _add_garbage, _join_lines])
    attempt.fault = f"{path.name}: {damage(path, attempt.chance)}"
    # What went wrong beside the lines counts as ever; the lines themselves may be gone where that was said.
    attempt.finish()
    if any(f"{path.name}" in line and "warning" in line.lower() for line in attempt.texts[-1].splitlines()):
        _forgive(attempt, path.name)


def stray_names(attempt: Attempt) -> None:
    """Things beside the checkpoints that are none."""
    attempt.begin_stopped(STOPPED_AT)
    folder = attempt.run / "checkpoints"
    number = attempt.chance.choice([8, STOPPED_AT - SAVE_INTERVAL - 2, 99999])
    make = attempt.chance.choice([_make_file, _make_link, _make_folder, _make_empty_checkpoint])
    attempt.fault = make(folder, number, attempt.chance)
    attempt.finish()


def _forgive(attempt: Attempt, name: str) -> None:
    """Differences of one file of records that was said to be damaged."""
    kept = []
    for outcome, reason in attempt.found:
        left = [part for part in reason.split("; ") if not part.startswith(name)] if outcome == SILENT else [reason]
        if left:
            kept.append((outcome, "; ".join(left)))
    attempt.found = kept


def _add_garbage(path: Path, chance: random.Random) -> str:
    garbage = chance.choice([b'{"step": ', b"\x00" * 64, b"\xff\xfe\n", b"[]\n", b'{"step": "six"}\n'])
    with path.open("ab") as file:
        file.write(garbage)
    return f"{garbage[:12]!r} at its end"


def _spoil_byte(path: Path, chance: random.Random) -> str:
    """So that the line is no UTF-8 any more: another digit would be a line like any other."""
    content = bytearray(path.read_bytes())
    at = chance.randrange(len(content))
    content[at] ^= 128
    path.write_bytes(content)
    return f"the highest bit of byte {at} of {len(content)} is flipped"


def _join_lines(path: Path, chance: random.Random) -> str:
    text = path.read_text()
    path.write_text(text.replace("\n", "", 1))
    return "its first two lines are one"


def _make_file(folder: Path, number: int, chance: random.Random) -> str:
    name = chance.choice([f"step-{number:08d}.tar", f"step-{number:08d}", "notes.txt"])
    (folder / name).write_bytes(b"stray")
    return f"a file {name}"


def _make_link(folder: Path, number: int, chance: random.Random) -> str:
    name = chance.choice([f"step-{number:08d}", f"partial-step-{number:08d}"])
    (folder / name).symlink_to(chance.choice([f"step-{STOPPED_AT:08d}", "nowhere"]))
    return f"a symbolic link {name}"


def _make_folder(folder: Path, number: int, chance: random.Random) -> str:
    name = chance.choice([f"step-{number:08d}-best", f"step-{number:08d}.bak", f"partial-step-{number:08d}"])
    (folder / name).mkdir()
    (folder / name / "kept.json").write_text(json.dumps({}))
    return f"a folder {name}"


def _make_empty_checkpoint(folder: Path, number: int, chance: random.Random) -> str:
    (folder / f"step-{number:08d}").mkdir()
    return f"an empty folder step-{number:08d}"
