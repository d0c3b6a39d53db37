"""From files and words to a checked configuration: precedence, bases, errors that say what is allowed, round trips."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasparse.config.loader import (
    ConfigError,
    check_config,
    control_character,
    describe_fields,
    load_config,
    save_config,
    to_yaml,
)
from megasparse.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_precedence_is_defaults_base_file_later_file_overrides(tmp_path) -> None:
    write(tmp_path / "base.yaml", "train: {steps: 11, log_interval: 12, save_interval: 13, valid_interval: 14}\n")
    text = "base: base.yaml\ntrain: {log_interval: 22, save_interval: 23, valid_interval: 24}\n"
    main = write(tmp_path / "main.yaml", text)
    later = write(tmp_path / "later.yaml", "train: {save_interval: 33, valid_interval: 34}\n")
    config = load_config([main, later], ["train.valid_interval=40", "train.valid_interval=44"])
    train = config.train
    assert (train.steps, train.log_interval, train.save_interval, train.valid_interval) == (11, 22, 33, 44)
    assert train.keep_checkpoints == RunConfig().train.keep_checkpoints
    assert load_config([]) == RunConfig()


def test_base_lists_and_chains_are_relative_to_their_file(tmp_path) -> None:
    (tmp_path / "presets").mkdir()
    write(tmp_path / "presets" / "root.yaml", "run: {name: root, seed: 1}\nmodel: {num_layers: 3}\n")
    write(tmp_path / "presets" / "mst.yaml", "base: root.yaml\nrun: {name: mst}\n")
    write(tmp_path / "other.yaml", "sparsity: {density: 0.2}\nrun: {name: other}\n")
    main = write(tmp_path / "main.yaml", "base: [presets/mst.yaml, other.yaml]\nmodel: {hidden_size: 384}\n")
    config = load_config([main])
    assert (config.run.name, config.run.seed, config.model.num_layers) == ("other", 1, 3)
    assert (config.sparsity.density, config.model.hidden_size) == (0.2, 384)


def test_lists_replace_and_sections_merge(tmp_path) -> None:
    base = "sparsity: {groups: [{pattern: a}, {pattern: b}]}\nattention: {phases: {dense: local}}\n"
    write(tmp_path / "base.yaml", base)
    text = "base: base.yaml\nsparsity: {groups: [{pattern: c}]}\nattention: {phases: {warm_up: fixed}}\n"
    config = load_config([write(tmp_path / "main.yaml", text)])
    assert [group.pattern for group in config.sparsity.groups] == ["c"]
    assert config.attention.phases == {"dense": "local", "warm_up": "fixed"}


def test_numbers_and_nulls_of_overrides() -> None:
    config = load_config([], ["optimizer.lr=1e-4", "sparsity.points=[[0,1],[0.5,0.25]]", "model.vocab_size=null"])
    assert config.optimizer.lr == 1e-4
    assert config.sparsity.points == [(0.0, 1.0), (0.5, 0.25)]
    assert config.model.vocab_size is None


def test_bases_that_build_on_themselves_are_refused(tmp_path) -> None:
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match=r"base: .*a\.yaml builds on itself, by way of a\.yaml -> b\.yaml"):
        load_config([tmp_path / "a.yaml"])
    # The same base by two ways is no cycle.
    write(tmp_path / "root.yaml", "run: {seed: 7}\n")
    write(tmp_path / "b.yaml", "base: root.yaml\n")
    assert load_config([write(tmp_path / "a.yaml", "base: [root.yaml, b.yaml]\n")]).run.seed == 7


@pytest.mark.parametrize("content", ["base: 3\n", "base: null\n", "base: [a.yaml, 3]\n", "base: {a: b}\n"])
def test_a_base_that_is_no_file_name_is_refused(tmp_path, content) -> None:
    write(tmp_path / "a.yaml", "run: {seed: 7}\n")
    with pytest.raises(ConfigError, match="base: .* must be a file name or a list of file names"):
        load_config([write(tmp_path / "main.yaml", content)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1\n- 2\n", "must hold sections"),
        ("train: [1\n", "not readable as YAML"),
        ("base: nowhere.yaml\n", "no such file: .*nowhere.yaml"),
        ("train: 3\n", "train: 3 is not allowed"),
        ("run: {name: !!binary aGVsbG8=}\n", "settings must be text, numbers"),
    ],
)
def test_unreadable_files_are_named(tmp_path, content, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([write(tmp_path / "main.yaml", content)])


@pytest.mark.parametrize(
    "content", ["hunter2\n", "a: [hunter2\n", "root:x:0:0:hunter2:/bin/sh\n", "%hunter2\n", "- hunter2\n"]
)
def test_nothing_of_a_base_that_is_no_configuration_is_repeated(tmp_path, content) -> None:
    write(tmp_path / "keys", content)
    with pytest.raises(ConfigError, match="keys") as refused:
        load_config([write(tmp_path / "main.yaml", "base: keys\n")])
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "value", ["${oc.env:HOME}", "a-${oc.env:HOME,none}", "${oc.decode:${oc.env:HOME}}", "${${run.folder}:HOME}"]
)
def test_a_value_reads_nothing_but_other_settings(tmp_path, monkeypatch, value) -> None:
    monkeypatch.setenv("HOME", "/hunter2")
    path = write(tmp_path / "main.yaml", f"train: {{sample_prompt: '{value}'}}\nrun: {{folder: oc.env}}\n")
    with pytest.raises(ConfigError, match=r"train.sample_prompt: .*may only name another setting") as refused:
        load_config([path])
    assert "hunter2" not in str(refused.value)
    assert (
        load_config(
            [], ["run.name=a-${run.seed}-${ sparsity.block_size }", "run.seed=7", "sparsity.block_size=8"]
        ).run.name
        == "a-7-8"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"run": {"folder": "runs\n#SBATCH --wrap=id"}},
        {"run": {"folder": "runs\u2028"}},
        {"run": {"name": "run\n"}},
        {"data": {"train": [{"path": "a\x1b[2J"}]}},
        {"train": {"init_from": "a\r", "trackers": []}},
        {"deepspeed": {"extra": {"a\nb": 1}}},
    ],
)
def test_control_characters_are_refused_everywhere_but_in_what_a_model_reads(wrong) -> None:
    with pytest.raises(ConfigError, match="holds the control character"):
        check_config(wrong)
    assert check_config({"train": {"sample_prompt": "Question:\n"}}).train.sample_prompt == "Question:\n"


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_deep_nesting_is_refused_in_a_sentence(tmp_path, opening) -> None:
    closing = {"[": "]", "{a: ": "}", "- ": ""}[opening]
    text = f"train: {{trackers: {20000 * opening}1{20000 * closing}}}" if closing else f"train:\n  {20000 * opening}1"
    for paths, words in (
        ([write(tmp_path / "deep.yaml", text)], []),
        ([], [f"train.trackers={2000 * '['}{2000 * ']'}"]),
    ):
        with pytest.raises(ConfigError, match="nested too deeply|not readable as YAML"):
            load_config(paths, words)
    nested: list = []
    for _ in range(20000):
        nested = [nested]
    with pytest.raises(ConfigError, match="nested too deeply"):
        check_config({"train": {"trackers": nested}})


def test_missing_files_and_folders_are_refused(tmp_path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="no such file"):
            load_config([path])


@pytest.mark.parametrize("word", ["train.steps", "=3", "--train.steps=3", ""])
def test_words_that_are_no_overrides_are_refused(word) -> None:
    with pytest.raises(ConfigError, match="an override must read section.field=value"):
        load_config([], [word])


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trian.steps=3", ["trian: unknown setting", "did you mean train?", "attention, data"]),
        ("train.step=3", ["train.step: unknown setting", "did you mean steps?", "must be ", "micro_batch_size"]),
        ("sparsity.groups=[{patern: a}]", ["sparsity.groups.0.patern: unknown setting", "did you mean pattern?"]),
        ("data.train=[{paht: a}]", ["data.train.0.paht: unknown setting", "did you mean path?"]),
        ("train.steps=many", ["train.steps", '"many" is not allowed', "integer"]),
        ("train.steps=1.5", ["train.steps", "1.5 is not allowed", "integer"]),
        ("train.steps='3'", ["train.steps", '"3" is not allowed', "integer"]),
        ("train.steps=true", ["train.steps", "true is not allowed", "integer"]),
        ("train.steps=0", ["train.steps", "0 is not allowed", "greater than or equal to 1"]),
        ("model.bias=1", ["model.bias", "1 is not allowed", "boolean"]),
        ("run.name=5", ["run.name", "5 is not allowed", "string"]),
        ("run.name=a/b", ["run.name", '"a/b" is not allowed', "pattern"]),
        ("optimizer.lr=0", ["optimizer.lr", "0 is not allowed", "greater than 0"]),
        ("optimizer.lr=.inf", ["optimizer.lr", "is not allowed", "finite"]),
        ("optimizer.gradient_clipping=.nan", ["optimizer.gradient_clipping", "is not allowed", "finite"]),
        ("sparsity.points=[[0,1],[.nan,0.5]]", ["sparsity.points.1.0", "is not allowed", "finite"]),
        ("optimizer.beta1=1.0", ["optimizer.beta1", "1.0 is not allowed", "less than 1"]),
        ("sparsity.density=0", ["sparsity.density", "0 is not allowed", "greater than 0"]),
        ("sparsity.density=1.1", ["sparsity.density", "1.1 is not allowed", "less than or equal to 1"]),
        ("sparsity.drop_fraction=1.0", ["sparsity.drop_fraction", "1.0 is not allowed", "less than 1"]),
        ("train.precision=fp8", ["train.precision", '"fp8" is not allowed', "must be one of 'fp32', 'bf16' or 'fp16'"]),
        ("deepspeed.zero_stage=4", ["deepspeed.zero_stage", "4 is not allowed", "must be one of 0, 1, 2 or 3"]),
        ("sparsity.groups=[{density: 0.5}]", ["sparsity.groups.0.pattern", "required"]),
        ("data.train=[]", ["data.train", "is not allowed", "at least 1 item"]),
        ("data.valid=[]", ["data.valid", "is not allowed", "at least 1 item"]),
        ("model.num_attention_heads=7", ["model.num_attention_heads: 7 does not divide", "must be one of [1, 2, 3"]),
        ("model.num_key_value_heads=5", ["model.num_key_value_heads: 5", "must be one of [1, 2, 3, 4, 6, 12]"]),
        ("sparsity.warmup_end=0.8", ["sparsity.warmup_end, restoration_start", "must not decrease", "0.8"]),
        ("sparsity.points=[[0,1]]", ["sparsity.points", "at least two"]),
        ("sparsity.points=[[0.1,1],[0.5,1]]", ["sparsity.points", "rise strictly from 0"]),
        ("sparsity.points=[[0,1],[0.5,1],[0.5,0.5]]", ["sparsity.points", "rise strictly from 0"]),
        ("sparsity.points=[[0,1],[1.5,0.5]]", ["sparsity.points", "to at most 1"]),
        ("sparsity.points=[[0,1],[0.5,0]]", ["sparsity.points", "density 0.0 is outside (0, 1]"]),
        ("attention.windows=[{start: 0.5, end: 0.5, pattern: local}]", ["attention.windows.0.start", "0.5", "below"]),
        ("attention.overrides=[{every: 2, layers: [1], pattern: local}]", ["overrides.0.every: 2", "layers [1]"]),
        ("attention.overrides=[{first: 2, pattern: local}]", ["attention.overrides.0.first: 2 needs every"]),
        ("attention.overrides=[{heads: 1, pattern: local}]", ["attention.overrides.0.heads: 1 ", "less than 1"]),
        ("attention.stride_offsets=[128]", ["attention.stride_offsets: 128", "below stride 128", "0 to 127"]),
        ("attention.stride_offsets=even", ['attention.stride_offsets: "even"', "'none'", "'spread'"]),
        ("attention.phases={dense: diagonal}", ["attention.phases.dense", "diagonal", "one of 'full', 'local'"]),
        ("attention.phases={wet: full}", ["attention.phases.wet", "must be one of 'warm_up', 'ultra_sparse'"]),
    ],
)  # fmt: skip
def test_errors_name_field_value_and_possible_values(override, parts) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], [override])
    for part in parts:
        assert part in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "old", "new"),
    [
        ("sparsity.unit=32", "sparsity.unit", "sparsity.block_size"),
        ("sparsity.unit_step_counts=true", "sparsity.unit_step_counts", "sparsity.per_weight_step_counts"),
        ("sparsity.groups=[{pattern: head, unit: 1}]", "sparsity.groups.0.unit", "sparsity.groups.block_size"),
        ("train.tensorboard=false", "train.tensorboard", "train.trackers"),
        ("kernels.hybrid_attention=parts", 'kernels.hybrid_attention: "parts"', "tiled"),
    ],
)
def test_names_of_version_0_1_are_refused_with_the_new_ones(override, old, new) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], [override])
    assert str(caught.value).startswith(old) and str(caught.value).endswith(f"was renamed; must be given as {new}")


def test_a_setting_that_is_not_needed_any_more_says_so() -> None:
    with pytest.raises(ConfigError, match="train.universal: was removed: any checkpoint goes on .*must be left out"):
        load_config([], ["train.universal=true"])


OLD_QUICKSTART = """
run: {name: quickstart}
sparsity:
  algorithm: mst
  density: 0.1
  unit: 32
  warmup_end: 0.15
  restoration_start: 0.6
  restoration_end: 0.75
  update_interval: 10
