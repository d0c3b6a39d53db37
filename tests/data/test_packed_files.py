"""Corpus files of every kind give the documents that the plain ones give; what is damaged is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megasparse.data import CorpusOptions, CorpusReader, DatasetError, packed_files

TEXTS = ["first\nwith two lines", "zweites Dokument \u2028 äöü", "x" * 50_000]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: zstandard.compress(content[:700]) + zstandard.compress(content[700:]),
}


def documents(path, **options) -> list[str]:
    return list(CorpusReader([path], CorpusOptions(**options)).documents())


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("ending", [".jsonl", ".JSONL", ".ndjson", ".json"])
def test_json_lines_by_any_name(tmp_path, monkeypatch, ending, compression) -> None:
    monkeypatch.setattr(packed_files, "ZSTD_BYTES", 61)
    path = tmp_path / f"web{ending}{compression.upper() if ending.isupper() else compression}"
    path.write_bytes(PACK[compression](LINES))
    assert documents(path) == TEXTS


@pytest.mark.parametrize("compression", PACK)
def test_text(tmp_path, compression) -> None:
    path = tmp_path / f"book.txt{compression}"
    path.write_bytes(PACK[compression](b"one\n\ntwo\n"))
    assert documents(path, document_rule="blank-line") == ["one\n", "two\n"]


@pytest.mark.parametrize("compression", [name for name in PACK if name])
def test_a_file_that_was_cut_off_is_named(tmp_path, compression) -> None:
    path = tmp_path / f"web.jsonl{compression}"
    path.write_bytes(PACK[compression](LINES)[:-5])
    with pytest.raises(DatasetError, match=f"web.jsonl{compression}: cannot be read"):
        documents(path)


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet(tmp_path, kind) -> None:
    table = pyarrow.table({"number": [1, 2, 3], "content": pyarrow.array(TEXTS, kind)})
    parquet.write_table(table, tmp_path / "part.parquet", row_group_size=2)
    reader = CorpusReader([tmp_path], CorpusOptions(jsonl_key="content", glob="*.parquet"))
    assert list(reader.documents()) == TEXTS and reader.bytes_read == reader.total_bytes


def test_unusable_parquet_is_named(tmp_path) -> None:
    path = tmp_path / "part.parquet"
    parquet.write_table(pyarrow.table({"number": [1], "content": pyarrow.array([None], pyarrow.string())}), path)
    with pytest.raises(DatasetError, match="part.parquet: no column 'text'; must be one of number, content"):
        documents(path)
    with pytest.raises(DatasetError, match="part.parquet: column 'number' holds int64; must be strings"):
        documents(path, jsonl_key="number")
    with pytest.raises(DatasetError, match="part.parquet, row 1: column 'content' is null"):
        documents(path, jsonl_key="content")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DatasetError, match="part.parquet: not readable as Parquet"):
        documents(path, jsonl_key="content")


OTHER = ["a.zip", "a.tar.gz", "a.TGZ", "a.jsonl.lz4", "a.arrow", "a.parquet.zst", "a.tar"]


@pytest.mark.parametrize("name", OTHER)
def test_other_formats_are_refused_and_those_known_are_named(tmp_path, name) -> None:
    # Content that is text shows that the name decides: an archive of text files decodes.
    (tmp_path / name).write_bytes(b"text")
    with pytest.raises(DatasetError, match=rf"{name}: unknown format; must be one of .*\.jsonl.*\.zst; \.parquet"):
        documents(tmp_path / name)
    (tmp_path / "b.txt").write_bytes(b"text")
    with pytest.warns(UserWarning, match="1 of 2 files could not be read"):
        assert documents(tmp_path, glob="*") == ["text"]


@pytest.mark.parametrize("ending, kind", [(".gz", "gzip"), (".xz", "xz"), (".bz2", "bzip2"), (".zst", "Zstandard")])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a"])
def test_a_compressed_file_without_its_ending_is_named(tmp_path, name, ending, kind) -> None:
    (tmp_path / name).write_bytes(PACK[ending](LINES))
    with pytest.raises(DatasetError, match=rf"{name}: {kind} data, which its name does not say; must be one of text"):
        documents(tmp_path / name)
