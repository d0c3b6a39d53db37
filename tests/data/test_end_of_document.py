"""The token that ends documents: chosen once, declared before guessed, recorded with the data, used by all."""

from __future__ import annotations

import json

import pytest

from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.data import (
    CorpusReader,
    DatasetError,
    EndOfDocument,
    IndexedDataset,
    IndexedDatasetWriter,
    end_of_document,
    load_tokenizer,
    open_tokenizer,
    read_facts,
)
from megasparse.data.build import build_data
from megasparse.data.facts import recorded_end_of_document
from megasparse.data.preprocess import preprocess

OWN = "<\uff5cend\u2581of\u2581sentence\uff5c>"


@pytest.fixture
def tokenizer_file(tmp_path):
    """Makes a byte-level tokenizer.json with these special tokens, and then these ordinary ones."""
    tokenizers = pytest.importorskip("tokenizers")

    def make(*special, ordinary=(), name="tokenizer.json"):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator([], trainer)
        tokenizer.add_tokens(list(ordinary))
        tokenizer.save(str(tmp_path / name))
        return tmp_path / name

    return make


def write_data(folder, name, tokenizer):
    (folder / "text.txt").write_text("one document of text\n" * 100, encoding="utf-8")
    preprocess(CorpusReader([folder / "text.txt"]), tokenizer, folder / name)
    return str(folder / name)


def config(path=None, train=(), valid=None, kind="huggingface") -> RunConfig:
    data = {"train": [{"path": prefix} for prefix in train] or None, "tokenizer": kind}
    if path is not None:
        data["tokenizer_path"] = str(path)
    if valid is not None:
        data["valid"] = [{"path": prefix} for prefix in valid]
    return RunConfig.model_validate({"run": {"name": "x"}, "model": {"seq_length": 16}, "data": data})


def test_a_choice_made_in_preprocessing_holds_for_training(tmp_path, tokenizer_file):
    path = tokenizer_file("<begin>", OWN)
    prefix = write_data(tmp_path, "data", load_tokenizer("huggingface", path, end_of_document=OWN))
    chosen = EndOfDocument(1, OWN)
    assert IndexedDataset(prefix).document(0)[-1] == 1
    assert read_facts(prefix).end_of_document == recorded_end_of_document([prefix]) == chosen
    run = config(path, [prefix])
    assert end_of_document(run) == chosen and open_tokenizer(run).end_of_document_id == 1
    with pytest.warns(UserWarning, match="cut inside a document"):
        assert build_data(run, 512)[0]
    # A run that has recorded the choice needs no data.
    assert end_of_document(config(path), chosen) == chosen
    assert open_tokenizer(config(path), chosen).end_of_document_id == 1
    with pytest.raises(ValueError, match="no end-of-document token"):
        open_tokenizer(config(path))


def test_of_two_end_tokens_the_one_of_the_data_is_taken(tmp_path, tokenizer_file):
    path = tokenizer_file("<|endoftext|>", "<|im_end|>")
    assert end_of_document(config(path)) == EndOfDocument(0, "<|endoftext|>")
    prefix = write_data(tmp_path, "data", load_tokenizer("huggingface", path, end_of_document="<|im_end|>"))
    assert end_of_document(config(path, [prefix])) == EndOfDocument(1, "<|im_end|>")
    other = write_data(tmp_path, "other", load_tokenizer("huggingface", path))
    with pytest.raises(DatasetError, match=r"data ends documents with id 1 .*im_end.*, .*other with id 0 .* must"):
        open_tokenizer(config(path, [prefix], valid=[other]))


def test_a_tokenizer_that_the_data_was_not_made_with(tmp_path, tokenizer_file):
    first = tokenizer_file("<pad>", "<|endoftext|>")
    prefix = write_data(tmp_path, "data", load_tokenizer("huggingface", first))
    other = tokenizer_file("<|endoftext|>", name="other.json")
    with pytest.raises(ConfigError, match=r"other\.json ends documents with id 0, the data with id 1 .* must"):
        open_tokenizer(config(other, [prefix]))
    with pytest.raises(ConfigError, match="data.tokenizer: bytes ends documents with id 256, the data with id 1"):
        open_tokenizer(config(None, [prefix], kind="bytes"))


