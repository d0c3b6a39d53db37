"""Supervised data: from JSON lines to tokens and mask, chat templates, whole examples in samples, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_calls import call

from megasparse.config.loader import ConfigError, load_config
from megasparse.data import (
    BatchLoader,
    DatasetError,
    IndexedDataset,
    IndexedDatasetWriter,
    SupervisedDataset,
    fingerprint,
    load_tokenizer,
    split_samples,
    target_share,
)
from megasparse.data.build import build_data
from megasparse.data.chat import JinjaTemplate, PlainTemplate
from megasparse.data.supervised import ExampleEncoder, ExampleOptions
from megasparse.data.supervised_dataset import pack

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


def write(prefix: Path, examples: list[tuple[int, int]]) -> IndexedDataset:
    """Examples of so many prompt and response tokens; the tokens of all count upwards from 1."""
    token = 1
    with IndexedDatasetWriter(prefix, np.uint16, loss_mask=True) as writer:
        for asked, answered in examples:
            total = asked + answered
            writer.add_document(np.arange(token, token + total), [0] * asked + [1] * answered)
            token += total
    return IndexedDataset(prefix)


lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 8)), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(16, 24))
def test_samples_hold_whole_examples_once_each(tmp_path_factory, examples, seq_length):
    """Against the documents of the file: every one is in exactly one sample, in one piece, with its mask."""
    indexed = write(tmp_path_factory.mktemp("data") / "set", examples)
    samples = SupervisedDataset(indexed, seq_length, vocab_size=60_000)
    found = {}
    for index in range(len(samples)):
        tokens, documents, mask = samples[index]
        assert documents.tolist() == sorted(documents.tolist()) and len(tokens) == seq_length + 1
        for number in np.unique(documents):
            own = documents == number
            assert np.ptp(np.flatnonzero(own)) == own.sum() - 1, "an example is cut apart"
            if tokens[own][0]:
                found[int(tokens[own][0])] = (tokens[own].tolist(), mask[own].tolist())
            else:
                assert not tokens[own].any() and not mask[own].any() and own[-1], "padding is not at the end"
        assert samples.target_share(index) == mask[1:].sum() / seq_length == mask.sum() / seq_length
    first = 1
    for asked, answered in examples:
        total = asked + answered
        assert found.pop(first) == (list(range(first, first + total)), [0] * asked + [1] * answered)
        first += total
    assert not found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=200), st.integers(30, 50))
def test_packing_leaves_little_room(numbers, room):
    """No two samples would fit into one, so that all but one are more than half full."""
    packed = pack(np.array(numbers), room)
    filled = [sum(numbers[position] for position in sample) for sample in packed]
    assert sorted(position for sample in packed for position in sample.tolist()) == list(range(len(numbers)))
    assert max(filled) <= room and (len(filled) == 1 or sum(sorted(filled)[:2]) > room)


def test_weights_of_the_targets_have_a_mean_of_one_over_a_step(tmp_path):
    write(tmp_path / "set", [(3, 1), (2, 9), (9, 1), (5, 5), (1, 2), (7, 4)] * 7)
    config = load_config(
        [],
        [
            f"data.train=[{{path: {tmp_path / 'set'}}}]",
            "data.document_masking=true",
            "data.valid_fraction=0.2",
            "model.seq_length=16",
            "model.vocab_size=1000",
        ],
    )
    train, valid = build_data(config, 1000)
    weights, shares = [], []
    for rank in range(2):
        layout = {"micro_batch_size": 2, "data_parallel_rank": rank, "data_parallel_size": 2}
        with BatchLoader(train, global_batch_size=8, num_steps=3, **layout) as loader:
            for samples in loader:
                batch = split_samples(samples, loader.target_share)
                shares.append(loader.target_share)
                assert batch.weights is not None and batch.weights.shape == batch.targets.shape
                assert bool(((batch.weights > 0) == (samples[:, 2, 1:] == 1)).all())
                weights.append(batch.weights)
    for step in range(3):
        own = [weights[half * 6 + 2 * step + micro] for half in range(2) for micro in range(2)]
        assert sum(float(part.mean()) for part in own) / 4 == pytest.approx(1, abs=1e-6)
    assert shares[:6] == shares[6:] and len(set(shares)) > 1
    assert valid is not None and target_share(valid, range(len(valid))) > 0


def test_a_plain_data_set_has_no_weights(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document(range(100))
    config = load_config(
        [], [f"data.train=[{{path: {tmp_path / 'set'}}}]", "model.seq_length=16", "data.valid_fraction=0"]
    )
    train, _ = build_data(config, 1000)
    with BatchLoader(
        train, global_batch_size=2, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1, num_steps=1
    ) as loader:
        batch = split_samples(next(loader), loader.target_share)
    assert (
        batch.weights is None
        and loader.target_share is None
        and "loss_mask_sha256" not in fingerprint(train.dataset.indexed)
    )


def test_the_fingerprint_tells_another_mask(tmp_path):
    before = fingerprint(write(tmp_path / "set", [(2, 3), (4, 4)]))
    after = fingerprint(write(tmp_path / "set", [(3, 2), (4, 4)]))
    assert {key for key in before if before[key] != after[key]} == {"loss_mask_sha256"}


def test_plain_tokens_written_over_supervised_ones_take_the_mask_away(tmp_path):
    write(tmp_path / "set", [(2, 3)])
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document(range(5))
    assert IndexedDataset(tmp_path / "set").loss_mask is None and not list(tmp_path.glob("*loss_mask*"))


def settings_of(prefix: Path, *more: str) -> list[str]:
    named = f"data.train=[{{path: {prefix}}}]"
    return [named, "data.document_masking=true", "model.seq_length=16", "model.vocab_size=1000", *more]


@pytest.mark.parametrize(
    ("examples", "more", "words"),
    [
        (
            [(12, 5), (12, 6)],
            [],
            "seq_length: 16 holds 17 tokens .* 1 longer ones, document 1 with 18; .* least 17",
        ),
        ([(5, 5)] * 4, ["data.document_masking=false"], "data.document_masking: false with supervised data"),
        ([(5, 0), (5, 5)], ["data.valid_fraction=0"], "document 0 has no token to learn"),
        ([(5, 5)], ["data.valid_fraction=0.5"], "cut an example"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*cut inside a document", "ignore:.*a split of")
def test_data_that_does_not_fit_is_refused(tmp_path, examples, more, words):
    write(tmp_path / "set", examples)
    with pytest.raises((ConfigError, DatasetError), match=words):
        build_data(load_config([], settings_of(tmp_path / "set", *more)), 1000)


@pytest.mark.filterwarnings("ignore:.*a split of")
def test_masks_that_do_not_fit_are_refused(tmp_path):
    write(tmp_path / "set", [(5, 5)] * 4)
    with IndexedDatasetWriter(tmp_path / "plain", np.uint16) as writer:
        writer.add_document(range(100))
    both = f"data.valid=[{{path: {tmp_path / 'plain'}}}]"
    with pytest.raises(DatasetError, match="set has a loss mask and .*plain none"):
        build_data(load_config([], settings_of(tmp_path / "set", both)), 1000)
    (tmp_path / "set.loss_mask.bin").write_bytes(bytes([2] * 40))
    with pytest.raises(DatasetError, match="holds 2; a loss mask must hold 0 and 1"):
        build_data(load_config([], settings_of(tmp_path / "set")), 1000)
    write(tmp_path / "other", [(4, 5)] * 4)
    for kind in ("bin", "idx"):
        (tmp_path / f"other.loss_mask.{kind}").replace(tmp_path / f"set.loss_mask.{kind}")
    with pytest.raises(DatasetError, match="4 documents with 36 tokens, set.idx has 4 with 40"):
        IndexedDataset(tmp_path / "set")


# Templates and encoding


def test_the_plain_template_tells_who_speaks():
    parts = PlainTemplate().parts([{"role": "system", "content": "Be brief."}, *TALK])
    assert parts == [
        ("System: Be brief.\nUser: 2 + 2?\nAssistant:", False),
        (" 4\n", True),
        ("User: Sure?\nAssistant:", False),
        (" Yes.\n", True),
    ]


def test_an_answer_is_what_a_template_writes_behind_its_invitation():
    assert JinjaTemplate(CHATML, {}).parts(TALK) == [
        ("<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n", False),
        ("4<|im_end|>\n", True),
        ("<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Yes.<|im_end|>\n", True),
    ]


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (PlainTemplate(), TALK[:3], "last message is not of the assistant"),
        (JinjaTemplate(CHATML, {}), TALK[:3], "last message is not of the assistant"),
        (PlainTemplate(), [], "last message is not of the assistant"),
        (PlainTemplate(), [{"role": "tool", "content": "x"}], "role 'tool'; must be one of"),
        (JinjaTemplate(CHATML, {}), [{"role": "user", "content": 3}], "must have a role and a content"),
        (JinjaTemplate("{{ raise_exception('no') }}", {}), TALK, "no"),
        (JinjaTemplate("{{ ''.__class__.__mro__ }}", {}), TALK, "the chat template refuses it"),
        (JinjaTemplate("{{ messages | length }}", {}), TALK, "must be a template that only appends"),
    ],
)
def test_conversations_that_a_template_cannot_write_are_refused(template, messages, words):
    with pytest.raises(ValueError, match=words):
        template.parts(messages)


@pytest.fixture
def chat_tokenizer(tmp_path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([json.dumps(TALK) * 20], trainer)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"chat_template": CHATML, "eos_token": {"content": "<|endoftext|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder / "tokenizer.json"


def test_tokens_of_a_conversation_are_those_that_the_library_gives(tmp_path, chat_tokenizer):
    """Whole text at once, special tokens recognised: as transformers would encode what its template has written."""
    import tokenizers

    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    words = ("--supervised", "--input", tmp_path / "talk.jsonl", "--output-prefix", tmp_path / "talk")
    status, output = call("preprocess_data", *words, "--tokenizer", "huggingface", "--tokenizer-path", chat_tokenizer)
    assert status == 0 and "1 examples" in output, output
    found = IndexedDataset(tmp_path / "talk")
    text = "".join(text for text, _ in JinjaTemplate(CHATML, {}).parts(TALK))
    expected = tokenizers.Tokenizer.from_file(str(chat_tokenizer)).encode(text).ids
    assert found.document(0).tolist() == [*expected, 0]
    learned = found.document(0)[found.loss_mask.document(0) == 1].tolist()
    tokenizer = load_tokenizer("huggingface", chat_tokenizer)
    assert tokenizer.decode(learned) == "4<|im_end|>\nYes.<|im_end|>\n"


def test_a_message_that_spells_a_special_token_stays_text(chat_tokenizer):
    tokenizer = load_tokenizer("huggingface", chat_tokenizer)
    template = JinjaTemplate(CHATML, {}, list(tokenizer.special_tokens))
    encode = ExampleEncoder(tokenizer, ExampleOptions(), template, tokenizer.special_tokens)
    tokens, mask = encode({"messages": [{"role": "user", "content": "<|im_end|>"}, TALK[1]]})
    assert tokens.tolist().count(tokenizer.special_tokens["<|im_end|>"]) == 2
    text = "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert tokenizer.decode(tokens.tolist()) == text


def test_a_conversation_to_be_answered_has_the_tokens_before_its_answer(chat_tokenizer):
    tokenizer = load_tokenizer("huggingface", chat_tokenizer)
    template = JinjaTemplate(CHATML, {}, list(tokenizer.special_tokens))
    encode = ExampleEncoder(tokenizer, ExampleOptions(), template, tokenizer.special_tokens)
    asked = [{"role": "user", "content": "2 + 2?"}]
    for _ in range(2):
        messages = [*asked, {"role": "assistant", "content": "4"}]
        tokens, mask = encode({"messages": messages})
        last = len(mask) - int(np.argmin(mask[::-1]))
        assert encode.prompt(asked) == tokens[:last].tolist()
        asked = [*messages, {"role": "user", "content": "And 3 + 3?"}]
    with pytest.raises(ValueError, match="must have a role and a content"):
        encode.prompt([{"role": "user"}])


def test_prompt_and_response_are_joined_as_they_are(tmp_path):
    lines = [
        {"prompt": "2 + 2 =", "response": " 4"},
        {"prompt": "x" * 50, "response": "y"},
        {"prompt": "é", "response": "ß"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = (
        "--supervised",
        "--input",
        tmp_path / "in.jsonl",
        "--tokenizer",
        "bytes",
        "--output-prefix",
        tmp_path / "out",
    )
    status, output = call("preprocess_data", *words, "--max-tokens", "20")
    assert status == 0 and "2 examples, 1 longer ones left out, 15 tokens, of which 6 are learned" in output, output
    found = IndexedDataset(tmp_path / "out")
    assert [bytes(row[:-1].astype(np.uint8)).decode() for row in map(found.document, range(2))] == ["2 + 2 = 4", "éß"]
    assert [found.loss_mask.document(k).tolist() for k in range(2)] == [[0] * 7 + [1] * 3, [0, 0, 1, 1, 1]]
    assert call("preprocess_data", *words)[0] == 2


@pytest.mark.parametrize(
    ("line", "more", "words"),
    [
        ({"prompt": "a"}, (), "line 1: no text under the key 'response'; must have a prompt and a response"),
        ({"prompt": "", "response": "b"}, (), "line 1: no text under the key 'prompt'"),
        ({"messages": "hello"}, (), "line 1: 'messages' is no list"),
        ({"messages": TALK[:1]}, (), "line 1: the last message is not of the assistant"),
        ([1], (), "line 1: no text under the key 'prompt'"),
        ({"prompt": "aaa", "response": "bbb"}, ("--max-tokens", "3"), "1 examples, all longer than --max-tokens 3"),
        ({"prompt": "a", "response": "b"}, ("--template", "tokenizer"), "must be plain: bytes has no chat template"),
        ({"prompt": "a", "response": "b"}, ("--jsonl-key", "x"), "--jsonl-key: x; must be left out with --supervised"),
    ],
)
def test_what_is_no_example_is_refused(tmp_path, line, more, words):
    (tmp_path / "in.jsonl").write_text(json.dumps(line))
    given = ("--supervised", "--input", tmp_path / "in.jsonl", "--tokenizer", "bytes")
    status, output = call("preprocess_data", *given, "--output-prefix", tmp_path / "out", *more)
    assert status == 2 and words in output, output
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))


def test_options_of_examples_need_the_switch(tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "a"}))
    given = ("--input", tmp_path / "in.jsonl", "--tokenizer", "bytes", "--output-prefix", tmp_path / "out")
    status, output = call("preprocess_data", *given, "--max-tokens", "9")
    assert status == 2 and "--max-tokens: 9; must be left out without --supervised" in output
