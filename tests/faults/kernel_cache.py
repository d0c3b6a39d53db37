"""A damaged cache of compiled kernels: built anew, or refused where that fails; never loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from attempt import SILENT, Attempt
from comparison import differences
from files import Damage, flip_byte, remove, truncate, zero_page
from planted import wrap

from megasparse.kernels.common.build import BuildError, cache_folder

KERNELS = ["kernels.block_sparse=cpu", "kernels.hybrid_attention=cpu", "sparsity.block_size=16"]
DAMAGES: list[Damage] = [flip_byte, zero_page, truncate, remove]

COMPILED_SHARE = 0.1
"""Tries that may compile, which takes half a minute of a core; of the others the compiler fails."""


def damaged_cache(attempt: Attempt) -> None:
    """Libraries or their checksums are damaged between two runs that must be equal."""
    chance = attempt.chance
    attempt.begin_new()
    cache, common = attempt.folder / "cache", attempt.laboratory.folder / "cache"
    if not common.exists() and cache_folder().is_dir():
        shutil.copytree(cache_folder(), common, ignore=shutil.ignore_patterns("*.lock"))
        common.chmod(0o700)
    attempt.start(*KERNELS, prepare=_uses(common))
    once = attempt.run.with_name("once")
    attempt.run.rename(once)
    shutil.copytree(common, cache)
    paths = sorted(path for path in cache.iterdir() if path.suffix in (".so", ".sha256"))
    chosen = paths if chance.random() < 0.5 else [chance.choice(paths)]
    done = [f"{path.name}: {chance.choice(DAMAGES)(path, chance)}" for path in chosen]
    compiles = chance.random() < COMPILED_SHARE
    attempt.fault = f"{'; '.join(done)}; the compiler {'works' if compiles else 'fails'}"
    ended = attempt.start(*KERNELS, prepare=_uses(cache, compiles=compiles))
    if not any(ended.statuses) and (odd := differences(attempt.run, once)):
        attempt.found.append((SILENT, "; ".join(odd)))


def _uses(cache: Path, *, compiles: bool = True) -> Callable[[int], None]:
    def fail(original: Callable[..., None], command: list[str]) -> None:
        raise BuildError(f"{command[0]}: no space left on device")

    def prepare(rank: int) -> None:
        os.environ["MEGASPARSE_CACHE"] = str(cache)
        if not compiles:
            wrap("megasparse.kernels.common.build:_run", fail)

    return prepare
