"""Token data: indexed files, packing, shuffling, blending, loading. See README.md in this folder."""

from megasparse.data.build import build_datasets, end_of_document, open_tokenizer
from megasparse.data.corpus import CorpusOptions, CorpusReader
from megasparse.data.dataset import ConcatenatedDataset, PackedDataset, split_documents
from megasparse.data.facts import DataFacts, EndOfDocument, read_facts
from megasparse.data.fingerprints import fingerprint, run_fingerprint
from megasparse.data.index_format import DatasetError, dataset_paths, smallest_dtype
from megasparse.data.indexed import IndexedDataset, IndexedDatasetWriter
from megasparse.data.loader import Batch, BatchLoader, page_locked, split_samples, target_share
from megasparse.data.sampler import BlendedDataset, ShuffledDataset, derive_seed, permuted_index
from megasparse.data.supervised_dataset import SupervisedDataset
from megasparse.data.tokenizer import TOKENIZER_KINDS, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "BatchLoader",
    "BlendedDataset",
    "ConcatenatedDataset",
    "CorpusOptions",
    "CorpusReader",
    "DataFacts",
    "DatasetError",
    "EndOfDocument",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "PackedDataset",
    "ShuffledDataset",
    "SupervisedDataset",
    "TOKENIZER_KINDS",
    "Tokenizer",
    "build_datasets",
    "dataset_paths",
    "derive_seed",
    "end_of_document",
    "fingerprint",
    "load_tokenizer",
    "open_tokenizer",
    "page_locked",
    "permuted_index",
    "read_facts",
    "run_fingerprint",
    "smallest_dtype",
    "split_documents",
    "split_samples",
    "target_share",
]
