"""A model folder: a model without a run, in one form for conversion, sampling, evaluation and as the start of a run.

    FOLDER/config.yaml              a run configuration; paths of the tokenizer are relative to the folder
    FOLDER/model.safetensors        or model-00001-of-0000N.safetensors and model.safetensors.index.json
    FOLDER/topology.safetensors     optional: which units are active, packed bits of every layer
    FOLDER/quantization.json        optional: which weights lie there as levels and scales (``quantized``)
    FOLDER/checksums.json           size and SHA-256 of these files
    FOLDER/tokenizer.json, ...      whatever belongs to the tokenizer

    folder = ModelFolder(path)
    for name in folder.names:
        weight = folder.tensor(name)

    with ModelFolderWriter(path, config, {name: torch.float32 for name in names}, facts={"step": 24}) as writer:
        for name in writer.names:
            writer.write(name, weights[name])

Tensors go by the names of the model's state dict without aliases (a tied head is stored once, as the embedding). They
are whole, whatever the number of ranks, and the vocabulary is not padded: `embedding.tokens.weight` and `head.weight`
have a row for each entry. One tensor is in memory at a time. A folder appears when it is finished.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megasparse.checkpoint.quantized import (
    QUANTIZATION,
    Quantization,
    QuantizedFiles,
    read_quantization,
    write_quantization,
)
from megasparse.checkpoint.store import CheckpointError, sha256
from megasparse.checkpoint.tensor_files import (
    MAX_FILE_BYTES,
    TensorFiles,
    TensorFileWriter,
    TensorSpec,
    read_json,
    save_tensors,
)
from megasparse.config.loader import ConfigError, load_config, save_config
from megasparse.config.schema import RunConfig
from megasparse.kernels.quantized import QuantizedMatrix
from megasparse.layers import LayerFactory, SparseSpec
from megasparse.models.gpt import GPT
from megasparse.parallel.shard_spec import ShardSpec, shard_spec_of
from megasparse.sparsity.groups import layer_settings
from megasparse.utils.files import failures_named, write_at_once, write_json
from megasparse.utils.folders import new_folder

FORMAT = 1
FORMAT_KEY, FACTS_KEY = "megasparse_model_folder", "megasparse_facts"
CONFIG, CHECKSUMS, TOPOLOGY = "config.yaml", "checksums.json", "topology.safetensors"
COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""Files that may lie beside the weights: of the tokenizer, and of generation."""
VOCABULARY_TENSORS = ("embedding.tokens.weight", "head.weight")


