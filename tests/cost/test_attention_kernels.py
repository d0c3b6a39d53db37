"""Which kernel computes the attention of a run: errors and warnings before it starts, what plan and ledger say."""

from __future__ import annotations

import pytest

from megasparse.config.loader import ConfigError, load_config
from megasparse.cost.attention_kernels import attention_kernels, prepare_attention
from megasparse.kernels.hybrid_attention import cpu
from megasparse.training.plan import make_plan

SETTINGS = [
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_attention_heads=2",
    "model.seq_length=512",
    "model.vocab_size=64",
    "train.steps=40",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.precision=fp32",
    "sparsity.block_size=16",
    "sparsity.update_interval=3",
    "attention.stride=16",
]
PATTERNS = "local, strided, sparse, fixed"

pytestmark = pytest.mark.usefixtures("unmeasured")


def load(*overrides: str):
    return load_config([], [*SETTINGS, *overrides])


def warnings_of(plan: dict) -> list[str]:
    return [words for words in plan["warnings"] if "kernels.hybrid_attention" in words]


@pytest.fixture(autouse=True)
def _no_build(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "build_failure", lambda source: pytest.fail("a plan compiles nothing"))


@pytest.fixture
def compiler(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "no_compiler", lambda: None)


def test_the_plan_names_the_kernel(compiler) -> None:
    plan = make_plan(load(), 1, "cpu")
    assert plan["kernels"]["hybrid_attention"] == f"causal for full; cpu for {PATTERNS}"
    assert not warnings_of(plan)
    assert make_plan(load("kernels.hybrid_attention=cpu"), 1, "cpu")["kernels"]["hybrid_attention"] == "cpu"
    executed = {
        kernel: make_plan(load(f"kernels.hybrid_attention={kernel}"), 1, "cpu")["flops"]["executed"]
        for kernel in ("auto", "cpu", "reference")
    }
    assert executed["auto"] < executed["reference"] and executed["cpu"] < executed["reference"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_forced_kernel_that_cannot_run_stops_the_plan(device, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "no_compiler", lambda: "no C++ compiler found: g++")
    words = {"cpu": "no C.. compiler found", "cuda": "on cpu, not on cuda"}[device]
    with pytest.raises(ConfigError, match=f"^kernels.hybrid_attention: 'cpu' cannot run: .*{words}.*must be"):
        make_plan(load("kernels.hybrid_attention=cpu"), 1, device)


def test_triton_stops_the_plan_of_a_cpu(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = "^kernels.hybrid_attention: 'triton' cannot run: they run on cuda, not on cpu.*auto, reference, tiled"
    with pytest.raises(ConfigError, match=words):
        make_plan(load("kernels.hybrid_attention=triton"), 1, "cpu")


def test_a_missing_compiler_is_one_warning_otherwise(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "no_compiler", lambda: "no C++ compiler found: g++")
    plan = make_plan(load(), 1, "cpu")
    (warning,) = warnings_of(plan)
    assert "auto" in warning and "no C++ compiler found: g++" in warning
    assert plan["kernels"]["hybrid_attention"] == f"causal for full; tiled for {PATTERNS}"
    # No word where the kernel would not be used: short sequences, other devices, no patterns, another choice.
    for never in ("model.seq_length=32", "attention.phases={}", "kernels.hybrid_attention=tiled"):
        assert not warnings_of(make_plan(load(never), 1, "cpu")), never
    assert not warnings_of(make_plan(load(), 1, "cuda"))


def test_the_kernel_is_built_before_a_run_and_only_where_it_is_used(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(cpu, "build_failure", lambda source: asked.append(1) or "cc: exit status 1")
    assert not prepare_attention(load(), "cpu") and asked
    assert attention_kernels(load(), "cpu") == f"causal for full; tiled for {PATTERNS}"
    with pytest.raises(ConfigError, match="kernels.hybrid_attention: 'cpu' cannot run: cc: exit status 1"):
        prepare_attention(load("kernels.hybrid_attention=cpu"), "cpu")
    asked.clear()
    for never in ("model.seq_length=32", "attention.phases={}", "kernels.hybrid_attention=tiled"):
        assert prepare_attention(load(never), "cpu")
    assert prepare_attention(load(), "cuda") and not asked


def test_full_attention_with_documents_has_the_compiled_kernel_built(compiler, monkeypatch) -> None:
    masked = ["data.document_masking=true", "attention.phases={}"]
    plan = make_plan(load(*masked), 1, "cpu")
    assert plan["kernels"]["hybrid_attention"] == "cpu"
    asked = []
    monkeypatch.setattr(cpu, "build_failure", lambda source: asked.append(1))
    for words, built in ((masked, True), (masked[1:], False), ([*masked, "model.seq_length=127"], False)):
        assert prepare_attention(load(*words), "cpu") and bool(asked) == built, words
        asked.clear()


def test_values_of_the_setting_are_checked() -> None:
    with pytest.raises(ConfigError, match="kernels.hybrid_attention.*'auto', 'reference', 'tiled', 'cpu' or 'triton'"):
        load("kernels.hybrid_attention=fast")
