"""The model's weights from a checkpoint folder, without an engine and without a process group.

    folder, manifest = find_checkpoint(Path("runs/quickstart-mst"), step=None)
    weights = load_model_weights(folder)        # float32, by the names of the model's state dict

For sampling, evaluation and conversion; a run that goes on reads its checkpoints through the engine instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megasparse.checkpoint.index import Index, read_index
from megasparse.checkpoint.reader import Checkpoint, damage
from megasparse.checkpoint.saved_state import WEIGHT
from megasparse.checkpoint.store import CHECKPOINTS, PREFIX, CheckpointError, CheckpointStore
from megasparse.config.stages import LAYER, layer_number


def find_checkpoint(run_folder: Path, step: int | None = None) -> tuple[Path, Index]:
    """The newest good checkpoint of a run, or that of `step`.

    Raises CheckpointError where there is none, or where the one that is asked for is missing or damaged.
    """
    store = _store(run_folder)
    if step is not None:
        wanted = store.folder / store.name(step)
        if not wanted.is_dir():
            steps = ", ".join(str(int(folder.name.removeprefix(PREFIX))) for folder in reversed(store.folders()))
            raise CheckpointError(f"{run_folder} has no checkpoint of step {step}; must be {steps or 'none'}")
        return wanted, read_index(wanted)
    reasons = []
    for folder in store.folders():
        reason = damage(folder)
        if reason is None:
            return folder, read_index(folder)
        reasons.append(reason)
    raise CheckpointError(f"{run_folder} has no good checkpoint{': ' if reasons else ''}{'; '.join(reasons)}")


def passed_over(run_folder: Path) -> list[str]:
    """Why each folder newer than the newest good checkpoint is none."""
    reasons: list[str] = []
    for folder in _store(run_folder).folders():
        reason = damage(folder)
        if reason is None:
            break
        reasons.append(reason)
    return reasons


def _store(run_folder: Path) -> CheckpointStore:
    # Nothing is written here, so the number of kept checkpoints plays no part.
    return CheckpointStore(run_folder / CHECKPOINTS, keep=1)


def load_model_weights(folder: Path) -> dict[str, Tensor]:
    """Master weights of the checkpoint in `folder` on the CPU, whole, by state dict name; shared ones share memory.

    Weights of inactive units are 0, and a tied layer has those of the layer that computes it. Raises CheckpointError
    for a folder that is no whole checkpoint, or was changed.
    """
    with Checkpoint(folder) as saved:
        sources = layer_sources(saved)
        weights = {name: saved.tensor(computing_name(name, sources), WEIGHT) for name in saved.shapes}
        return weights | {alias: weights[name] for alias, name in saved.index.aliases.items()}


def layer_sources(saved: Checkpoint) -> list[int] | None:
    """For each layer the one whose weights it has (section `layer_tying`); None: its own."""
    sources = saved.method_state("layer_tying").get("sources")
    return None if sources is None else sources.tolist()


def computing_name(name: str, sources: Sequence[int] | None) -> str:
    """The name of the parameter that the parameter of a layer is read from."""
    number = layer_number(name)
    return name if sources is None or number is None else LAYER.sub(f"layers.{sources[number]}.", name)
