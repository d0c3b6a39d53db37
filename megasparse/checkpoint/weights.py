"""The model's weights from a checkpoint folder, without an engine and without a process group.

    folder, manifest = find_checkpoint(Path("runs/quickstart-mst"), step=None)
    weights = load_model_weights(folder)        # float32, by the names of the model's state dict

For sampling, evaluation and conversion; a run that goes on reads its checkpoints through the engine instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasparse.checkpoint.store import PREFIX, CheckpointError, CheckpointStore, Manifest, read_manifest
from megasparse.engine.safe_checkpoint import SafeCheckpointEngine

CHECKPOINTS = "checkpoints"
MODEL_STATES = "mp_rank_00_model_states.pt"


def find_checkpoint(run_folder: Path, step: int | None = None) -> tuple[Path, Manifest]:
    """The newest good checkpoint of a run, or that of `step`.

    Raises CheckpointError where there is none, or where the one that is asked for is missing or damaged.
    """
    folder = run_folder / CHECKPOINTS
    # Nothing is written here, so the number of kept checkpoints plays no part.
    store = CheckpointStore(folder, keep=1)
    if step is not None:
        wanted = folder / store.name(step)
        if not wanted.is_dir():
            raise CheckpointError(f"{run_folder} has no checkpoint of step {step}; legal values: {_steps(folder)}")
        return wanted, read_manifest(wanted)
    found = store.newest_good()
    if found is None:
        reasons = "; ".join(store.damaged())
        raise CheckpointError(f"{run_folder} has no good checkpoint{': ' + reasons if reasons else ''}")
    return found


def load_model_weights(folder: Path) -> dict[str, Tensor]:
    """Weights of the checkpoint in `folder` on the CPU, floating-point ones as float32, by state dict name.

    Weights of dead units are 0. Raises CheckpointError for a folder that is no whole checkpoint or a file of another
    kind. Only tensors and plain data are read.
    """
    read_manifest(folder)
    path = folder / MODEL_STATES
    try:
        content: Any = SafeCheckpointEngine(wrapped=None).load(str(path), map_location="cpu")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    module = content.get("module") if isinstance(content, dict) else None
    if not isinstance(module, dict) or not all(isinstance(value, Tensor) for value in module.values()):
        raise CheckpointError(f"{path}: holds no weights under the key `module`")
    return {name: value.to(torch.float32) if value.is_floating_point() else value for name, value in module.items()}


def _steps(folder: Path) -> str:
    """The steps that there are folders for, as text."""
    ends = sorted(path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*"))
    return ", ".join(str(int(end)) for end in ends if end.isdecimal()) or "none"
