"""A teacher whose hidden states lie on disk: written once (``write_states``), read instead of a forward pass.

    teacher = StoredTeacher(Path("states"), ranks, device, dtype)
    teacher.states(batch).outputs[3]

A folder holds

    states.json         what it is of: teacher, data, order, which states of it, how many samples
    keys.safetensors    a hash of the tokens (and documents) of each sample, uint8 [samples, 16]
    states.bin          the states, [samples, states, T, C] without gaps

so that a sample is found by what it holds: layout, accumulation and resumes play no part. A token takes C x states x 2
bytes in bfloat16, and 4 in float32.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megasparse.checkpoint.model_folder import CHECKSUMS, ModelFolder
from megasparse.checkpoint.store import CheckpointError
from megasparse.checkpoint.tensor_files import read_json
from megasparse.config.loader import ConfigError, check_values
from megasparse.config.schema import RunConfig
from megasparse.config.section import PositiveInt, Section
from megasparse.data import Batch
from megasparse.data.fingerprints import changes, run_fingerprint
from megasparse.data.vocabulary import file_sha256
from megasparse.objectives.distillation import TeacherStates
from megasparse.parallel import TensorParallel

DESCRIPTION, KEYS, STATES = "states.json", "keys.safetensors", "states.bin"
NORMED = "normed"
"""The state behind the last norm; others go by the number of their block."""
KEY_BYTES = 16
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class StatesDescription(Section):
    """What `states.json` says."""

    format: Literal[1] = 1
    teacher: str
    """SHA-256 of the checksums of its folder."""
    data: list[dict[str, Any]]
    """Fingerprints of the training data."""
    order: dict[str, Any]
    """Settings that decide which tokens a sample holds, and which sample comes when."""
    samples_read: PositiveInt
    """Global samples of the run, from the first, that are covered."""
    states: list[str]
    num_blocks: PositiveInt
    """Of the teacher."""
    dtype: Literal["bfloat16", "float32"]
    shape: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
    """Samples, states, tokens, hidden size."""


def needed_states(config: RunConfig, num_blocks: int) -> list[str]:
    """Names of the teacher's states that SquareHead compares, in the order of its blocks."""
    distillation = config.distillation
    pairs = distillation.layer_map or [(block, block) for block in range(num_blocks)]
    behind_norm = distillation.last_state == "post_norm"
    blocks = sorted({teacher for _, teacher in pairs})
    return [NORMED if behind_norm and block == num_blocks - 1 else str(block) for block in blocks]


def expected_description(config: RunConfig, folder: ModelFolder) -> dict[str, Any]:
    """Teacher, data and order of a run as a description has them."""
    sources = [source.weight for source in config.data.train or ()]
    order = {
        "run.seed": config.run.seed,
        "model.seq_length": config.model.seq_length,
        "data.train.weight": sources if len(sources) > 1 else None,
        "data.valid_fraction": config.data.valid_fraction if config.data.valid is None else None,
        "data.document_masking": config.data.document_masking,
        "data.reset_positions": config.data.document_masking and config.data.reset_positions,
    }
    data = run_fingerprint(config)["train"]
    return {"teacher": file_sha256(str(folder.folder / CHECKSUMS)), "data": data, "order": order}


def read_description(folder: Path) -> StatesDescription:
    """Raises ConfigError where there is none, or a file of another size than it says."""
    if not (folder / DESCRIPTION).is_file():
        raise ConfigError(
            f"distillation.states: {folder}: no {DESCRIPTION} there; must be unset, or a folder that "
            "tools/teacher_states.py has made"
        )
    try:
        found = check_values(StatesDescription, read_json(folder / DESCRIPTION))
    except ConfigError as error:
        raise CheckpointError(f"{folder / DESCRIPTION}: {error}") from None
    size, path = int(np.prod(found.shape)) * DTYPES[found.dtype].itemsize, folder / STATES
    if not path.is_file() or path.stat().st_size != size:
        raise CheckpointError(f"distillation.states: {path}: must be a file of {size:,} bytes, as {DESCRIPTION} says")
    return found


