"""Reading documents: every rule, every kind of file, segments, and unusable inputs."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasparse.data import CorpusOptions, CorpusReader, DatasetError
from megasparse.data import corpus as corpus_module
from megasparse.data import segments as segments_module
from megasparse.data.segments import SEGMENT_CHARACTERS
from megasparse.data.text_files import decoded


def documents(path, *options, **settings):
    return list(CorpusReader([path], CorpusOptions(*options, **settings)).documents())


def write(path, text):
    path.write_bytes(text.encode("utf-8"))
    return path


TEXT = "one\r\ntwo \u2028 still\n\n\nthree\n \n---\nfour\n---\n---\nfive"


@pytest.mark.parametrize(
    "options, expected",
    [
        (("file",), [TEXT]),
        (("line",), ["one", "two \u2028 still", "three", "---", "four", "---", "---", "five"]),
        (("blank-line",), ["one\r\ntwo \u2028 still\n", "three\n", "---\nfour\n---\n---\nfive"]),
        (("separator", "---"), ["one\r\ntwo \u2028 still\n\n\nthree\n \n", "four\n", "five"]),
    ],
)
@pytest.mark.parametrize("suffix, opener", [(".txt", open), (".txt.gz", gzip.open), (".txt.xz", lzma.open)])
@pytest.mark.parametrize("read_characters", [1, 7, 2**20])
def test_document_rules(tmp_path, monkeypatch, options, expected, suffix, opener, read_characters):
    monkeypatch.setattr(corpus_module, "READ_CHARACTERS", read_characters)
    path = tmp_path / f"file{suffix}"
    with opener(path, "wb") as file:
        file.write(TEXT.encode("utf-8"))
    assert documents(path, *options) == expected


def test_wikitext_rule(tmp_path):
    first = " \n = One = \n \n = = Section = = \n text\n = not after a blank line = \n \n"
    path = write(tmp_path / "wiki.txt", first + " = Two = \n \n more\n")
    assert documents(path, "wikitext") == [first, " = Two = \n \n more\n"]


def test_wikitext_2_articles(wikitext_valid):
    articles = documents(wikitext_valid, "wikitext")
    assert len(articles) == 60
    assert "".join(articles) == wikitext_valid.read_bytes().decode("utf-8")
    assert articles[0].strip().startswith("= Homarus gammarus =")


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("ab é🙂\n\t"), max_size=400), st.integers(3, 40), st.integers(1, 50))
def test_segments_are_short_and_add_up(tmp_path_factory, text, limit, read_characters):
    path = write(tmp_path_factory.mktemp("corpus") / "file.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments_module, "SEGMENT_CHARACTERS", limit)
        patch.setattr(corpus_module, "READ_CHARACTERS", read_characters)
        segments = list(CorpusReader([path]).segments())
        patch.setattr(corpus_module, "READ_CHARACTERS", 2**20)
        # Cuts depend on the document alone, not on how it was read.
        assert list(CorpusReader([path]).segments()) == segments
    assert "".join(segment.text for segment in segments) == text
    assert all(len(segment.text) <= limit for segment in segments)
    assert [segment.ends_document for segment in segments] == [False] * (len(segments) - 1) + [True] * bool(segments)


@pytest.mark.parametrize(
    "filler, expected", [("word word\n", "\n"), ("ab\n\n", "\n"), ("word ", "d"), ("x", "x"), ("\n\n\n", "\n")]
)
def test_where_segments_are_cut(tmp_path, filler, expected):
    text = filler * (3 * SEGMENT_CHARACTERS // len(filler))
    segments = list(CorpusReader([write(tmp_path / "file.txt", text)]).segments())
    assert len(segments) >= 3
    assert all(segment.text[-1] == expected for segment in segments[:-1])
    assert min(len(segment.text) for segment in segments[:-1]) > SEGMENT_CHARACTERS - 20


def test_segments_are_cut_between_paragraph_lines_rather_than_paragraphs(tmp_path):
    text = "one line\nand another\n\n" * 3000
    segments = list(CorpusReader([write(tmp_path / "file.txt", text)]).segments())
    assert len(segments) > 3 and all(segment.text.endswith("one line\n") for segment in segments[:-1])


def test_jsonl(tmp_path):
    rows = [{"text": "a\nb", "n": 1}, {"text": ""}, {"text": "é\u2028"}]
    path = write(tmp_path / "set.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert documents(path) == ["a\nb", "é\u2028"]
    write(tmp_path / "other.jsonl", '{"content": "x"}')
    assert documents(tmp_path / "other.jsonl", jsonl_key="content") == ["x"]
    packed = tmp_path / "set.jsonl.xz"
    packed.write_bytes(lzma.compress(path.read_bytes()))
    assert documents(packed) == ["a\nb", "é\u2028"]
    (tmp_path / "other.jsonl").unlink()
    assert documents(tmp_path, glob="*.jsonl*") == ["a\nb", "é\u2028"] * 2


@pytest.mark.parametrize(
    "line, message",
    [
        ("{bad", "line 3: not JSON"),
        ('{"body": "x"}', "line 3: no text under the key 'text'"),
        ('{"text": 5}', "line 3: no text"),
        ("[1]", "line 3: no text"),
        ('{"text": "\\ud800"}', "line 3: the text is not valid Unicode"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, line, message):
    path = write(tmp_path / "set.jsonl", '{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(DatasetError, match=rf"set\.jsonl, {message}"):
        documents(path)


def test_folder(tmp_path):
    for name, content in {"b.py": "B", "a/z.py": "Z\n", "a/empty.py": "", "c.txt": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, content)
    reader = CorpusReader([tmp_path], CorpusOptions("line", glob="*.py"))
    assert list(reader.documents()) == ["Z\n", "B"]
    assert reader.total_bytes == reader.bytes_read == 3
    (tmp_path / "broken.py").write_bytes(b"ok \xff")
    (tmp_path / "cut.py.gz").write_bytes(gzip.compress(b"text" * 100)[:-20])
    reader = CorpusReader([tmp_path], CorpusOptions(glob="*.py*"))
    with pytest.warns(UserWarning, match="2 of 5 files could not be read"):
        assert list(reader.documents()) == ["Z\n", "B"]
    assert reader.skipped_files == 2


def test_inputs_keep_their_order(tmp_path):
    paths = [write(tmp_path / name, name) for name in ("2.txt", "1.txt")]
    assert list(CorpusReader(paths).documents()) == ["2.txt", "1.txt"]
    assert [segment.text for segment in CorpusReader(paths).segments()] == ["2.txt", "1.txt"]


def test_named_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DatasetError, match=r"missing\.txt: no such file or folder"):
        CorpusReader([tmp_path / "missing.txt"])
    with pytest.raises(DatasetError, match=r"no file below this folder matches '\*\.txt'"):
        CorpusReader([tmp_path])
    with pytest.raises(DatasetError, match="no input files"):
        CorpusReader([])
    path = tmp_path / "latin.txt"
    path.write_bytes(b"abc\ncaf\xe9\n")
    with pytest.raises(DatasetError, match=r"latin\.txt: not UTF-8 text; byte 0xe9 at offset 7"):
        documents(path)
    path.write_bytes(b"cut \xf0\x9f")
    with pytest.raises(DatasetError, match="byte 0xf0 at offset 4"):
        documents(path)
    for name, content in (("x.gz", b"no gzip"), ("x.xz", b"no xz"), ("y.xz", lzma.compress(b"text" * 1000)[:-9])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DatasetError, match=rf"{name}: cannot be read"):
            documents(tmp_path / name)


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("read_characters", [1, 2**20])
@pytest.mark.parametrize("rule", ["file", "line", "wikitext"])
def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch, rule, read_characters):
    monkeypatch.setattr(corpus_module, "READ_CHARACTERS", read_characters)
    (tmp_path / "a.txt").write_bytes(MARK + b"one \xef\xbb\xbfword")
    (tmp_path / "b.txt").write_bytes(MARK)
    # Inside a text the character is an ordinary one.
    assert documents(tmp_path / "a.txt", rule) == documents(tmp_path) == ["one \ufeffword"]
    rows = b'{"text": "one"}\n' + MARK + b"\n" + MARK + b'{"text": "\xef\xbb\xbftwo"}\n'
    (tmp_path / "joined.jsonl").write_bytes(MARK + rows)
    assert documents(tmp_path / "joined.jsonl", rule) == ["one", "\ufefftwo"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_other_encodings_are_named(tmp_path, encoding, name):
    content = ("" if encoding in ("utf-16", "utf-32") else "\ufeff") + '{"text": "one"}\n'
    data = content.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    expected = encoding[:6].upper()
    with pytest.raises(DatasetError, match=rf"{name}: {expected} text, by its byte-order mark; must be UTF-8"):
        documents(tmp_path / name)


def test_the_time_of_one_huge_line_is_linear(tmp_path):
    # 512 and 2,048 blocks. Joining at each of them took 20 times as long for the longer line.
    seconds = []
    for blocks in (2**9, 2**11):
        content, best = b"x" * (blocks * 2**13), float("inf")
        for _ in range(5):
            # Of this process alone, as other work on the machine would disturb the ratio.
            began = time.process_time()
            (line,) = decoded(io.BytesIO(content), tmp_path, by_line=True, read_characters=2**13)
            best = min(best, time.process_time() - began)
        assert len(line) == len(content)
        seconds.append(best)
    assert seconds[1] < 10 * seconds[0], seconds


@pytest.mark.parametrize("options", [("page",), ("separator",), ("file", "---")])
def test_bad_options(options):
    with pytest.raises(ValueError, match="document_rule is"):
        CorpusOptions(*options)


def test_excluded_folders_and_files_are_passed_over(tmp_path):
    for name in ("kept.py", "site-packages/lib.py", "deep/tests/case.py", "deep/kept.py", "test_one.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = documents(tmp_path, glob="*.py", exclude=("site-packages", "tests", "test_*"))
    assert sorted(found) == ["deep/kept.py", "kept.py"]