def is_model_folder(folder: Path) -> bool:
    """Whether `folder` looks like one: it need not be whole."""
    names = ("model.safetensors", "model.safetensors.index.json")
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in names)


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of the tokenizer and of generation in a folder, by name."""
    return {name: folder / name for name in COMPANIONS if (folder / name).is_file()}


def load_topology(path: Path) -> dict[str, Tensor]:
    """Packed bits by kind and layer."""
    try:
        return load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path}: not readable: {error}") from None


def model_tensors(config: RunConfig) -> dict[str, ShardSpec]:
    """Whole shapes of the weights by name, the vocabulary unpadded; `parts` tells the widths of fused ones.

    `model.vocab_size` must be set.
    """
    vocab_size = config.model.vocab_size
    assert vocab_size is not None, "model.vocab_size is unset"

    def low_rank_rule(name: str) -> SparseSpec | None:
        # A low-rank branch adds parameters; apart from these a sparse layer has the tensors of a dense one.
        if not config.sparsity.low_rank or layer_settings(config.sparsity, name) is None:
            return None
        return SparseSpec(1, config.sparsity.low_rank)

    unpadded = config.model.model_copy(update={"vocab_size_multiple": 1})
    with torch.device("meta"):
        model = GPT(unpadded, config.attention, vocab_size, LayerFactory(low_rank_rule))
    return {name: shard_spec_of(parameter) for name, parameter in model.named_parameters()}


class ModelFolder:
    """The model folder at `folder`. Raises CheckpointError where something is missing, cut off or does not fit.

    Attributes:
        config: its configuration; paths of the tokenizer lead into the folder.
        facts: what is known of how it came to be, such as `step`; plain values.
        quantization: how weights are quantised; None: they are not. ``tensor`` gives them in float32 either way.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        self.quantization = read_quantization(folder)
        self._files = TensorFiles(folder) if self.quantization is None else QuantizedFiles(folder, self.quantization)
        found = self._files.metadata.get(FORMAT_KEY)
        if found != str(FORMAT):
            raise CheckpointError(f"model folder {folder}: format {found}; must be {FORMAT}")
        self.facts: dict[str, Any] = json.loads(self._files.metadata.get(FACTS_KEY, "{}"))
        self._check_shapes()

    @property
    def names(self) -> list[str]:
        """In the order of the model."""
        return self._files.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._files.dtype(name)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, mapped from its file: release it before the next one."""
        return self._files.tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, mapped from its file."""
        return self._files.rows(name, start, stop)

    def quantized_layers(self) -> Iterator[tuple[str, QuantizedMatrix]]:
        """Name, levels and scales of each quantised layer."""
        if isinstance(self._files, QuantizedFiles):
            for layer in self._files.quantization.layers:
                yield layer, self._files.matrix(f"{layer}.weight")

    @property
    def has_topology(self) -> bool:
        return (self.folder / TOPOLOGY).is_file()

    def topology(self) -> dict[str, Tensor]:
        """Packed bits by kind and layer, as ``Controller.state`` gives them; empty where the folder has none."""
        return load_topology(self.folder / TOPOLOGY) if self.has_topology else {}

    def check_files(self) -> None:
        """Raise CheckpointError unless the files have the checksums that were written with them."""
        for name, (size, checksum) in read_json(self.folder / CHECKSUMS).get("files", {}).items():
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"model folder {self.folder}: {name} is missing")
            if path.stat().st_size != size or sha256(path) != checksum:
                raise CheckpointError(f"model folder {self.folder}: {name} does not have its checksum")

    def _check_shapes(self) -> None:
        expected = {name: partition.shape for name, partition in model_tensors(self.config).items()}
        odd = sorted(set(expected) ^ set(self.names))
        if odd:
            raise CheckpointError(
                f"model folder {self.folder}: tensors and {CONFIG} differ at {', '.join(odd[:4])}"
                f"{' ...' if len(odd) > 4 else ''}"
            )
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise CheckpointError(
                    f"model folder {self.folder}: {name} has shape {list(self.shape(name))}, {CONFIG} asks for "
                    f"{list(shape)}"
                )


def _read_config(folder: Path) -> RunConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"model folder {folder}: {CONFIG} is missing")
    config = load_config([path])
    if config.model.vocab_size is None:
        raise ConfigError(f"{path}: model.vocab_size: unset; must be the number of rows of the embedding")
    tokenizer = config.data.tokenizer_path
    if tokenizer is None or Path(tokenizer).is_absolute():
        return config
    data = config.data.model_copy(update={"tokenizer_path": str(folder / tokenizer)})
    return config.model_copy(update={"data": data})