def test_a_tokenizer_of_another_file_with_the_same_end(tmp_path, tokenizer_file):
    first, other = (tokenizer_file("<|endoftext|>", *more, name=f"{len(more)}.json") for more in ((), ("<pad>",)))
    made = write_data(tmp_path, "made", load_tokenizer("huggingface", first))
    assert open_tokenizer(config(first, [made])) and open_tokenizer(config(None, [made], kind=None)) is None
    told = r"data\.tokenizer: .*1\.json .*made, which was made with huggingface:0\.json .*; must be that one"
    for run in (config(other, [made]), config(other, [], valid=[made])):
        with pytest.raises(ConfigError, match=told):
            open_tokenizer(run)
        # What a run or a model folder has recorded needs no data.
        assert open_tokenizer(run, EndOfDocument(0, "<|endoftext|>"))


def test_one_tokenizer_in_two_formats_is_refused_with_both_files_and_the_way_out(tmp_path, tokenizer_file):
    path = tokenizer_file("<|endoftext|>")
    own = load_tokenizer("huggingface", path)
    made = write_data(tmp_path, "made", own)
    facts = tmp_path / "made.meta.json"
    of_model = {"tokenizer": "sentencepiece:tokenizer.model", "tokenizer_sha256": "0" * 64}
    facts.write_text(json.dumps(json.loads(facts.read_text()) | of_model), encoding="utf-8")
    told = (
        r"huggingface:tokenizer\.json \(SHA-256 \w+\) is not .*, which was made with sentencepiece:tokenizer\.model "
        r"\(SHA-256 0+\); must be that one, also where both are one tokenizer in two formats.*"
        r"\(data\.tokenizer=sentencepiece data\.tokenizer_path=<that tokenizer\.model>\), or null "
        rf"\(data\.tokenizer=null model\.vocab_size={own.vocab_size}\)$"
    )
    with pytest.raises(ConfigError, match=told):
        open_tokenizer(config(path, [made]))


def test_sources_of_different_tokenizers(tmp_path, tokenizer_file):
    first, other = (tokenizer_file("<|endoftext|>", *more, name=f"{len(more)}.json") for more in ((), ("<pad>",)))
    prefixes = [write_data(tmp_path, path.stem, load_tokenizer("huggingface", path)) for path in (first, other)]
    told = r"0 was made with huggingface:0\.json .*, .*1 with huggingface:1\.json .*; must be one tokenizer"
    for run in (config(first, prefixes), config(first, prefixes[:1], valid=prefixes[1:])):
        with pytest.raises(DatasetError, match=told):
            open_tokenizer(run)
    with pytest.raises(DatasetError, match=told):
        end_of_document(config(None, prefixes, kind=None))


def test_bytes_have_no_file_and_are_known_all_the_same(tmp_path, tokenizer_file):
    """A tokenizer of 256 letters and the end in the place of that of bytes."""
    path = tokenizer_file(*(f"<{number}>" for number in range(256)), "<|endoftext|>")
    own = load_tokenizer("huggingface", path)
    assert own.end_of_document_id == 256
    of_bytes, of_file = write_data(tmp_path, "bytes", load_tokenizer("bytes")), write_data(tmp_path, "file", own)
    assert open_tokenizer(config(None, [of_bytes], kind="bytes"))
    with pytest.raises(ConfigError, match=r"data\.tokenizer: bytes .*file, which was made with huggingface:"):
        open_tokenizer(config(None, [of_file], kind="bytes"))
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*bytes, which was made with bytes; must be that one"):
        open_tokenizer(config(path, [of_bytes]))


