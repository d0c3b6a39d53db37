"""The .bin/.idx format: round trips against an independent reader, and every kind of damaged file."""

from __future__ import annotations

import struct
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasparse.data import DatasetError, IndexedDataset, IndexedDatasetWriter, smallest_dtype

ARRAY_CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


def read_plainly(prefix):
    """Documents of a dataset as lists, read with struct and array alone."""
    index = open(f"{prefix}.idx", "rb").read()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, indices = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    pointers = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    documents = struct.unpack_from(f"<{indices}q", index, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * indices
    content = open(f"{prefix}.bin", "rb").read()
    itemsize = array(ARRAY_CODES[code]).itemsize
    result = []
    for first, last in zip(documents, documents[1:], strict=False):
        tokens = array(ARRAY_CODES[code])
        for k in range(first, last):
            tokens.frombytes(content[pointers[k] : pointers[k] + lengths[k] * itemsize])
        result.append(list(tokens))
    return result


def write_plainly(prefix, documents, code, letter, modes=False):
    """Writes documents, each a list of sequences, with struct alone. Returns the index bytes."""
    sequences = [sequence for document in documents for sequence in document]
    bounds = np.cumsum([0] + [len(document) for document in documents]).tolist()
    itemsize = struct.calcsize("<" + letter)
    pointers = np.cumsum([0] + [len(s) * itemsize for s in sequences]).tolist()[:-1]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    index += struct.pack(f"<{len(sequences)}q", *pointers) + struct.pack(f"<{len(bounds)}q", *bounds)
    if modes:
        index += bytes(len(sequences))
    with open(f"{prefix}.idx", "wb") as file:
        file.write(index)
    with open(f"{prefix}.bin", "wb") as file:
        for sequence in sequences:
            file.write(struct.pack(f"<{len(sequence)}{letter}", *sequence))
    return bytearray(index)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 100), max_size=30), max_size=12),
    st.sampled_from(["uint8", "int8", "int16", "int32", "uint16", "int64"]),
)
def test_round_trip_against_plain_reader(tmp_path_factory, documents, dtype):
    prefix = tmp_path_factory.mktemp("data") / "set"
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, np.int64))
    assert read_plainly(prefix) == documents
    dataset = IndexedDataset(prefix)
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == documents
    flat = [token for document in documents for token in document]
    assert dataset.num_documents == len(documents) and dataset.num_tokens == len(flat)
    assert dataset.tokens(0, len(flat)).tolist() == flat
    assert dataset.document_offsets.tolist() == np.cumsum([0] + [len(d) for d in documents]).tolist()
    assert dataset.dtype == np.dtype(dtype)


