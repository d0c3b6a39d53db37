"""Writes a saved state as a compact folder, one parameter in memory at a time.

manifest = pack(saved, config, Path("small"), weights_only=False)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from megasparse.checkpoint.compact.encoding import (
    active_values,
    common_fill,
    encode_places,
    smallest_form,
)
from megasparse.checkpoint.compact.manifest import (
    COMPANIONS,
    CONFIG,
    CompactManifest,
    Stored,
    tensor_file,
    write_manifest,
)
from megasparse.checkpoint.saved_state import (
    EVER,
    LIVE,
    WEIGHT,
    SavedState,
    SparseParameter,
    layers_of,
    sparse_parameters,
)
from megasparse.checkpoint.store import sha256
from megasparse.checkpoint.tensor_files import save_tensors
from megasparse.config.loader import save_config
from megasparse.config.schema import RunConfig
from megasparse.utils.folders import new_folder

INDEX, EVER_BITS = "index", "ever"


def pack(
    saved: SavedState,
    config: RunConfig,
    output: Path,
    *,
    weights_only: bool,
    form: str | None = None,
    companions: Mapping[str, Path] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> CompactManifest:
    """Write `saved` into the new folder `output`.

    form: how every mask is stored, `bits` or `list`; None: the smaller of the two, layer by layer.
    companions: further files, such as the tokenizer's, by the names that they get.
    Raises CheckpointError, and leaves nothing, where `output` is there already or the state is damaged.
    """
    topology = saved.topology()
    sparse = sparse_parameters(config, saved.shapes, layers_of(topology))
    with new_folder(output) as folder:
        (folder / "tensors").mkdir()
        save_config(config, folder / CONFIG)
        for name, path in (companions or {}).items():
            (folder / COMPANIONS).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / COMPANIONS / name)
        parameters, done = {}, 0
        for name, shape in saved.shapes.items():
            writer = _ParameterWriter(saved, name, [WEIGHT] if weights_only else saved.kinds(name))
            if name in sparse:
                layer = sparse[name].layer
                ever = None if weights_only else topology[f"{EVER}{layer}"]
                parameters[name] = writer.write_sparse(folder, sparse[name], topology[f"{LIVE}{layer}"], ever, form)
            else:
                parameters[name] = writer.write_whole(folder)
            done += 4 * prod(shape)
            progress(done)
        manifest = _describe(saved, parameters, folder, weights_only)
        write_manifest(manifest, folder)
    return manifest


class _ParameterWriter:
    """Writes the file of one parameter."""

    def __init__(self, saved: SavedState, name: str, kinds: list[str]) -> None:
        self.saved, self.name, self.kinds = saved, name, kinds

    def write_whole(self, folder: Path) -> Stored:
        tensors = {kind: self.saved.tensor(self.name, kind) for kind in self.kinds}
        self._save(folder, tensors)
        kinds = {kind: _kind(tensor, None) for kind, tensor in tensors.items()}
        return Stored(list(self.saved.shapes[self.name]), kinds)

    def write_sparse(
        self, folder: Path, sparse: SparseParameter, active: Tensor, ever: Tensor | None, form: str | None
    ) -> Stored:
        """active, ever: packed bits of the units that are active and that have ever been."""
        mask = sparse.mask(active)
        num_active = int(mask.count_nonzero())
        form = form or smallest_form(sparse.num_units, num_active)
        tensors = {INDEX: encode_places(mask, form)}
        if ever is not None:
            tensors[EVER_BITS] = ever
        kinds = {}
        for kind in self.kinds:
            matrix = self.saved.tensor(self.name, kind)
            fill = common_fill(matrix, mask, sparse.block_size)
            # Never a silent prune: where inactive entries are not alike, all entries are kept.
            kinds[kind] = _kind(matrix, fill)
            tensors[kind] = matrix if fill is None else active_values(matrix, mask, sparse.block_size)
            del matrix
        self._save(folder, tensors)
        shape = list(sparse.shape)
        return Stored(shape, kinds, sparse.layer, sparse.block_size, form, num_active)

    def _save(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        # Mapped tensors may share one storage, which safetensors refuses: take what is asked for, and no more.
        save_tensors({key: _own(tensor) for key, tensor in tensors.items()}, folder / tensor_file(self.name))


def _kind(tensor: Tensor, fill: int | None) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "fill": fill}


def _own(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _describe(saved: SavedState, parameters: dict[str, Stored], folder: Path, weights_only: bool) -> CompactManifest:
    facts = saved.facts
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return CompactManifest(
        step=facts.step,
        optimizer_step=0 if weights_only else saved.step,
        weights_only=weights_only,
        model=facts.model,
        train_state=facts.train_state,
        window_losses=[] if weights_only else facts.window_losses,
        loss_scaler={} if weights_only else dict(saved.loss_scaler()),
        parameters=parameters,
        files={str(path.relative_to(folder)): (path.stat().st_size, sha256(path)) for path in paths},
    )
