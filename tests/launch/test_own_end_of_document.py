"""The token that ends documents is chosen at preprocessing: run, samples, evaluation, exports and imports use it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from runs import REPOSITORY, command, run

from megasparse.checkpoint.model_folder import ModelFolder
from megasparse.conversion.huggingface.exporting import export_huggingface
from megasparse.conversion.huggingface.importing import import_huggingface
from megasparse.conversion.sources import open_source, write_source
from megasparse.data import EndOfDocument, IndexedDataset
from megasparse.evaluation.continuations import encode_pair
from megasparse.inference.sampling import sample_text
from megasparse.inference.trained import open_trained

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

OWN = "<\uff5cend\u2581of\u2581sentence\uff5c>"
SPECIAL = {
    "a name of its own": (["<\uff5cbegin\u2581of\u2581sentence\uff5c>", OWN], OWN),
    "the second of two": (["<|endoftext|>", "<|im_end|>"], "<|im_end|>"),
}
"""Special tokens of ids 0 and 1, and the one that is chosen, id 1."""


def write_tokenizer(path: Path, special: list[str]) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=special, initial_alphabet=alphabet, vocab_size=280, show_progress=False
    )
    model.train_from_iterator(["the sum of one and one is two"], trainer)
    model.save(str(path))


def check(folder: Path, chosen: str) -> None:
    """A run or a model folder ends its documents and texts with the chosen token, and begins with it."""
    trained = open_trained(folder)
    assert (trained.tokenizer.end_of_document_id, trained.tokenizer.end_of_document) == (1, chosen)
    assert trained.end_tokens in (None, (1,))
    assert encode_pair(trained.tokenizer, "", "one", trained.begin_token)[0] == [1]
    # A model whose likeliest token is the end everywhere ends its text at once.
    trained.model.final_norm.weight.data.zero_()
    trained.model.final_norm.bias.data.fill_(1.0)
    trained.model.head.weight.data.zero_()
    trained.model.head.weight.data[1] = 1.0
    text = sample_text(
        trained.model, trained.tokenizer, "one", 5, seed=0, temperature=0.0, end_tokens=trained.end_tokens
    )
    assert text == "one"


@pytest.mark.parametrize("case", SPECIAL)
def test_one_token_from_the_data_to_the_export_and_back(tmp_path: Path, case: str) -> None:
    special, chosen = SPECIAL[case]
    write_tokenizer(tmp_path / "own.json", special)
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": f"one and {n} " * 30}) + "\n" for n in range(40)))
    tokenizer = ["huggingface", "--tokenizer-path", str(tmp_path / "own.json"), "--end-of-document", chosen]
    preprocess = [
        sys.executable,
        str(REPOSITORY / "tools" / "preprocess_data.py"),
        "--input",
        str(tmp_path / "c.jsonl"),
    ]
    run([*preprocess, "--tokenizer", *tokenizer, "--output-prefix", str(tmp_path / "d")])
    assert IndexedDataset(tmp_path / "d").document(0)[-1] == 1
    settings = ["data.tokenizer=huggingface", f"data.tokenizer_path={tmp_path / 'own.json'}", "run.name=x"]
    run(command(tmp_path / "d", tmp_path, *settings, "train.stop_after=2", "train.valid_interval=0", ranks=1))
    folder = tmp_path / "x"
    assert json.loads((folder / "data.json").read_text())["end_of_document"] == {"id": 1, "piece": chosen}

    # From here on without the data.
    for path in tmp_path.glob("d.*"):
        path.unlink()
    check(folder, chosen)
    write_source(open_source(folder), tmp_path / "model")
    assert EndOfDocument.recorded_in(ModelFolder(tmp_path / "model").facts, "") == EndOfDocument(1, chosen)
    check(tmp_path / "model", chosen)
    for source, out in ((folder, "from-run"), (tmp_path / "model", "from-folder")):
        export_huggingface(open_source(source), tmp_path / out)
        generation = json.loads((tmp_path / out / "generation_config.json").read_text())
        assert generation["eos_token_id"] == generation["pad_token_id"] == 1
        assert json.loads((tmp_path / out / "config.json").read_text())["eos_token_id"] == 1
        assert json.loads((tmp_path / out / "tokenizer_config.json").read_text())["eos_token"] == chosen
    import_huggingface(tmp_path / "from-run", tmp_path / "again")
    check(tmp_path / "again", chosen)
    # Also where the files that declare it did not come along.
    for name in ("generation_config.json", "tokenizer_config.json"):
        (tmp_path / "from-folder" / name).unlink()
    values = json.loads((tmp_path / "from-folder" / "config.json").read_text())
    (tmp_path / "from-folder" / "config.json").write_text(json.dumps({**values, "eos_token_id": None}))
    import_huggingface(tmp_path / "from-folder", tmp_path / "bare")
    check(tmp_path / "bare", chosen)
