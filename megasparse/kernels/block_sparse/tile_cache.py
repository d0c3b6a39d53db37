"""Which tile a Triton kernel uses: the winners of ``tuning``, kept in a JSON file in the cache folder, or defaults.

A training run only reads the file (``tile_for``): to tune inside a step would make the other ranks wait. A file that
cannot be read is ignored with a warning, and the next ``store`` replaces it. A file lock lets several processes store
at once.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from filelock import FileLock

from megasparse.kernels.block_sparse.tiles import Tile, default_tile, fits, fitted
from megasparse.kernels.common.build import cache_folder
from megasparse.kernels.common.tables import read_format
from megasparse.kernels.common.triton_device import power_of_two
from megasparse.utils.files import write_json

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
    block_size: int
    tokens: int
    groups: int
    """Block rows of the output: of y (R), of dx (C), of dW (R)."""
    num_active: int

    @property
    def active_per_group(self) -> float:
        return self.num_active / self.groups

    @property
    def key(self) -> str:
        """Sizes are rounded up to powers of two: neighbours share a tile."""
        dtype = str(self.dtype).removeprefix("torch.")
        tokens, groups, active = map(power_of_two, (self.tokens, self.groups, max(1, round(self.active_per_group))))
        blocks = f"{groups} x {active} blocks"
        return f"{self.kernel} | {self.device} | {dtype} | unit {self.block_size} | tokens {tokens} | {blocks}"


def tile_for(problem: Problem) -> Tile:
    """The tuned tile, or the default one where none was tuned. Asked for in every launch."""
    return _tile(problem, *map(os.environ.get, ("MEGASPARSE_CACHE", "XDG_CACHE_HOME", "HOME")))


@lru_cache(maxsize=4096)
def _tile(problem: Problem, *where: str | None) -> Tile:
    """where: what decides on the folder of the file."""
    tile = _stored(path()).get(problem.key)
    if tile is None or not fits(tile, problem.kernel, problem.block_size):
        tile = default_tile(problem.kernel, problem.block_size, problem.dtype, torch.version.hip is not None)
    return fitted(tile, problem.kernel, problem.block_size, problem.tokens, problem.active_per_group)


def store(tiles: dict[str, Tile]) -> None:
    """Add tiles, by the keys of their problems, to the file, beside those that other processes added meanwhile."""
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(target.with_suffix(".lock"), timeout=LOCK_SECONDS):
        together = {**load(target), **tiles}
        # Readers take no lock: they see the old file or the new one, never a part.
        write_json(target, {"format": FORMAT, "tiles": {key: asdict(tile) for key, tile in together.items()}})
    _stored.cache_clear()
    _tile.cache_clear()


def load(file: Path) -> dict[str, Tile]:
    """The tiles of a file by problem; none, with a warning, where it is not a file of ours."""
    try:
        return {key: Tile(**tile) for key, tile in read_format(file, FORMAT)["tiles"].items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        warnings.warn(f"{file}: ignored, default tiles are used: {error}", stacklevel=2)
        return {}


def path() -> Path:
    """Of the file."""
    return cache_folder() / FILE_NAME


@cache
def _stored(file: Path) -> dict[str, Tile]:
    """Read once per process: what a run uses does not change under it."""
    return load(file)
