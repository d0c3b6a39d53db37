"""The model's weights from a checkpoint folder, without an engine and without a process group.

    folder, manifest = find_checkpoint(Path("runs/quickstart-mst"), step=None)
    weights = load_model_weights(folder)        # float32, by the names of the model's state dict

For sampling, evaluation and conversion; a run that goes on reads its checkpoints through the engine instead.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.saved_state import TABLE, WEIGHT
from megasparse.checkpoint.store import CHECKPOINTS, PREFIX, CheckpointError, CheckpointStore, Manifest, read_manifest
from megasparse.checkpoint.universal import open_checkpoint


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
            raise CheckpointError(f"{run_folder} has no checkpoint of step {step}; must be {_steps(folder)}")
        return wanted, read_manifest(wanted)
    found = store.newest_good()
    if found is None:
        reasons = "; ".join(store.damaged())
        raise CheckpointError(f"{run_folder} has no good checkpoint{': ' + reasons if reasons else ''}")
    return found


def load_model_weights(folder: Path) -> dict[str, Tensor]:
    """Master weights of the checkpoint in `folder` on the CPU, whole, by state dict name; shared ones share memory.

    Weights of inactive units are 0. Raises CheckpointError for a folder that is no whole checkpoint or a file of
    another kind. Only tensors and plain data are read.
    """
    saved = open_checkpoint(folder)
    weights = {name: saved.tensor(name, WEIGHT) for name in saved.shapes}
    if isinstance(saved, CheckpointReader):
        aliases = saved.layout.aliases
    else:
        aliases = {"head.weight": TABLE} if saved.manifest.model.get("tie_embeddings") else {}
    return weights | {alias: weights[name] for alias, name in aliases.items()}


def _steps(folder: Path) -> str:
    """The steps that there are folders for, as text."""
    ends = sorted(path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*"))
    return ", ".join(str(int(end)) for end in ends if end.isdecimal()) or "none"
