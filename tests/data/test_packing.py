"""Packing into windows, splitting, and building the datasets of a run."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasparse.config.loader import ConfigError, load_config
from megasparse.data import (
    BatchLoader,
    BlendedDataset,
    ConcatenatedDataset,
    DatasetError,
    IndexedDataset,
    IndexedDatasetWriter,
    PackedDataset,
    build_datasets,
    split_documents,
    split_samples,
)


def write(prefix, lengths, start=0, dtype=np.int32):
    """Documents of the given lengths whose tokens count upwards from `start`."""
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for length in lengths:
            writer.add_document(np.arange(start, start + length))
            start += length
    return IndexedDataset(prefix)


def test_windows_overlap_by_one_and_cross_documents(tmp_path):
    indexed = write(tmp_path / "set", [3, 5, 4, 9, 2])
    samples = PackedDataset(indexed, seq_length=4, start=3, stop=21)
    # Documents 1 to 3 are tokens 3 to 20: 18 tokens, four windows of 5, one token left over.
    assert len(samples) == 4
    assert [samples[i].tolist() for i in range(4)] == [list(range(3 + 4 * i, 8 + 4 * i)) for i in range(4)]
    assert samples[0].dtype == np.int64
    for index in (-1, 4):
        with pytest.raises(IndexError):
            samples[index]


@pytest.mark.parametrize("tokens, expected", [(5, 1), (8, 1), (9, 2)])
def test_number_of_windows(tmp_path, tokens, expected):
    assert len(PackedDataset(write(tmp_path / "set", [tokens]), seq_length=4)) == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=20), st.integers(1, 9), st.data())
def test_a_sample_tells_the_document_of_each_token(tmp_path_factory, lengths, seq_length, data):
    """Against a list of the documents of all tokens; ranges begin and end inside documents, some of which are empty."""
    indexed = write(tmp_path_factory.mktemp("data") / "set", lengths)
    of_tokens = [number for number, length in enumerate(lengths) for _ in range(length)]
    start = data.draw(st.integers(0, len(of_tokens)))
    if len(of_tokens) - start <= seq_length:
        return
    samples = PackedDataset(indexed, seq_length, start=start, documents=True)
    for i in range(len(samples)):
        first = start + i * seq_length
        tokens, documents = samples[i]
        assert tokens.tolist() == list(range(first, first + seq_length + 1))
        assert documents.tolist() == of_tokens[first : first + seq_length + 1]
        assert samples[i].dtype == np.int64


def test_documents_come_from_the_index_not_from_the_end_tokens(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document([7, 0, 7])  # holds an end token, 0, and lacks one at its end
        writer.add_document([])
        writer.add_document([7, 7, 0])
    samples = PackedDataset(IndexedDataset(tmp_path / "set"), seq_length=5, documents=True)
    assert samples[0].tolist() == [[7, 0, 7, 7, 7, 0], [0, 0, 0, 2, 2, 2]]


def test_less_than_a_window_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="4 tokens; one sample of seq_length 4 needs 5"):
        PackedDataset(write(tmp_path / "set", [4]), seq_length=4)


@pytest.mark.parametrize("bad", [50, -1, 2**31 - 1])
def test_ids_outside_the_vocabulary_are_found_on_fetching(tmp_path, bad):
    with IndexedDatasetWriter(tmp_path / "good", np.int32) as writer:
        writer.add_document(range(10))
        writer.add_document([1, 2, 3, 49, 5, 6])
    content = np.fromfile(tmp_path / "good.bin", np.int32)
    content[13] = bad
    content.tofile(tmp_path / "good.bin")
    samples = PackedDataset(IndexedDataset(tmp_path / "good"), seq_length=5, vocab_size=50)
    assert samples[0].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(DatasetError, match=rf"good\.bin: token id {bad} at token 13 \(document 1\); .* 0 to 49"):
        samples[2]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=30),
    st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 3.0]), min_size=1, max_size=4).filter(any),
)
def test_splits_are_contiguous_and_not_empty(tmp_path_factory, lengths, fractions):
    indexed = write(tmp_path_factory.mktemp("data") / "set", lengths)
    wanted = sum(fraction > 0 for fraction in fractions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if sum(lengths) < wanted:
            with pytest.raises(DatasetError, match=f"{sum(lengths)} tokens cannot be cut into {wanted}"):
                split_documents(indexed, fractions)
            return
        ranges = split_documents(indexed, fractions)
    assert ranges[0].start == 0 and max(piece.stop for piece in ranges) == sum(lengths)
    for left, right in zip(ranges, ranges[1:], strict=False):
        assert left.stop == right.start
    for fraction, piece in zip(fractions, ranges, strict=True):
        assert (len(piece) > 0) == (fraction > 0)
    if np.count_nonzero(lengths) >= wanted:
        assert {piece.stop for piece in ranges} <= set(indexed.document_offsets.tolist())


def test_split_takes_the_nearest_boundary(tmp_path):
    indexed = write(tmp_path / "set", [10] * 100)
    train, valid, test = split_documents(indexed, (0.893, 0.057, 0.05))
    assert (train.stop, valid.stop, test.stop) == (890, 950, 1000)
    first, second = split_documents(indexed, (897, 103))
    assert (first.stop, second.stop) == (900, 1000)


def test_one_document_is_cut_inside_with_a_warning(tmp_path):
    indexed = write(tmp_path / "set", [1000])
    with pytest.warns(UserWarning, match="1 non-empty document.*cut inside a document"):
        train, valid = split_documents(indexed, (0.9, 0.1))
    assert (train.start, train.stop, valid.start, valid.stop) == (0, 900, 900, 1000)


def test_lopsided_split_is_told(tmp_path):
    with pytest.warns(UserWarning, match="a split of 1.00% of the tokens became 50.00%"):
        split_documents(write(tmp_path / "set", [500, 500]), (0.99, 0.01))


@pytest.mark.parametrize("fractions", [(), (0, 0), (-1, 2), (float("nan"), 1)])
def test_bad_fractions(tmp_path, fractions):
    with pytest.raises(ValueError, match="split fractions"):
        split_documents(write(tmp_path / "set", [10]), fractions)


def build(tmp_path, **changes):
    settings = {
        "train_sources": [(tmp_path / "set", 1.0)],
        "valid_sources": None,
        "valid_fraction": 0.2,
        "seq_length": 4,
        "vocab_size": 10_000,
        "seed": 1,
    }
    return build_datasets(**{**settings, **changes})


def test_training_and_validation_parts_are_disjoint_and_complete(tmp_path):
    write(tmp_path / "set", [10] * 50)
    train, valid = build(tmp_path)
    seen = {int(token) for n in range(len(train)) for token in train[n]}
    held_out = [int(token) for i in range(len(valid)) for token in valid[i]]
    assert len(train) == 99 and len(valid) == 24
    assert seen == set(range(397)) and min(held_out) == 400
    assert held_out == [token for i in range(24) for token in range(400 + 4 * i, 405 + 4 * i)]
    again, _ = build(tmp_path)
    other, _ = build(tmp_path, seed=2)
    assert [train[n][0] for n in range(50)] == [again[n][0] for n in range(50)]
    assert [train[n][0] for n in range(50)] != [other[n][0] for n in range(50)]


def test_several_sources_and_separate_validation(tmp_path):
    write(tmp_path / "set", [100])
    write(tmp_path / "two", [200], start=1000)
    write(tmp_path / "held", [50], start=5000)
    sources = [(tmp_path / "set", 3), (tmp_path / "two", 1)]
    train, valid = build(tmp_path, train_sources=sources, valid_sources=[(tmp_path / "held", 1.0)])
    assert isinstance(train, BlendedDataset)
    from_first = sum(train[n][0] < 1000 for n in range(1000))
    assert from_first == 750
    assert len(valid) == 12 and valid[0].tolist() == [5000, 5001, 5002, 5003, 5004]
    with pytest.warns(UserWarning, match="inside a document"):
        _, joined = build(tmp_path, train_sources=sources)
    assert [joined[i][0] for i in range(len(joined))] == [80, 84, 88, 92, *range(1160, 1196, 4)]


def test_documents_travel_through_blends_splits_and_batches(tmp_path):
    """Tokens name their place in the stream, so the documents of every batch can be counted by hand."""
    lengths = {0: [3, 14, 5, 1, 9] * 8, 1000: [2, 30, 7] * 10}
    write(tmp_path / "set", lengths[0])
    write(tmp_path / "two", lengths[1000], start=1000)
    sources = [(tmp_path / "set", 2), (tmp_path / "two", 1)]
    of_token = {}
    for start, documents in lengths.items():
        of_token |= dict(enumerate(np.repeat(np.arange(len(documents)), documents).tolist(), start))
    train, valid = build(tmp_path, train_sources=sources, documents=True)
    plain, plain_valid = build(tmp_path, train_sources=sources)
    settings = {"global_batch_size": 8, "micro_batch_size": 4, "data_parallel_rank": 1, "data_parallel_size": 2}
    with BatchLoader(train, **settings, num_steps=20) as loader, BatchLoader(plain, **settings, num_steps=20) as same:
        for samples, tokens in zip(loader, same, strict=True):
            batch, without = split_samples(samples), split_samples(tokens)
            assert batch.inputs.equal(without.inputs) and batch.targets.equal(without.targets)
            assert without.documents is None
            assert batch.documents.tolist() == [[of_token[token] for token in row] for row in batch.inputs.tolist()]
    assert {len(set(row)) for i in range(len(valid)) for row in [valid[i][1].tolist()]} == {1, 2, 3}
    for i in range(len(valid)):
        tokens, documents = valid[i].tolist()
        assert tokens == plain_valid[i].tolist() and documents == [of_token[token] for token in tokens]


def test_no_validation_share(tmp_path):
    write(tmp_path / "set", [100])
    assert build(tmp_path, valid_fraction=0.0)[1] is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"valid_fraction": 0.02}, "the validation split of .*set: .* 2 tokens; .* needs 5"),
        ({"seq_length": 0}, "seq_length is 0"),
    ],
)
def test_bad_settings_are_named(tmp_path, changes, message):
    write(tmp_path / "set", [2] * 50)
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **changes)


def test_an_empty_list_of_validation_data_names_its_setting(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.valid"):
        load_config([], [f"data.train=[{{path: {tmp_path / 'set'}}}]", "data.valid=[]"])


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_bad_weight_of_a_single_source(tmp_path, weight):
    write(tmp_path / "set", [10] * 50)
    with pytest.raises(ValueError, match="weight 0 is"):
        build(tmp_path, train_sources=[(tmp_path / "set", weight)])


def test_concatenation_borders():
    joined = ConcatenatedDataset([[1, 2], [3], [4, 5, 6]])
    assert [joined[i] for i in range(len(joined))] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(IndexError):
        joined[6]
    with pytest.raises(ValueError, match="no datasets"):
        ConcatenatedDataset([])
