"""Weights to convert, whatever they lie in: names, shapes and one tensor at a time, in the form of a model folder.

    source = open_source(Path("runs/x"), step=None)         # a run, or a model folder
    source.config, source.facts, source.names, source.tensor(name)

Whole tensors, the vocabulary not padded, a tied head stored once.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from megasparse.checkpoint.model_folder import (
    TOPOLOGY,
    VOCABULARY_TENSORS,
    ModelFolder,
    ModelFolderWriter,
    is_model_folder,
    load_topology,
    model_tensors,
    tokenizer_files,
)
from megasparse.checkpoint.store import CheckpointError
from megasparse.checkpoint.tensor_files import TensorFiles
from megasparse.config.layer_tying import LayerTyingConfig
from megasparse.config.loader import ConfigError, load_config
from megasparse.config.schema import RunConfig
from megasparse.config.stages import stage_of, without_stacking
from megasparse.config.tensor_train import without_tensor_train
from megasparse.data.build import open_tokenizer
from megasparse.data.facts import EndOfDocument
from megasparse.data.record import recorded_end
from megasparse.data.tokenizer import Tokenizer
from megasparse.layers.tensor_train import assembled, matrix_names

PICKLED = "pytorch_model.bin"
TOKENIZER_NAMES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}


class Tensors(Protocol):
    """Tensors by name, read when they are asked for."""

    @property
    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def tensor(self, name: str) -> Tensor: ...


class Source(Tensors, Protocol):
    """What a model folder and a run have in common."""

    config: RunConfig
    facts: dict[str, Any]
    files: dict[str, Path]
    """Of the tokenizer and of generation, by the names that they have in a model folder."""

    def topology(self) -> dict[str, Tensor]: ...


def open_source(folder: Path, step: int | None = None) -> Source:
    """A model folder, or the newest good checkpoint of a run, or that of `step`. Raises ValueError where it is none."""
    if is_model_folder(folder):
        if step is not None:
            raise ConfigError(f"--step: {step}; must be unset: {folder} is a model folder")
        return FolderSource(folder)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: must be a run folder or a model folder, which hold a config.yaml")
    return RunSource(folder, step)


class FolderSource(ModelFolder):
    """A model folder with the files that go along."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.files = tokenizer_files(folder)


class _MasterWeights(ABC):
    """Float32 weights of a model with a configuration, from where the vocabulary may be padded and matrices may be
    tensor trains: `config` is that of the model with the matrices themselves."""

    def __init__(self, where: Path, config: RunConfig, found: Iterable[str], end: EndOfDocument | None = None) -> None:
        self._where, self._train = where, config.tensor_train
        self.config = without_tensor_train(complete_config(config, end))
        self._expected, self._parameters = model_tensors(self.config), matrix_names(found)
        odd = sorted(set(self._expected) ^ set(self._parameters))
        if odd:
            raise CheckpointError(f"{where}: parameters and configuration differ at {', '.join(odd[:4])}")

    @property
    def names(self) -> list[str]:
        return list(self._expected)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._expected[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def tensor(self, name: str) -> Tensor:
        shape, parameters = self.shape(name), [self._read(parameter) for parameter in self._parameters[name]]
        is_matrix = self._parameters[name] == [name]
        whole = parameters[0] if is_matrix else assembled(parameters, self._expected[name], self._train)
        if name in VOCABULARY_TENSORS:
            whole = whole[: shape[0]]
        if tuple(whole.shape) != shape:
            raise CheckpointError(
                f"{self._where}: {name} has shape {list(whole.shape)}, the configuration asks for {list(shape)}"
            )
        return whole

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """The parameter as it lies there, its vocabulary padded or not."""


class RunSource(_MasterWeights):
    """A checkpoint of a run, whatever its layout."""

    def __init__(self, run_folder: Path, step: int | None = None) -> None:
        # Imports DeepSpeed, which takes seconds.
        from megasparse.checkpoint.reader import Checkpoint
        from megasparse.checkpoint.weights import find_checkpoint, layer_sources

        self.folder, index = find_checkpoint(run_folder, step)
        self._checkpoint = Checkpoint(self.folder)
        self._sources = layer_sources(self._checkpoint)
        config = stage_of(load_config([run_folder / "config.yaml"]), index.model)
        end = recorded_end(run_folder)
        super().__init__(self.folder, config, self._checkpoint.shapes, end)
        self.facts = _facts(run_folder, self.config, index.step)
        if end is not None:
            self.facts["end_of_document"] = asdict(end)
        kind, path = self.config.data.tokenizer, self.config.data.tokenizer_path
        self.files = {TOKENIZER_NAMES[kind]: Path(path)} if path and kind in TOKENIZER_NAMES else {}
        for file in self.files.values():
            if not file.is_file():
                raise ConfigError(f"data.tokenizer_path: {file}: no such file, seen from this folder")

    def topology(self) -> dict[str, Tensor]:
        return self._checkpoint.topology()

    def _read(self, name: str) -> Tensor:
        from megasparse.checkpoint.weights import computing_name

        return self._checkpoint.tensor(computing_name(name, self._sources), "fp32")


@dataclass(frozen=True)
class TorchSource:
    """Tensors of one ``.pt`` file, mapped, by name; only tensors and plain data are read from it."""

    path: Path
    tensors: Mapping[str, Tensor]

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]