def test_data_that_does_not_know_the_file_of_its_tokenizer(tmp_path, tokenizer_file):
    path, other = (tokenizer_file("<|endoftext|>", *more, name=f"{len(more)}.json") for more in ((), ("<pad>",)))
    prefixes = [write_data(tmp_path, name, load_tokenizer("huggingface", path)) for name in ("old", "new")]
    facts = tmp_path / "old.meta.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"tokenizer_sha256": None}), encoding="utf-8")
    assert open_tokenizer(config(other, prefixes[:1])) and open_tokenizer(config(path, prefixes))
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*new, which"):
        open_tokenizer(config(other, prefixes))


def test_without_a_tokenizer_the_data_tells(tmp_path):
    prefix = write_data(tmp_path, "data", load_tokenizer("bytes"))
    run = config(None, [prefix], kind=None)
    assert open_tokenizer(run) is None and end_of_document(run) == EndOfDocument(256, None)
    assert end_of_document(config(None, kind=None)) is None


def test_data_of_other_programs_does_not_tell(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", "uint16") as writer:
        writer.add_document([1, 2, 3])
    assert read_facts(tmp_path / "data") is None
    assert end_of_document(config(None, [str(tmp_path / "data")], kind="bytes")) == EndOfDocument(256, None)
    assert open_tokenizer(config(None, [str(tmp_path / "missing")], kind="bytes")).end_of_document_id == 256


def test_facts_go_with_the_data_they_belong_to(tmp_path):
    prefix = write_data(tmp_path, "data", load_tokenizer("bytes"))
    assert read_facts(prefix, documents=1, tokens=2101)
    with pytest.raises(DatasetError, match=r"data\.meta\.json: 2101 tokens, the data has 5; must be of the same data"):
        read_facts(prefix, tokens=5)
    facts = (tmp_path / "data.meta.json").read_bytes()
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_document([1, 2, 3])
    assert read_facts(prefix) is None and IndexedDataset(prefix).facts is None
    # As another program would leave them.
    (tmp_path / "data.meta.json").write_bytes(facts)
    with pytest.raises(DatasetError, match=r"data\.meta\.json: 2101 tokens, the data has 3; must be of the same data"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": "other"}'])
def test_facts_that_cannot_be_read(tmp_path, content):
    (tmp_path / "data.meta.json").write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match=r"data\.meta\.json: "):
        read_facts(tmp_path / "data")


@pytest.mark.parametrize(
    "name, values, expected",
    [
        ("tokenizer_config.json", {"eos_token": "<end>"}, "<end>"),
        ("tokenizer_config.json", {"eos_token": {"content": "<end>", "lstrip": False}}, "<end>"),
        ("special_tokens_map.json", {"eos_token": "<end>"}, "<end>"),
        ("generation_config.json", {"eos_token_id": 2}, "<end>"),
        ("generation_config.json", {"eos_token_id": [2, 0]}, "<end>"),
        # Nothing that this tokenizer has: its own names count.
        ("tokenizer_config.json", {"eos_token": None}, "<eos>"),
        ("tokenizer_config.json", {"eos_token": "<other>"}, "<eos>"),
        ("generation_config.json", {"eos_token_id": 10**6}, "<eos>"),
    ],
)
def test_what_a_tokenizer_declares_comes_before_a_guess(tmp_path, tokenizer_file, name, values, expected):
    path = tokenizer_file("<pad>", "<eos>", "<end>", ordinary=["</s>"])
    (tmp_path / name).write_text(json.dumps(values), encoding="utf-8")
    assert load_tokenizer("huggingface", path).end_of_document == expected


def test_an_ordinary_token_of_a_usual_name_does_not_end_documents(tokenizer_file):
    path = tokenizer_file("<pad>", "<eos>", ordinary=["</s>"])
    assert load_tokenizer("huggingface", path).end_of_document == "<eos>"
    only = tokenizer_file("<pad>", ordinary=["</s>"])
    assert load_tokenizer("huggingface", only).end_of_document == "</s>"


def test_a_declaration_that_cannot_be_read_is_named(tmp_path, tokenizer_file):
    path = tokenizer_file("<eos>")
    (tmp_path / "tokenizer_config.json").write_text("[", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not a JSON object"):
        load_tokenizer("huggingface", path)


def test_the_end_piece_of_a_sentencepiece_model(tmp_path, python_sources):
    import sentencepiece

    lines = (python_sources / "corpus.py").read_text(encoding="utf-8").split("\n")
    prefix = str(tmp_path / "m")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=prefix,
        vocab_size=300,
        eos_id=-1,
        user_defined_symbols=["</s>"],
        control_symbols=["<eos>", "<end>"],
        minloglevel=2,
    )
    assert load_tokenizer("sentencepiece", prefix + ".model").end_of_document == "<eos>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}', encoding="utf-8")
    assert load_tokenizer("sentencepiece", prefix + ".model").end_of_document == "<end>"


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_a_text_that_spells_the_end_piece_of_a_sentencepiece_model(tmp_path, python_sources, dummy_prefix):
    import sentencepiece

    lines = (python_sources / "corpus.py").read_text(encoding="utf-8").split("\n")
    prefix = str(tmp_path / "m")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=prefix,
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        eos_id=-1,
        # Texts give these pieces, unlike those of `control_symbols`.
        user_defined_symbols=["<|endoftext|>"],
        minloglevel=2,
    )
    tokenizer = load_tokenizer("sentencepiece", prefix + ".model")
    assert tokenizer.end_of_document == "<|endoftext|>"
    for text in ("<|endoftext|>", "a<|endoftext|><|endoftext|> page", "no <|end", "about <|endoftext|>"):
        ids = tokenizer.encode(text)
        assert tokenizer.end_of_document_id not in ids
        assert tokenizer.decode([*ids, tokenizer.end_of_document_id]) == text