def check_states(config: RunConfig, teacher: ModelFolder) -> None:
    """Raise ConfigError where the states of `distillation.states` are not those that this run would compute."""
    path = Path(config.distillation.states or "")
    found, expected = read_description(path), expected_description(config, teacher)
    if found.teacher != expected["teacher"]:
        raise ConfigError(
            f"distillation.states: {path} is of another teacher than distillation.teacher {teacher.folder}; must be "
            "written with it"
        )
    for what in ("data", "order"):
        if changed := changes(getattr(found, what), expected[what], what):
            raise ConfigError(
                f"distillation.states: {path}: {'; '.join(changed)}; must be written with these settings, see "
                "tools/teacher_states.py"
            )
    needed = needed_states(config, teacher.config.model.num_layers)
    if missing := [name for name in needed if name not in found.states]:
        raise ConfigError(
            f"distillation.states: {path} has the states {', '.join(found.states)}, and {', '.join(missing)} are asked "
            "for by distillation.layer_map and last_state; must be among them"
        )
    samples = config.train.steps * config.train.global_batch_size
    if samples > found.samples_read:
        raise ConfigError(
            f"distillation.states: {path} covers {found.samples_read:,} samples, train.steps x train.global_batch_size "
            f"are {samples:,}; must be at most as many"
        )


def sample_keys(batch: Batch) -> list[bytes]:
    """A hash of what the teacher reads of each sample."""
    parts = [batch.inputs] if batch.documents is None else [batch.inputs, batch.documents]
    rows = [np.ascontiguousarray(part.cpu().numpy().astype("<i8")) for part in parts]
    return [
        hashlib.blake2b(b"".join(row[i].tobytes() for row in rows), digest_size=KEY_BYTES).digest()
        for i in range(len(batch.inputs))
    ]


class StoredTeacher:
    """A ``Teacher`` of hidden states only; ``check_states`` has looked at the folder before.

    ranks: under sequence parallelism each gets its share of the tokens. dtype: that of the student's states.
    """

    def __init__(self, folder: Path, ranks: TensorParallel, device: torch.device, dtype: torch.dtype) -> None:
        from safetensors.torch import load_file

        self.folder, self._ranks, self._device, self._dtype = folder, ranks, device, dtype
        self.description = read_description(folder)
        keys = load_file(folder / KEYS)["keys"].numpy()
        self._places = {key.tobytes(): place for place, key in enumerate(keys)}
        stored = np.uint16 if self.description.dtype == "bfloat16" else np.float32
        self._states = np.memmap(folder / STATES, stored, "r", shape=self.description.shape)

    def states(self, batch: Batch) -> TeacherStates:
        """States that are not stored are empty."""
        found = torch.stack([self._of_sample(key) for key in sample_keys(batch)], dim=1)
        if self._ranks.sequence_parallel:
            found = found.chunk(self._ranks.size, dim=2)[self._ranks.axis.rank]
        by_name = dict(zip(self.description.states, found.to(self._device, self._dtype), strict=True))
        nothing = found.new_empty(0)
        outputs = [by_name.get(str(block), nothing) for block in range(self.description.num_blocks)]
        return TeacherStates(outputs, by_name.get(NORMED, nothing))

    def logits(self, normed_BTC: Tensor) -> Any:
        raise AssertionError("distillation.logits_weight is 0 with stored states")

    def _of_sample(self, key: bytes) -> Tensor:
        """[states, T, C]."""
        place = self._places.get(key)
        if place is None:
            raise CheckpointError(f"distillation.states: {self.folder} does not have a sample of this run's data")
        values = torch.from_numpy(np.array(self._states[place]))
        return values.view(torch.bfloat16) if self.description.dtype == "bfloat16" else values