class UniversalSource(_MasterWeights):
    """A folder of DeepSpeed's universal form, `zero/<parameter>/fp32.pt`, of a model with this configuration."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self._folder = folder / "zero"
        if not self._folder.is_dir():
            raise CheckpointError(f"{folder}: has no folder zero; must be a universal checkpoint of DeepSpeed")
        super().__init__(self._folder, config, [path.name for path in self._folder.iterdir() if path.is_dir()])
        self.facts: dict[str, Any] = {}
        self.files: dict[str, Path] = {}

    def topology(self) -> dict[str, Tensor]:
        path = self._folder.parent / TOPOLOGY
        return load_topology(path) if path.is_file() else {}

    def _read(self, name: str) -> Tensor:
        # Imports DeepSpeed, for the record of how fused parts are divided.
        from deepspeed.checkpoint.universal_checkpoint import SubparamShape

        path = self._folder / name / "fp32.pt"
        try:
            with torch.serialization.safe_globals([SubparamShape]):
                content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if isinstance(error, OSError) else "it holds more than data"
            raise CheckpointError(f"{path}: not readable: {reason}") from None
        whole = content.get("param") if isinstance(content, dict) else None
        if not isinstance(whole, Tensor):
            raise CheckpointError(f"{path}: holds no tensor `param`")
        return whole


class Weights(Protocol):
    """What a model folder is written from."""

    def dtype(self, name: str) -> torch.dtype: ...
    def tensor(self, name: str) -> Tensor: ...


def write_weights(
    weights: Weights,
    config: RunConfig,
    output: Path,
    *,
    facts: Mapping[str, Any],
    files: Mapping[str, Path],
    texts: Mapping[str, str] = MappingProxyType({}),
    topology: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda done: None,
    **options: Any,
) -> None:
    """Write a model folder, one tensor in memory at a time; nothing is left of it after an error.

    files, texts: what lies beside the weights, by name. topology: packed bits. dtype: None keeps
    the dtypes. progress: called with the weights done, 4 bytes each. options: of ``ModelFolderWriter``.
    """
    dtypes, done = {name: dtype or weights.dtype(name) for name in model_tensors(config)}, 0
    with ModelFolderWriter(output, config, dtypes, facts=facts, **options) as writer:
        for name in writer.names:
            tensor = weights.tensor(name)
            writer.write(name, tensor)
            done += 4 * tensor.numel()
            progress(done)
        for name, path in files.items():
            writer.copy(name, path)
        for name, text in texts.items():
            writer.write_text(name, text)
        if topology:
            writer.topology(topology)


def write_source(source: Source, output: Path, **options: Any) -> None:
    """Write a model folder. options: `dtype`, and those of ``ModelFolderWriter``."""
    config, topology = portable_config(source.config, source.files), source.topology()
    write_weights(source, config, output, facts=source.facts, files=source.files, topology=topology, **options)


def open_weights(folder: Path) -> Tensors:
    """The weights of a folder of transformers: safetensors, or else a single file of torch."""
    pickled = folder / PICKLED
    if any(folder.glob("*.safetensors*")) or not pickled.is_file():
        return TensorFiles(folder)
    content = open_torch_file(pickled)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{pickled}: holds something else than tensors by name")
    return TorchSource(pickled, content)


def open_torch_file(path: Path) -> Any:
    """Content of a ``.pt`` file, its tensors mapped. Raises CheckpointError for one that holds anything but data."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: not a readable file of tensors and plain data: {reason}") from None


def complete_config(config: RunConfig, end: EndOfDocument | None = None) -> RunConfig:
    """With `model.vocab_size` from the tokenizer where it is unset. end: of its documents, where that is recorded."""
    if config.model.vocab_size is not None:
        return config
    tokenizer = open_tokenizer(config, end)
    if tokenizer is None:
        raise ConfigError("model.vocab_size: unset, and no data.tokenizer to take it from; set one of the two")
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": tokenizer.vocab_size})})


def source_tokenizer(source: Source) -> Tokenizer | None:
    """The tokenizer that goes along, ending documents as is recorded with the source."""
    return open_tokenizer(source.config, EndOfDocument.recorded_in(source.facts, "the facts of the model"))


def portable_config(config: RunConfig, files: Mapping[str, Path]) -> RunConfig:
    """With the path that the tokenizer's file has in a model folder with these files; without one, no tokenizer. A run
    that starts from the folder begins with the model as it is there."""
    name = TOKENIZER_NAMES.get(config.data.tokenizer or "")
    update: dict[str, Any] = {"tokenizer_path": name}
    if name is not None and name not in files:
        update = {"tokenizer": None, "tokenizer_path": None}
    changes = {"data": config.data.model_copy(update=update), "layer_tying": LayerTyingConfig()}
    return without_stacking(config).model_copy(update=changes)


def _facts(run_folder: Path, config: RunConfig, step: int) -> dict[str, Any]:
    """What the run's records say of a step."""
    facts: dict[str, Any] = {
        "run": config.run.name,
        "step": step,
        "steps": config.train.steps,
        "algorithm": config.sparsity.algorithm,
    }
    lines = run_folder / "metrics.jsonl"
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.is_file() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if values.get("step", step + 1) <= step:
            facts |= {key: values[key] for key in ("tokens", "loss", "val_loss", "density") if key in values}
    return facts