def test_the_tool_says_how_documents_end(tmp_path, run_tool, tokenizer_file):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    arguments = ("--input", tmp_path / "a.txt", "--output-prefix", tmp_path / "out", "--tokenizer")
    done = run_tool("preprocess_data", *arguments, "bytes")
    assert done.returncode == 0 and "out: documents end with id 256\n" in done.stdout, done.stderr
    own = ("huggingface", "--tokenizer-path", tokenizer_file(OWN), "--end-of-document", OWN, "--overwrite")
    done = run_tool("preprocess_data", *arguments, *own)
    assert done.returncode == 0 and "documents end with id 0 (" in done.stdout, done.stderr
    assert read_facts(tmp_path / "out").end_of_document.piece == OWN


def test_a_locale_that_is_not_utf_8_changes_nothing(tmp_path, run_tool, tokenizer_file, monkeypatch):
    path = tokenizer_file(OWN)
    (tmp_path / "é.jsonl").write_text('{"中": "漢字 é"}', encoding="utf-8")
    arguments = (
        "--input",
        tmp_path / "é.jsonl",
        "--jsonl-key",
        "中",
        "--tokenizer",
        "huggingface",
        "--tokenizer-path",
        path,
    )
    arguments = (*arguments, "--end-of-document", OWN, "--output-prefix")
    assert run_tool("preprocess_data", *arguments, tmp_path / "usual").returncode == 0
    # The C locale stands for all that are not UTF-8; the other two switch Python's own remedies off.
    for name, value in {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}.items():
        monkeypatch.setenv(name, value)
    done = run_tool("preprocess_data", *arguments, tmp_path / "other")
    assert done.returncode == 0 and "documents end with id 0 (<?end?of" in done.stdout, done.stderr
    for ending in (".bin", ".idx", ".meta.json"):
        assert (tmp_path / f"other{ending}").read_bytes() == (tmp_path / f"usual{ending}").read_bytes()