class ModelFolderWriter:
    """Makes a model folder; a context that removes what was written where it is left by an error.

    Args:
        folder: new or empty, or with `replace` one that is taken the place of at the end.
        config: `model.vocab_size` must be set; a relative `data.tokenizer_path` means a file that ``copy`` brings.
        dtypes: of every tensor, by name.
        facts: plain values that say how the model came to be.
        max_file_bytes: limit on the size of a file of weights.
        quantization: of the weights that ``write_quantized`` takes.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        dtypes: Mapping[str, torch.dtype],
        *,
        facts: Mapping[str, Any] | None = None,
        max_file_bytes: int = MAX_FILE_BYTES,
        replace: bool = False,
        quantization: Quantization | None = None,
    ) -> None:
        self.folder, self.config, self._replace, self._quantization = folder, config, replace, quantization
        expected = model_tensors(config)
        assert set(dtypes) == set(expected), sorted(set(dtypes) ^ set(expected))
        self.specs = {name: TensorSpec(partition.shape, dtypes[name]) for name, partition in expected.items()}
        self._metadata = {"format": "pt", FORMAT_KEY: str(FORMAT), FACTS_KEY: json.dumps(dict(facts or {}))}
        self._max_file_bytes = max_file_bytes
        self._stack = ExitStack()

    @property
    def names(self) -> list[str]:
        """In the order in which ``write`` takes them."""
        return list(self.specs)

    def __enter__(self) -> ModelFolderWriter:
        self._partial = self._stack.enter_context(new_folder(self.folder, replace=self._replace))
        specs = self.specs if self._quantization is None else self._quantization.stored_specs(self.specs)
        self._files = TensorFileWriter(self._partial, specs, self._metadata, self._max_file_bytes)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self._files.abandon()
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._files.close()
            save_config(self.config, self._partial / CONFIG)
            if self._quantization is not None:
                write_quantization(self._quantization, self._partial)
            checksums = dict(self._files.checksums)
            for name in (CONFIG, TOPOLOGY, QUANTIZATION):
                path = self._partial / name
                if path.is_file():
                    checksums[name] = (path.stat().st_size, sha256(path))
            write_json(self._partial / CHECKSUMS, {"format": FORMAT, "files": checksums})

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor; raises CheckpointError where it has another shape than the configuration asks for."""
        spec = self.specs[name]
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(f"{name}: has shape {list(tensor.shape)}, the configuration asks for {[*spec.shape]}")
        self._files.write(name, tensor.to(spec.dtype))

    def write_quantized(self, name: str, matrix: QuantizedMatrix) -> None:
        """The next tensor, of a layer that the quantization names."""
        assert self._quantization is not None and tuple(matrix.values.shape) == self.specs[name].shape, name
        for key, tensor in self._quantization.tensors(name, matrix).items():
            self._files.write(key, tensor)

    def topology(self, state: Mapping[str, Tensor]) -> None:
        """Which units are active, as ``Controller.state`` gives it."""
        save_tensors(state, self._partial / TOPOLOGY)

    def copy(self, name: str, source: Path) -> None:
        """A further file, such as the tokenizer's."""
        with failures_named(self._partial / name):
            shutil.copyfile(source, self._partial / name)

    def write_text(self, name: str, text: str) -> None:
        """A further file from its content."""
        write_at_once(self._partial / name, text)


def pad_rows(whole: Tensor, rows: int) -> Tensor:
    """`whole` with rows of zeros up to `rows`: the padding of the vocabulary, which no result depends on."""
    missing = rows - whole.shape[0]
    assert missing >= 0, f"{whole.shape[0]} rows do not fit into {rows}"
    return whole if missing == 0 else torch.cat((whole, whole.new_zeros(missing, *whole.shape[1:])))


def fitted(name: str, whole: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a model folder in the shape that a model has it in: tables of the vocabulary may be padded there.

    Raises CheckpointError where it does not fit.
    """
    if name in VOCABULARY_TENSORS and whole.shape[1:] == shape[1:] and whole.shape[0] <= shape[0]:
        return pad_rows(whole, shape[0])
    if tuple(whole.shape) != shape:
        raise CheckpointError(f"{name} has shape {list(whole.shape)} there and {list(shape)} here")
    return whole


@torch.no_grad()
def load_weights(model: GPT, folder: ModelFolder, rank: int = 0) -> None:
    """Put the weights into a model, or into tensor-parallel rank `rank`'s shard of one. Raises CheckpointError."""
    parameters = dict(model.named_parameters())
    odd = sorted(set(parameters) ^ set(folder.names))
    if odd:
        raise CheckpointError(f"model folder {folder.folder} is of another model: they differ at {', '.join(odd[:4])}")
    for name, parameter in parameters.items():
        partition = shard_spec_of(parameter)
        parameter.copy_(partition.shard(fitted(name, folder.tensor(name), partition.shape), rank))