attention:
  stride: 32
kernels:
  hybrid_attention: parts
"""


def test_a_file_of_version_0_1_is_refused_with_every_new_name_at_once(tmp_path) -> None:
    (tmp_path / "quickstart.yaml").write_text(OLD_QUICKSTART)
    with pytest.raises(ConfigError) as caught:
        load_config([tmp_path / "quickstart.yaml"])
    for old, new in (("sparsity.unit", "sparsity.block_size"), ("kernels.hybrid_attention", "tiled")):
        assert f"{old}:" in str(caught.value) and f"must be given as {new}" in str(caught.value)


def test_contradictions_inside_a_section_are_refused() -> None:
    for overrides, message in [
        (["sparsity.algorithm=static", "sparsity.drop_fraction=0.2"], "sparsity.drop_fraction: 0.2 contradicts"),
        (["sparsity.lr_density_power=auto", "sparsity.lr_density_cap=8"], "sparsity.lr_density_cap: 8.0 contradicts"),
        (["sparsity.row_floor=true", "sparsity.block_size=1"], "sparsity.row_floor: true needs blocks"),
        (
            ["model.position_embedding=rope", "model.hidden_size=12", "model.num_attention_heads=4"],
            "model.hidden_size: rope needs an even head dimension",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config([], overrides)


def test_all_errors_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], ["train.steps=0", "optimizer.lr=-1", "model.colour=red"])
    assert len(str(caught.value).splitlines()) == 3


def test_configurations_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().train.steps = 3


def test_a_saved_configuration_reads_back_the_same(tmp_path) -> None:
    words = [
        "run.name='1e5'", "run.folder=yes/no", "optimizer.epsilon=1e-12", "sparsity.points=[[0,1],[0.3,0.1],[1,1.0]]",
        "sparsity.groups=[{pattern: 'layers.*', density: 0.5}]", "train.sample_prompt='a: b # c'",
        "attention.overrides=[{layers: [1], pattern: local}]", "deepspeed.extra={wandb: {enabled: true, n: 1e-4}}",
        "data.train=[{path: a, weight: 2}, {path: b}]",
    ]  # fmt: skip
    config = load_config([], words)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config([tmp_path / "saved.yaml"]) == config
    assert config.run.name == "1e5"


@settings(max_examples=25)
@given(text=st.text(max_size=20).filter(lambda t: "$" not in t and t != "???"))
def test_any_text_survives_saving(tmp_path_factory, text) -> None:
    one_line = "".join(character for character in text if not control_character(character))
    config = check_config({"train": {"sample_prompt": text}, "run": {"folder": f"x{one_line}"}})
    path = tmp_path_factory.mktemp("text") / "saved.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config([path]) == config


def test_every_field_is_described() -> None:
    described = list(describe_fields())
    names = [name for name, *_ in described]
    assert len(names) == len(set(names)) and "sparsity.density" in names
    assert all(default and len(text) > 10 for _, default, text in described)


def test_every_setting_is_read_somewhere() -> None:
    """A setting that nothing reads is a promise that nobody keeps."""
    read, folder = set(), ROOT / "megasparse" / "config"
    sections = [folder / f"{name}.py" for name in ("schema", "model", "attention", "training", "sparsity")]
    for path in (ROOT / "megasparse").rglob("*.py"):
        if path in sections:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    # `ffn_hidden_size` and the like are read through the properties that the schema derives from them.
    for function in (node for path in sections for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(function, ast.FunctionDef) and function.name in read:
            read |= {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    fields = {name.partition(".")[2] for name, *_ in describe_fields()}
    nested = {"path", "weight", "pattern", "start", "end", "layers", "heads", "dense", "growth", "drop_score"}
    assert not sorted((fields | nested) - read)
