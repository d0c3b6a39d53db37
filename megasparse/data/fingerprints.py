"""Tells whether the data of a run is still the data it began with.

    before = fingerprint(IndexedDataset("data/web"))       # JSON values, to be kept with the run
    changes(before, fingerprint(IndexedDataset("data/web")))

Reading all tokens would take minutes for each 100 GB. So the index is hashed whole, which tells the length of each
document, and of the data `NUM_SAMPLES` evenly spaced pieces, the first and the last bytes among them: 4 MiB in all.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from megasparse.config.schema import RunConfig
from megasparse.data.indexed import IndexedDataset
from megasparse.data.vocabulary import file_sha256
from megasparse.utils.differences import differences, shown

NUM_SAMPLES = 64
SAMPLE_BYTES = 2**16
READ_BYTES = 2**20


def fingerprint(dataset: IndexedDataset) -> dict[str, Any]:
    """Sizes and hashes of a data set, and the hash of the tokenizer's file where it is recorded beside the data."""
    mask = dataset.loss_mask
    # Only where there is one: records of other data stay as they were.
    supervised = {} if mask is None else {"loss_mask_sha256": _samples(mask.bin_path)}
    return {
        "documents": dataset.num_documents,
        "tokens": dataset.num_tokens,
        "dtype": dataset.dtype.name,
        "index_sha256": _whole(dataset.idx_path),
        "samples_sha256": _samples(dataset.bin_path),
        "tokenizer_sha256": None if dataset.facts is None else dataset.facts.tokenizer_sha256,
        **supervised,
    }


def run_fingerprint(config: RunConfig) -> dict[str, Any]:
    """Fingerprints of all that a run reads: the tokenizer's file, and the data in the order of the configuration.

    Paths are left out: data that was moved is the same data.
    """
    path = config.data.tokenizer_path
    return {
        "tokenizer_sha256": None if path is None else file_sha256(path),
        "train": [fingerprint(IndexedDataset(source.path)) for source in config.data.train or ()],
        "valid": [fingerprint(IndexedDataset(source.path)) for source in config.data.valid or ()],
    }


def changes(before: Any, now: Any, name: str = "data") -> list[str]:
    """What differs between two fingerprints, each as `name: old before, new now`; empty where nothing does."""
    return [f"{place}: {shown(old)} before, {shown(new)} now" for place, old, new in differences(before, now, name)]


def _whole(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _samples(path: Path) -> str:
    digest = hashlib.sha256()
    size = path.stat().st_size
    last = max(size - SAMPLE_BYTES, 0)
    starts = sorted({last * number // (NUM_SAMPLES - 1) for number in range(NUM_SAMPLES)})
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
