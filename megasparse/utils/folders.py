"""A folder that appears whole or not at all.

with new_folder(Path("exported"), replace=False) as partial:
    (partial / "config.json").write_text(...)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Gives an empty folder beside `folder`, which takes its name at the end; on any error it is removed.

    replace: put it in the place of a folder that exists. Otherwise raises ValueError where there is one that
    holds something; `folder` is left as it was in either case until all is written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; must be a folder that is new or empty")
    if folder.is_dir() and any(folder.iterdir()) and not replace:
        raise ValueError(f"{folder}: holds something already; must be a folder that is new or empty")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    aside = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.is_dir():
            os.replace(folder, aside)
        try:
            os.replace(partial, folder)
        except OSError:
            if aside.is_dir():
                os.replace(aside, folder)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)