@pytest.mark.parametrize("code, letter", [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
@pytest.mark.parametrize("modes", [False, True])
def test_reads_several_sequences_per_document_and_modes(tmp_path, code, letter, modes):
    documents = [[[1, 2], [3]], [], [[4, 5, 6], [], [7]]]
    write_plainly(tmp_path / "set", documents, code, letter, modes)
    dataset = IndexedDataset(tmp_path / "set")
    assert [dataset.document(i).tolist() for i in range(3)] == [[1, 2, 3], [], [4, 5, 6, 7]]
    assert [dataset.document_at(k) for k in range(7)] == [0, 0, 0, 2, 2, 2, 2]


@pytest.mark.parametrize("modes", [False, True])
def test_reads_what_gpt_neox_has_merged(tmp_path, modes):
    documents = [[[1, 2, 3]], [[4]], [[]], [[5, 6]]]
    write_plainly(tmp_path / "set", documents, 8, "H", modes)
    content = (tmp_path / "set.idx").read_bytes()
    # Its builder takes over the sequences of the files it merges, and of the document indices the first, 0.
    end = 34 + 12 * 4
    content = content[:26] + struct.pack("<Q", 1) + content[34 : end + 8] + content[end + 8 * 5 :]
    (tmp_path / "set.idx").write_bytes(content)
    dataset = IndexedDataset(tmp_path / "set")
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == [[1, 2, 3], [4], [], [5, 6]]
    assert [dataset.document_at(token) for token in range(6)] == [0, 0, 0, 1, 3, 3]
    (tmp_path / "set.idx").write_bytes(content[:end] + struct.pack("<Q", 2) + content[end + 8 :])
    with pytest.raises(DatasetError, match="documents run from sequence 2 to 2; they must run from 0 to 4"):
        IndexedDataset(tmp_path / "set")


def test_long_documents_become_several_sequences(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", np.uint16, max_sequence_length=4) as writer:
        writer.add_document(range(11))
        writer.add_document([5])
    assert read_plainly(tmp_path / "set") == [list(range(11)), [5]]
    assert struct.unpack_from("<QQ", (tmp_path / "set.idx").read_bytes(), 18) == (4, 3)
    assert IndexedDataset(tmp_path / "set").document(0).tolist() == list(range(11))


def test_fragments_join_into_documents(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_fragments([1, 2, 3], [2, 1], [True, False])
        writer.add_fragments([4], [1], [False])
        writer.add_fragments([5, 6, 7], [2, 1], [True, False])
        writer.add_fragments([], [0], [True])
    assert read_plainly(tmp_path / "set") == [[1, 2], [3, 4, 5, 6], [7]]


def test_smallest_dtype():
    assert smallest_dtype(257) == smallest_dtype(65536) == np.uint16
    assert smallest_dtype(65537) == np.int32
    with pytest.raises(ValueError, match="vocab_size is 0"):
        smallest_dtype(0)


@pytest.mark.parametrize(
    "dtype, vocab_size, tokens, message",
    [
        (np.uint16, 100, [5, 100], "token id 100; ids must be 0 to 99"),
        (np.uint16, None, [65536], "token id 65536; ids must be 0 to 65535"),
        (np.uint8, 1000, [256], "token id 256; ids must be 0 to 255"),
        (np.int32, None, [-1], "token id -1"),
        (np.int32, None, [1.5], "float64; they must be integers"),
    ],
)
def test_writer_refuses_bad_ids_and_leaves_nothing(tmp_path, dtype, vocab_size, tokens, message):
    with pytest.raises(ValueError, match=message):
        with IndexedDatasetWriter(tmp_path / "set", dtype, vocab_size=vocab_size) as writer:
            writer.add_document([1, 2])
            writer.add_document(tokens)
    assert list(tmp_path.iterdir()) == []


def test_failed_overwrite_keeps_the_old_dataset(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document([1, 2, 3])
    with pytest.raises(RuntimeError), IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document([9])
        raise RuntimeError
    assert read_plainly(tmp_path / "set") == [[1, 2, 3]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.bin", "set.idx"]


def test_unfinished_dataset_is_invisible(tmp_path):
    writer = IndexedDatasetWriter(tmp_path / "set", np.uint16)
    writer.add_document([1])
    assert not (tmp_path / "set.bin").exists() and not (tmp_path / "set.idx").exists()
    writer.finalize()
    writer.finalize()
    assert read_plainly(tmp_path / "set") == [[1]]


def test_failing_index_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, file):
        raise OSError("disk full")

    monkeypatch.setattr(IndexedDatasetWriter, "_write_index", fail)
    with pytest.raises(OSError, match="disk full"), IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document([1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint32])
def test_writer_refuses_dtypes_the_format_lacks(tmp_path, dtype):
    with pytest.raises(ValueError, match=f"{np.dtype(dtype).name}.*must be one of uint8"):
        IndexedDatasetWriter(tmp_path / "set", dtype)


def set_bytes(index, offset, kind, value):
    struct.pack_into("<" + kind, index, offset, value)


DAMAGES = {
    "magic": (lambda index: index.__setitem__(slice(0, 6), b"TNTIDX"), "begins with .*TNTIDX"),
    "version": (lambda index: set_bytes(index, 9, "Q", 2), "format version 2; this reader knows version 1"),
    "float64": (lambda index: set_bytes(index, 17, "B", 6), "dtype code 6 is a floating point type"),
    "float32": (lambda index: set_bytes(index, 17, "B", 7), "dtype code 7 is a floating point type"),
    "dtype": (lambda index: set_bytes(index, 17, "B", 99), "dtype code 99 is unknown"),
    "sequences": (lambda index: set_bytes(index, 18, "Q", 4), "4 sequences and 3 document indices need"),
    "huge count": (lambda index: set_bytes(index, 18, "Q", 2**60), "document indices need"),
    "truncated": (lambda index: index.__delitem__(slice(-5, None)), "the file has .* bytes; .* need"),
    "cut header": (lambda index: index.__delitem__(slice(20, None)), "the header alone has 34"),
    "empty": (lambda index: index.clear(), "begins with b''"),
    "length": (lambda index: set_bytes(index, 34, "i", -2), "sequence 0 has length -2"),
    "pointer": (lambda index: set_bytes(index, 34 + 12 + 8, "q", 2), "sequence 1 points to byte 2; .* end at byte 4"),
    "first": (lambda index: set_bytes(index, 70, "q", 1), "from sequence 1 to 3; they must run from 0 to 3"),
    "last": (lambda index: set_bytes(index, 86, "q", 2), "from sequence 0 to 2; they must run from 0 to 3"),
    "order": (lambda index: set_bytes(index, 78, "q", 9), "must not decrease"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_index_is_refused(tmp_path, damage):
    change, message = DAMAGES[damage]
    index = write_plainly(tmp_path / "set", [[[1, 2], [3]], [[4, 5]]], 8, "H")
    IndexedDataset(tmp_path / "set")
    change(index)
    (tmp_path / "set.idx").write_bytes(bytes(index))
    with pytest.raises(DatasetError, match=message) as caught:
        IndexedDataset(tmp_path / "set")
    assert "set.idx" in str(caught.value)


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"xx"])
def test_bin_of_wrong_size_is_refused(tmp_path, change):
    write_plainly(tmp_path / "set", [[[1, 2, 3]]], 8, "H")
    path = tmp_path / "set.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(
        DatasetError, match=r"set\.bin: the file has \d bytes; set\.idx says 3 tokens of uint16, 6 bytes"
    ):
        IndexedDataset(tmp_path / "set")


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_missing_file_is_named(tmp_path, missing):
    write_plainly(tmp_path / "set", [[[1]]], 8, "H")
    (tmp_path / f"set{missing}").unlink()
    with pytest.raises(DatasetError, match=rf"set\{missing}: no such file"):
        IndexedDataset(tmp_path / "set")


def test_reading_outside_raises(tmp_path):
    write_plainly(tmp_path / "set", [[[1, 2]]], 8, "H")
    dataset = IndexedDataset(tmp_path / "set")
    for call in (lambda: dataset.document(1), lambda: dataset.document(-1), lambda: dataset.tokens(0, 3)):
        with pytest.raises(IndexError):
            call()
    with pytest.raises(ValueError, match="read-only"):
        dataset.tokens(0, 1)[0] = 3
