"""Token data: indexed files, packing, shuffling, blending, loading. See README.md in this folder."""

from megasparse.data.build import build_datasets
from megasparse.data.corpus import CorpusOptions, CorpusReader
from megasparse.data.dataset import ConcatenatedDataset, PackedDataset, TokenRange, split_documents
from megasparse.data.index_format import DatasetError, dataset_paths, smallest_dtype
from megasparse.data.indexed import IndexedDataset, IndexedDatasetWriter
from megasparse.data.sampler import (
    Batch,
    BatchLoader,
    BlendedDataset,
    ShuffledDataset,
    derive_seed,
    permuted_index,
    split_samples,
)
from megasparse.data.tokenizer import TOKENIZER_KINDS, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "BatchLoader",
    "BlendedDataset",
    "ConcatenatedDataset",
    "CorpusOptions",
    "CorpusReader",
    "DatasetError",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "PackedDataset",
    "ShuffledDataset",
    "TOKENIZER_KINDS",
    "TokenRange",
    "Tokenizer",
    "build_datasets",
    "dataset_paths",
    "derive_seed",
    "load_tokenizer",
    "permuted_index",
    "smallest_dtype",
    "split_documents",
    "split_samples",
]
