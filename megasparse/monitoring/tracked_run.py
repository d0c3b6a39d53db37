"""What trackers are told about a run: names, parameters, the curve so far, and which run of theirs it goes on with.

run = TrackedRun(folder, resume_step=600, parameters=sections)
for step, values in run.history(): ...
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megasparse.utils.files import write_json
from megasparse.utils.json_lines import read_json_lines


@dataclass(frozen=True)
class StoredRun:
    """A run of a tracker that has runs of its own: its identifier, and where that holds (server, project)."""

    identifier: str
    place: str
    superseded: bool = False
    """It holds steps that the run has gone back behind, or lacks some."""

    def goes_on(self, place: str) -> bool:
        return self.place == place and not self.superseded


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about the run. resume_step: finished steps of the checkpoint that it goes on from."""

    folder: Path
    resume_step: int
    parameters: Mapping[str, Any]
    """Sections of the resolved configuration, and `plan`."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def project(self) -> str:
        return self.folder.absolute().parent.name or "megasparse"

    def last_step(self) -> int:
        """Finished steps of the last line of metrics; 0: there is none."""
        return max((step for step, _ in self._lines()), default=0)

    def history(self) -> Iterator[tuple[int, dict[str, float]]]:
        """The scalars that were logged up to the checkpoint, by rising step."""
        return ((step, scalars_of(values)) for step, values in self._lines() if step <= self.resume_step)

    def stored(self, tracker: str) -> StoredRun | None:
        """None: there is none, or its file was damaged; the tracker then begins with the whole curve."""
        try:
            return StoredRun(**json.loads(self._identifier_file(tracker).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def store(self, tracker: str, stored: StoredRun) -> None:
        write_json(self._identifier_file(tracker), asdict(stored), make_folder=False)

    def _identifier_file(self, tracker: str) -> Path:
        return self.folder / f"{tracker}_run.json"

    def _lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        path = self.folder / "metrics.jsonl"
        for line in read_json_lines(path)[0] if path.is_file() else ():
            yield line.values["step"], line.values


def scalars_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics."""
    return {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
