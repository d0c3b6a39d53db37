"""Our model inside lm-evaluation-harness: its numbers against our evaluator's, and against the harness's own model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import run_distributed
from small_models import model_with_weights_of, random_gpt2

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `eval`)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

import megasparse.evaluation.harness as adapter  # noqa: E402
from megasparse.config.loader import check_config  # noqa: E402
from megasparse.conversion.huggingface.importing import import_huggingface  # noqa: E402
from megasparse.data.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from megasparse.evaluation.continuations import last_word_task, multiple_choice_task  # noqa: E402
from megasparse.evaluation.inputs import read_jsonl  # noqa: E402
from megasparse.evaluation.scoring import Scorer  # noqa: E402
from megasparse.inference.trained import TrainedModel  # noqa: E402
from megasparse.parallel import CommunicationGroup  # noqa: E402

T = 32
PAIRS = [
    ("The river", " ran cold"), ("The river ", "ran"), ("", "days"), ("x" * 50, " end."), ("für ", "dich allein"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level pairs without merges: a token is a byte."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return random_gpt2(vocab_size=257, seq_length=T)


@pytest.fixture
def ours(reference, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> adapter.MegaSparseLM:
    tokenizer = load_tokenizer("huggingface", tokenizer_file)
    data = {"tokenizer": "huggingface", "tokenizer_path": str(tokenizer_file)}
    config = check_config({"model": {"seq_length": T}, "data": data})
    trained = TrainedModel(config, model_with_weights_of(reference), tokenizer, 7, "full", [])
    monkeypatch.setattr(adapter, "open_trained", lambda run, step=None: trained)
    return lm_eval.api.registry.get_model("megasparse").create_from_arg_string(
        "run=somewhere,precision=fp32", {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
    )


@pytest.fixture(scope="module")
def theirs(reference, tokenizer_file: Path):
    """The harness's own wrapper around the same weights."""
    pytest.importorskip("accelerate", reason="the harness's own model needs accelerate")
    from lm_eval.models.huggingface import HFLM

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    return HFLM(pretrained=reference, tokenizer=tokenizer, backend="causal", device="cpu", batch_size=2, max_length=T)


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=row) for row in arguments]


def test_likelihoods_are_those_of_the_harness_own_model(ours, theirs) -> None:
    asked = requests(*PAIRS)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)


def test_rolling_likelihoods_are_those_of_the_harness_own_model(ours, theirs) -> None:
    # Nothing periodic: where two windows hold the same tokens, the harness's cache takes one for the other.
    counted = "".join(f"{n} and " for n in range(30))
    texts = ["a", "The river ran cold.", counted, counted[:T], counted[: T + 1], counted[: 2 * T]]
    asked = requests(*((text,) for text in texts))
    assert ours.loglikelihood_rolling(asked) == pytest.approx(
        theirs.loglikelihood_rolling(asked, disable_tqdm=True), rel=1e-5
    )
    assert ours.loglikelihood_rolling(requests(("",), ("a",)))[0] == 0.0


@pytest.mark.parametrize("added", [False, True])
def test_a_model_with_a_begin_token_begins_as_the_harness_own_model(
    reference, tokenizer_file: Path, tmp_path: Path, added: bool
) -> None:
    """Where the tokenizer has a begin token, it stands before texts; where it adds it by itself, once more."""
    pytest.importorskip("accelerate", reason="the harness's own model needs accelerate")
    from lm_eval.models.huggingface import HFLM

    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    if added:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="A $A", special_tokens=[("A", 32)])
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="A", eos_token="<|endoftext|>")
    reference.save_pretrained(tmp_path / "theirs")
    whole.save_pretrained(tmp_path / "theirs")
    import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    ours = adapter.MegaSparseLM(str(tmp_path / "ours"), device="cpu", batch_size=2)
    theirs = HFLM(
        pretrained=reference, tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs"),
        backend="causal", device="cpu", batch_size=2, max_length=T,
    )  # fmt: skip
    assert ours.prefix_token_id == theirs.prefix_token_id == whole.bos_token_id != ours.eot_token_id
    counted = "".join(f"{n} and " for n in range(30))
    asked = requests(*((text,) for text in ("a", "The river ran cold.", counted)))
    assert ours.loglikelihood_rolling(asked) == pytest.approx(
        theirs.loglikelihood_rolling(asked, disable_tqdm=True), rel=1e-5
    )
    pairs = requests(*PAIRS)
    assert [value for value, _ in ours.loglikelihood(pairs, disable_tqdm=True)] == pytest.approx(
        [value for value, _ in theirs.loglikelihood(pairs, disable_tqdm=True)], rel=1e-5
    )


def test_greedy_texts_are_those_of_the_harness_own_model(ours, theirs) -> None:
    options = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    asked = requests(("The river", options), ("days", options), ("x" * 60, options))
    expected = theirs.generate_until(asked, disable_tqdm=True)
    assert any(expected) and ours.generate_until(asked) == expected


