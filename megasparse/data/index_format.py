"""The Megatron indexed-dataset format (`.bin` and `.idx`): its facts, and the errors raised about it.

A dataset is two files with one prefix. `<prefix>.bin` holds the token ids, one after the other, nothing else.
`<prefix>.idx`, all little endian:

    bytes        type    content
    9            bytes   magic b"MMIDIDX\\x00\\x00"
    8            uint64  version, 1
    1            uint8   code of the token dtype, see `DTYPE_CODES`
    8            uint64  S, number of sequences
    8            uint64  E, number of document indices: documents + 1
    4 S          int32   tokens in each sequence
    8 S          int64   byte offset of each sequence in the .bin
    8 E          int64   first sequence of each document, and S at the end
    S, optional  int8    modes, written by Megatron-LM for multimodal data; tolerated and ignored here

A document is a run of sequences. GPT-NeoX's tool for merging leaves the document indices out, so that E is 1 and the
only index 0: each sequence is a document there. The layout is the one that NVIDIA/Megatron-LM
(megatron/core/datasets/indexed_dataset.py) and EleutherAI/gpt-neox (megatron/data/indexed_dataset.py) write.
"""

from __future__ import annotations

import struct
from os import PathLike, fspath
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
MAX_SEQUENCE_LENGTH = 2**31 - 1

DTYPE_CODES: dict[int, np.dtype] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
# Codes 6 and 7 are float64 and float32 in one writer and the reverse in others; neither can hold token ids safely.
FLOAT_CODES = (6, 7)


class DatasetError(ValueError):
    """A data file is not what it should be. The message names the file, what was found and what was expected."""


def dataset_paths(prefix: str | PathLike[str]) -> tuple[Path, Path]:
    """Returns the (.bin, .idx) paths of a dataset prefix."""
    return Path(fspath(prefix) + ".bin"), Path(fspath(prefix) + ".idx")


def loss_mask_prefix(prefix: str | PathLike[str]) -> str:
    """Prefix of the data set that says, for each token of the data set of `prefix`, whether it is learned."""
    return fspath(prefix) + ".loss_mask"


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The dtype to store ids of a vocabulary in: uint16 when every id fits (vocab_size <= 65536), else int32."""
    if vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least 1")
    return np.dtype(np.uint16) if vocab_size <= 2**16 else np.dtype(np.int32)


def dtype_code(dtype: np.dtype | type | str) -> int:
    """The code of an integer dtype in the .idx header. ValueError for a dtype the format cannot hold tokens in."""
    wanted = np.dtype(dtype).newbyteorder("<")
    for code, known in DTYPE_CODES.items():
        if known == wanted:
            return code
    allowed = ", ".join(known.name for known in DTYPE_CODES.values())
    raise ValueError(f"dtype {np.dtype(dtype).name} cannot hold token ids in a .bin file; must be one of {allowed}")


def dtype_from_code(code: int, path: Path) -> np.dtype:
    """The dtype of a header code. DatasetError, naming `path`, for a float or unknown code."""
    if code in DTYPE_CODES:
        return DTYPE_CODES[code]
    allowed = ", ".join(f"{known} ({dtype.name})" for known, dtype in DTYPE_CODES.items())
    kind = "a floating point type" if code in FLOAT_CODES else "unknown"
    raise DatasetError(f"{path}: dtype code {code} is {kind}; token ids need an integer type, one of {allowed}")
