"""Which tile a Triton kernel uses: measured winners, kept in a JSON file in the user's cache folder, or the defaults.

A training run only reads the file (``tile_for``): to tune inside a step would make the other ranks wait. ``tune``
measures the candidates for one layer on the device at hand and keeps the fastest of each product; a file lock lets
several processes do so at once. A file that cannot be read is ignored with a warning, and the next
``tune`` replaces it.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megasparse.kernels.block_sparse.build import cache_folder
from megasparse.kernels.block_sparse.tiles import Tile, candidates, default_tile, fits, fitted, power_of_two

FILE_NAME = "triton_tiles.json"
FORMAT = "megasparse-triton-tiles-1"
LOCK_SECONDS = 60


@dataclass(frozen=True)
class Problem:
    """What the best tile depends on."""

    kernel: str
    """A name from ``tiles``."""
    device: str
    """The device's name as torch gives it."""
    dtype: torch.dtype
    unit: int
    tokens: int
    groups: int
    """Block rows of the output: of y (R), of dx (C), of dW (R)."""
    num_live: int

    @property
    def live_per_group(self) -> float:
        return self.num_live / self.groups

    @property
    def key(self) -> str:
        """Sizes are rounded up to powers of two: neighbours share a tile."""
        dtype = str(self.dtype).removeprefix("torch.")
        tokens, groups, live = map(power_of_two, (self.tokens, self.groups, max(1, round(self.live_per_group))))
        return (
            f"{self.kernel} | {self.device} | {dtype} | unit {self.unit} | tokens {tokens} | {groups} x {live} blocks"
        )


def tile_for(problem: Problem) -> Tile:
    """The tuned tile, or the default one where none was tuned."""
    tile = _stored(_path()).get(problem.key)
    if tile is None or not fits(tile, problem.kernel, problem.unit):
        tile = default_tile(problem.kernel, problem.unit, problem.dtype, torch.version.hip is not None)
    return fitted(tile, problem.kernel, problem.unit, problem.tokens, problem.live_per_group)


def tune(
    problem: Problem, run: Callable[[Tile], Any], measure: Callable[[Callable[[], Any]], float], limit: int = 0
) -> tuple[Tile, float]:
    """Measure the candidates, keep the fastest in the file, and return it with its time.

    Args:
        problem: what is tuned for.
        run: runs the kernel with a tile.
        measure: time of one call of a function, in any unit.
        limit: measure only so many candidates; 0: all.
    """
    times: dict[Tile, float] = {}
    for tile in candidates(problem.kernel, problem.unit, problem.dtype, torch.version.hip is not None):
        tile = fitted(tile, problem.kernel, problem.unit, problem.tokens, problem.live_per_group)
        if tile in times or (limit and len(times) >= limit):
            continue
        try:
            times[tile] = measure(lambda tile=tile: run(tile))
        except Exception as error:
            # Triton's compiler refuses a tile that needs more shared memory or registers than the device has.
            if not _is_refusal(error):
                raise
    assert times, f"no candidate runs for {problem.key}"
    best = min(times, key=times.__getitem__)
    store(_path(), {problem.key: best})
    return best, times[best]


def store(path: Path, tiles: dict[str, Tile]) -> None:
    """Add tiles to the file, beside those that other processes added meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _lock(path.with_suffix(".lock")):
        together = {**load(path), **tiles}
        text = json.dumps({"format": FORMAT, "tiles": {key: asdict(tile) for key, tile in together.items()}}, indent=1)
        # Readers take no lock: they see the old file or the new one, never a part.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    _stored.cache_clear()


def load(path: Path) -> dict[str, Tile]:
    """The tiles of a file by problem; none, with a warning, where it is not a file of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return {key: Tile(**tile) for key, tile in content["tiles"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{path}: ignored, default tiles are used: {error}", stacklevel=2)
        return {}


def _path() -> Path:
    return cache_folder() / FILE_NAME


@cache
def _stored(path: Path) -> dict[str, Tile]:
    """Read once per process: what a run uses does not change under it."""
    return load(path)


def _is_refusal(error: Exception) -> bool:
    names: Iterable[str] = (kind.__name__ for kind in type(error).__mro__)
    return bool({"OutOfResources", "CompilationError", "PTXASError"} & set(names))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Exclusive among processes; the system frees it when its holder dies."""
    deadline = time.monotonic() + LOCK_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path}: held by another process for {LOCK_SECONDS} s") from None
                time.sleep(0.05)
        yield