def test_texts_end_where_they_are_told(ours) -> None:
    whole = ours.generate_until(requests(("The river", {"max_gen_toks": 20})))[0]
    assert len(whole) > 4
    stop = whole[3]
    (short,) = ours.generate_until(requests(("The river", {"max_gen_toks": 20, "until": [stop, "nowhere"]})))
    assert short == whole[: whole.index(stop)]
    letter = next(letter for letter in whole if letter.isascii())
    ours._ends = (ours.eot_token_id, *ours._tokens.encode(letter))
    (ended,) = ours.generate_until(requests(("The river", {"max_gen_toks": 20})))
    assert ended == whole[: whole.index(letter)]
    ours._ends = (ours.eot_token_id,)
    (limited,) = ours.generate_until(requests(("The river", {"max_tokens": 2, "until": None})))
    assert whole.startswith(limited) and len(limited) <= 2
    sampled = {"max_gen_toks": 9, "do_sample": True, "temperature": 2.0, "top_k": 200}
    assert ours.generate_until(requests(("The river", sampled)) * 2) == 2 * [
        ours.generate_until(requests(("The river", sampled)))[0]
    ]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With the dummy prefix of Llama's, which drops the space before the first word of a text."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("the cat sat on the mat and the dog ran to the cat\n" * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "t"), vocab_size=300, byte_fallback=True,
        model_type="bpe", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return load_tokenizer("sentencepiece", folder / "t.model")


def test_the_space_behind_a_prompt_is_kept_and_characters_are_whole(ours, pieces, monkeypatch) -> None:
    """What is written is given here: only how it is read is of interest."""
    row = " sat on the mat and the dog ran to the cat"
    for tokenizer, prompt, written, until, wanted in (
        (pieces, "the cat", " sat on", None, " sat on"),
        (pieces, "the cat", 3 * row, [" cat"], row.removesuffix(" cat")),
        (pieces, "", " the cat", None, "the cat"),
        (ours._tokens, "kalt f", "ür", None, "ür"),
    ):
        ours._tokens = tokenizer
        start = tokenizer.encode(prompt)
        answer = iter(tokenizer.encode(prompt + written)[len(start) :])

        def given(model, prompt, wanted, answer=answer, **options):
            new = [token for _, token in zip(range(wanted), answer, strict=False)]
            return torch.cat((prompt, torch.tensor([new], dtype=torch.int64)), dim=1)

        monkeypatch.setattr(adapter, "generate", given)
        options = {"max_gen_toks": len(tokenizer.encode(prompt + written)) - len(start), "until": until}
        assert ours.generate_until(requests((prompt, options))) == [wanted], written


def test_a_task_of_the_harness_gives_the_numbers_of_our_evaluator(ours, tmp_path: Path) -> None:
    quiz = [
        {"context": f"{n} plus {n} is", "choices": [str(2 * n), "nothing at all", "ünklar"], "label": n % 3}
        for n in range(9)
    ]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    (tmp_path / "quiz.yaml").write_text(
        "task: tiny_quiz\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  cache_dir: {tmp_path}\n  data_files:\n    test: {tmp_path / 'quiz.jsonl'}\n"
        'doc_to_text: "{{context}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{label}}"\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n  - metric: acc_bytes\n"
    )
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(model=ours, tasks=["tiny_quiz"], task_manager=manager, bootstrap_iters=0)
    numbers = found["results"]["tiny_quiz"]
    tokenizer = ours._tokens
    task = multiple_choice_task(read_jsonl(str(tmp_path / "quiz.jsonl")), tokenizer, T)
    results = task.results(Scorer(ours._model).scores(task.windows))
    assert numbers["acc,none"] == results["accuracy"]
    assert numbers["acc_norm,none"] == results["accuracy_per_character"]
    assert numbers["acc_bytes,none"] == results["accuracy_per_byte"]
    assert found["config"]["model_step"] == 7


def test_last_words_are_the_likelihoods_of_the_harness(ours) -> None:
    task = last_word_task([("line 1", {"text": "the cat sat down."})], ours._tokens, T)
    ((value, greedy),) = ours.loglikelihood(requests(("the cat sat", " down.")), disable_tqdm=True)
    assert Scorer(ours._model).scores(task.windows)[0].tolist() == [value, float(greedy)]


def test_wrong_arguments_are_refused(ours, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="precision: fp8; must be one of fp32, bf16, fp16"):
        adapter.MegaSparseLM("x", precision="fp8", device="cpu")
    with pytest.raises(ValueError, match="has 33 tokens|33 tokens; must be 1 to 32"):
        ours.loglikelihood(requests(("a", "b" * 33)), disable_tqdm=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="nothing"):
        adapter.MegaSparseLM(str(tmp_path / "nothing"), device="cpu")


def texts_on(mesh) -> list[str]:
    own = {index: ["", "für", "", "drei", "\n"][index] for index in range(mesh.rank, 5, mesh.world_size)}
    return adapter.share_texts(own, 5, mesh.control)


def test_texts_of_all_ranks_reach_each() -> None:
    assert (
        adapter.share_texts({0: "a", 1: ""}, 2, CommunicationGroup()) == ["a", ""]
        and adapter.share_texts({}, 0, CommunicationGroup()) == []
    )
    assert run_distributed(texts_on, 2) == 2 * [["", "für", "", "drei", "\n"]]
