"""Checks that look at several sections, or at the world size, and the list of settings that a run does not use.

``check_run(config, world_size)`` runs before any process group starts; ``unused_settings(config)`` returns one
sentence per setting that was given in vain, for the plan to show.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

from megasparse.config.adapters import adapter_conflicts
from megasparse.config.layer_tying import layer_tying_conflicts
from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig, divisors
from megasparse.config.section import Section
from megasparse.config.stages import growth_step
from megasparse.config.tensor_train import tensor_train_conflicts

# What shapes the density of each algorithm; everything else of the schedule is unused by it.
SCHEDULE_FIELDS = {
    "mst": {"warmup_end", "restoration_start", "restoration_end", "warmup_shape", "restoration_shape"},
    "gradual": {"warmup_end", "warmup_shape"},
    "obert": {"warmup_end", "warmup_shape"},
    "spdf": {"restoration_start"},
    "static": set(),
    "set": set(),
    "rigl": set(),
}
ALL_SCHEDULE_FIELDS = SCHEDULE_FIELDS["mst"]
FIXED_TOPOLOGY = ("static", "spdf")
OF_GROWTH = {"growth", "growth_ratio", "regrown", "regrowth_warmup_steps"}
OF_DROPPING = {"drop_score", "drop_anneal", "drop_score_lambda"}


def check_run(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError where sections contradict each other or the world size."""
    _check_world(config, world_size)
    check_tensor_parallel(config)
    _check_precision(config)
    _check_attention(config)
    _check_stacking(config)
    _check_storage(config)
    _check_layer_dropping(config)
    _check_activation_sparsity(config)
    _check_folding(config)
    _check_second_order(config)
    _check_switching(config)
    _check_normalization_position(config)
    for conflict in (*adapter_conflicts(config), *tensor_train_conflicts(config), *layer_tying_conflicts(config)):
        raise ConfigError(conflict)
    if config.data.tokenizer in ("sentencepiece", "huggingface") and config.data.tokenizer_path is None:
        raise ConfigError(f"data.tokenizer_path: needed by data.tokenizer {config.data.tokenizer}; a file")
    if config.model.vocab_size is None and config.data.tokenizer is None:
        raise ConfigError("model.vocab_size: unset, and no data.tokenizer to take it from; set one of the two")
    if config.optimizer.warmup_steps > config.train.steps:
        raise ConfigError(
            f"optimizer.warmup_steps: {config.optimizer.warmup_steps} exceeds train.steps {config.train.steps}; "
            f"must be 0 to {config.train.steps}"
        )


def _check_world(config: RunConfig, world_size: int) -> None:
    train, tensor_parallel_size = config.train, config.parallel.tensor_parallel_size
    if world_size < 1 or world_size % tensor_parallel_size:
        raise ConfigError(
            f"parallel.tensor_parallel_size: {tensor_parallel_size} does not divide the world size {world_size}; "
            f"must be one of {divisors(max(world_size, 1))}"
        )
    data_parallel_size = world_size // tensor_parallel_size
    samples = train.micro_batch_size * data_parallel_size
    if train.global_batch_size % samples:
        raise ConfigError(
            f"train.global_batch_size: {train.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{train.micro_batch_size} x {data_parallel_size} data-parallel ranks; must be multiples of {samples}"
        )
    of_rank = train.global_batch_size // data_parallel_size
    for phase, size in train.micro_batch_size_by_phase.items():
        if of_rank % size:
            raise ConfigError(
                f"train.micro_batch_size_by_phase.{phase}: {size} does not divide the {of_rank} samples of a "
                f"data-parallel rank in a step (train.global_batch_size {train.global_batch_size} over "
                f"{data_parallel_size} ranks); must be one of {divisors(of_rank)}"
            )


def _check_precision(config: RunConfig) -> None:
    # DeepSpeed's stage-0 wrapper for low precision makes a hidden first step with zero gradients, which moves the
    # bias correction and the decay off by one step.
    if config.deepspeed.zero_stage == 0 and config.train.precision != "fp32":
        raise ConfigError(
            f"deepspeed.zero_stage: 0 does not support train.precision {config.train.precision}; must be one of 1, 2, 3"
        )
    if config.deepspeed.zero_stage == 0 and config.deepspeed.offload_optimizer != "none":
        raise ConfigError(
            f"deepspeed.offload_optimizer: {config.deepspeed.offload_optimizer} needs deepspeed.zero_stage 1, 2 or 3; "
            "at stage 0 it must be none"
        )
    # At stage 1 DeepSpeed would take another optimizer, whose state our views do not know, or with offload ignore it.
    deepspeed = config.deepspeed
    is_mixed = config.train.precision != "fp32" and deepspeed.gradient_accumulation_dtype == "fp32"
    if is_mixed and deepspeed.zero_stage == 1:
        raise ConfigError(
            f"deepspeed.gradient_accumulation_dtype: fp32 with train.precision {config.train.precision} needs "
            "deepspeed.zero_stage 2 or 3; at stage 1 it must be precision"
        )


def check_tensor_parallel(config: RunConfig) -> None:
    """Heads, the inside of the MLP and, under sequence parallelism, tokens must be divisible over the ranks."""
    model, size = config.model, config.parallel.tensor_parallel_size
    counts = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_key_value_heads": model.key_value_heads,
        "model.ffn_hidden_size": model.mlp_width,
    }
    if config.parallel.sequence_parallel:
        counts["model.seq_length"] = model.seq_length
    common = gcd(*counts.values())
    for field, count in counts.items():
        if count % size:
            raise ConfigError(
                f"parallel.tensor_parallel_size: {size} does not divide {field} {count}; "
                f"for this model it must be one of {divisors(common)}"
            )


def _check_attention(config: RunConfig) -> None:
    num_layers, num_heads = config.model.num_layers, config.model.num_attention_heads
    for index, override in enumerate(config.attention.overrides):
        place, heads = f"attention.overrides.{index}", override.heads if isinstance(override.heads, list) else []
        given = {"layers": (override.layers or [], num_layers), "first": ([override.first], num_layers)}
        for field, (values, limit) in {**given, "heads": (heads, num_heads)}.items():
            if wrong := [value for value in values if value >= limit]:
                raise ConfigError(f"{place}.{field}: {wrong[0]} does not exist; must be 0 to {limit - 1}")
        if not isinstance(override.heads, list) and not override.head_numbers(num_heads):
            raise ConfigError(
                f"{place}.heads: {override.heads} of {num_heads} heads is none; must be shares of at least 1 head, "
                f"{1 / num_heads:.3g}"
            )
    offsets = config.attention.stride_offsets
    if isinstance(offsets, list) and len(offsets) != num_heads:
        raise ConfigError(
            f"attention.stride_offsets: {len(offsets)} offsets for {num_heads} query heads; must be none, "
            f"spread, or a list of {num_heads}"
        )


def _check_stacking(config: RunConfig) -> None:
    """The small model fits into the whole one, there is a step for each of them, and copies do what originals do."""
    small, num_layers, steps = config.stacking.num_layers, config.model.num_layers, config.train.steps
    if small is None:
        return
    allowed = divisors(num_layers)[:-1]
    if small not in allowed:
        words = f"one of {', '.join(map(str, allowed))}" if allowed else "unset"
        raise ConfigError(
            f"stacking.num_layers: {small} must be below model.num_layers {num_layers} and divide it; must be {words}"
        )
    step = growth_step(config)
    if step is None or not 0 < step < steps:
        raise ConfigError(
            f"stacking.until: {config.stacking.until} of train.steps {steps} is step {step}; must be a share that "
            f"leaves both models at least one step"
        )
    for index, override in enumerate(config.attention.overrides):
        numbers = override.layer_numbers(num_layers)
        for layer in range(num_layers):
            if (layer in numbers) != (layer % small in numbers):
                raise ConfigError(
                    f"attention.overrides.{index}: says something else of layer {layer} than of layer {layer % small}, "
                    f"whose copy it becomes (stacking.num_layers {small}); must be all layers, or whole groups such as "
                    f"every: {small}"
                )


def _check_storage(config: RunConfig) -> None:
    if config.sparsity.storage == "packed" and (obstacle := storage_obstacle(config)):
        raise ConfigError(f"{obstacle}, or sparsity.storage dense")


def storage_obstacle(config: RunConfig) -> str | None:
    """What of a configuration packed storage does not go with: field, value, and what it must be; None: nothing."""
    sparsity = config.sparsity
    if sparsity.algorithm == "dense":
        return None
    tensor_parallel = config.parallel.tensor_parallel_size > 1
    single = next((f"sparsity.groups.{n}.block_size" for n, g in enumerate(sparsity.groups) if g.block_size == 1), None)
    if sparsity.block_size == 1 and single is None:
        single = "sparsity.block_size"
    refused = {
        "sparsity.fold_low_rank": (sparsity.fold_low_rank, "true", "false"),
        "sparsity.balance_shards": (
            tensor_parallel and not sparsity.balance_shards,
            "false lets one tensor-parallel rank have more blocks of a layer than there is room for,",
            "true",
        ),
        # Its Fisher matrices are of rows of whole matrices.
        "sparsity.algorithm": (sparsity.algorithm == "obert", "obert", "gradual"),
        "train.precision": (config.train.precision == "fp16", "fp16", "fp32, bf16"),
        "stacking.num_layers": (config.stacking.num_layers is not None, config.stacking.num_layers, "unset"),
        **({single: (True, "1, single weights,", "16, 32, 64 or 128")} if single else {}),
    }
    for field, (is_refused, value, must) in refused.items():
        if is_refused:
            return f"{field}: {value} does not go with sparsity.storage packed; must be {must}"
    return None


def _check_layer_dropping(config: RunConfig) -> None:
    # A traced block holds its scales as constants: it would be traced anew in each step.
    if config.layer_dropping.theta is not None and config.train.compile == "blocks":
        raise ConfigError(
            "train.compile: blocks does not go with layer_dropping, which changes the blocks in each step; must be "
            "none, or layer_dropping.theta unset"
        )


def _check_normalization_position(config: RunConfig) -> None:
    """What normalisation after the residual sum, and weights of that sum (Admin), do not go with."""
    model = config.model
    if model.normalization_position == "post" and config.layer_dropping.theta is not None:
        raise ConfigError(
            f"layer_dropping.theta: {config.layer_dropping.theta} does not go with model.normalization_position post, "
            "where the scale of a branch is normalised away; must be unset"
        )
    if model.residual_weight == "none":
        return
    refused: dict[str, tuple[object, object, str]] = {
        "model.normalization_position": (model.normalization_position, "post", "post"),
        # A rank sees a part of the tokens only.
        "parallel.sequence_parallel": (config.parallel.sequence_parallel, False, "false"),
        # A traced block would hold the weights of its first pass as constants.
        "train.compile": (config.train.compile, "none", "none"),
        # The weights follow from the depth.
        "stacking.num_layers": (config.stacking.num_layers, None, "unset"),
    }
    for field, (value, allowed, must) in refused.items():
        if value != allowed:
            raise ConfigError(
                f"{field}: {str(value).lower()} does not go with model.residual_weight admin; must be {must}, or "
                "model.residual_weight none"
            )


def _check_activation_sparsity(config: RunConfig) -> None:
    if config.activation_sparsity.pattern == "none":
        return
    size, width = config.parallel.tensor_parallel_size, config.model.mlp_width
    rank = 0 if config.sparsity.algorithm == "dense" else config.sparsity.low_rank
    refused = {
        # Others have no zeros.
        "model.activation": (config.model.activation != "relu2", config.model.activation, "relu2"),
        "model.ffn_hidden_size": (width % (16 * size) > 0, width, f"a multiple of {16 * size}, 16 on each rank"),
        "train.compile": (config.train.compile == "blocks", "blocks", "none"),
        # A branch beside the matrix changes the activation behind its product's back.
        "sparsity.low_rank": (rank > 0, rank, "0"),
    }
    for field, (is_refused, value, must) in refused.items():
        if is_refused:
            raise ConfigError(
                f"{field}: {value} does not go with activation_sparsity.pattern 2:4; must be {must}, or the pattern "
                "none"
            )


def _check_folding(config: RunConfig) -> None:
    sparsity = config.sparsity
    folds = sparsity.fold_low_rank and sparsity.low_rank > 0 and sparsity.algorithm != "dense"
    if folds and sparsity.head and config.model.tie_embeddings:
        # What is added to the matrix would reach the look-up of the embedding, which has no branch.
        raise ConfigError(
            "sparsity.fold_low_rank: true does not go with a sparse head that is tied to the embedding; must be false, "
            "or sparsity.head false, or model.tie_embeddings false"
        )


def _check_second_order(config: RunConfig) -> None:
    """Weights that go are chosen by what they cost alone, and lie with their neighbours on one tensor-parallel rank."""
    sparsity, size, side = config.sparsity, config.parallel.tensor_parallel_size, config.second_order.fisher_block
    if sparsity.algorithm != "obert":
        return
    groups = {f"sparsity.groups.{number}": group for number, group in enumerate(sparsity.groups) if not group.dense}
    refused = {
        "parallel.tensor_parallel_size": (size > 1, size, "1"),
        "sparsity.drop_fraction": (bool(sparsity.drop_fraction), sparsity.drop_fraction, "unset, 0"),
        **{
            f"{name}.{field}": (bool(value), value, "unset")
            for name, group in groups.items()
            for field, value in group.model_dump(include={"algorithm", "drop_fraction", "drop_score"}).items()
        },
    }
    for field, (is_refused, value, must) in refused.items():
        if is_refused:
            raise ConfigError(f"{field}: {value} does not go with sparsity.algorithm obert; must be {must}, or gradual")
    for block_size in (sparsity.block_size, *(group.block_size for group in groups.values())):
        if block_size is not None and block_size % side and side % block_size:
            raise ConfigError(
                f"second_order.fisher_block: {side} neither divides the block size {block_size} of sparse matrices nor "
                f"is a multiple of it; must be such as {block_size}"
            )


def _check_switching(config: RunConfig) -> None:
    settings, size = config.switching, config.parallel.tensor_parallel_size
    if settings.clusters is None:
        return
    width, shards = config.model.mlp_width, settings.shards
    refused: dict[str, tuple[bool, object, str]] = {
        # Others have no zeros, so that no neuron can be left out.
        "model.activation": (config.model.activation != "relu2", config.model.activation, "relu2"),
        "switching.shards": (shards % size > 0, shards, f"a multiple of parallel.tensor_parallel_size, {size}"),
        "switching.clusters": (
            settings.clusters % shards > 0 or width % settings.clusters > 0,
            settings.clusters,
            f"a multiple of switching.shards, {shards}, that divides the width of the MLP, {width}",
        ),
        "switching.active": (
            settings.active % shards > 0 or settings.active > settings.clusters,
            settings.active,
            f"a multiple of switching.shards, {shards}, and at most switching.clusters, {settings.clusters}",
        ),
        # Moved neurons would leave their blocks.
        "sparsity.algorithm": (config.sparsity.algorithm != "dense", config.sparsity.algorithm, "dense"),
        "activation_sparsity.pattern": (config.activation_sparsity.pattern != "none", "2:4", "none"),
        "stacking.num_layers": (config.stacking.num_layers is not None, config.stacking.num_layers, "unset"),
        "train.compile": (config.train.compile == "blocks", "blocks", "none"),
    }
    for field, (is_refused, value, must) in refused.items():
        if is_refused:
            raise ConfigError(f"{field}: {value} does not go with switching.clusters; must be {must}")


def unused_settings(config: RunConfig) -> list[str]:
    """Settings that were given and have no effect in this run, one sentence each."""
    return [*_unused_sparsity(config), *_unused_elsewhere(config)]


def _unused_sparsity(config: RunConfig) -> Iterator[str]:
    sparsity, algorithm = config.sparsity, config.sparsity.algorithm
    given = _given(sparsity) - {"algorithm"}

    def sentences(fields: set[str], reason: str = f"not used by sparsity.algorithm {algorithm}:") -> Iterator[str]:
        if given & fields:
            yield f"{reason} {', '.join(f'sparsity.{field}' for field in sorted(given & fields))}"

    if algorithm == "dense":
        yield from sentences(given)
        return
    if sparsity.points is not None:
        yield from sentences(ALL_SCHEDULE_FIELDS | {"density"}, "sparsity.points replaces")
    else:
        yield from sentences(ALL_SCHEDULE_FIELDS - SCHEDULE_FIELDS[algorithm])
    if "fold_low_rank" in given and not sparsity.low_rank:
        yield "sparsity.fold_low_rank is used with sparsity.low_rank above 0 only"
    if "capacity_change_cost" in given and sparsity.storage == "dense":
        yield "sparsity.capacity_change_cost is used by sparsity.storage packed and auto only"
    if "init_density_power" in given and sparsity.starts_dense:
        yield "sparsity.init_density_power changes nothing in a run that begins dense"
    if algorithm in FIXED_TOPOLOGY:
        yield from sentences(OF_GROWTH | OF_DROPPING)
        return
    if algorithm == "obert":
        yield from sentences(OF_DROPPING)
    growths = {sparsity.growth, *(group.growth for group in sparsity.groups)} - {None}
    if "growth_ratio" in given and "mixed" not in growths and (growths or algorithm in ("set", "rigl")):
        yield "sparsity.growth_ratio is used by sparsity.growth mixed only"
    scores = {sparsity.drop_score, *(group.drop_score for group in sparsity.groups)}
    if algorithm != "obert" and "drop_score_lambda" in given and "magnitude_gradient" not in scores:
        yield "sparsity.drop_score_lambda is used by sparsity.drop_score magnitude_gradient only"
    if "shape_steps" in given and "steps" not in (sparsity.warmup_shape, sparsity.restoration_shape):
        yield "sparsity.shape_steps is used by the shape `steps` only"


def _unused_elsewhere(config: RunConfig) -> Iterator[str]:
    attention, data = config.attention, config.data
    given = {f"{name}.{field}" for name, section in config for field in _given(section)}
    if attention.windows is not None and "attention.phases" in given:
        yield "attention.windows replaces attention.phases"
    if "attention.stride_offsets" in given and not attention.named_patterns() - {"local"}:
        yield "attention.stride_offsets is used by the patterns strided, sparse and fixed only"
    if attention.dense_fallback is True and config.kernels.hybrid_attention != "auto":
        yield "attention.dense_fallback true is used with kernels.hybrid_attention auto only"
    if config.train.compile == "blocks" and config.kernels.elementwise in ("cpu", "triton"):
        kernel = config.kernels.elementwise
        yield f"kernels.elementwise {kernel} is not used with train.compile blocks, which joins torch's own operators"
    if data.valid is not None and "data.valid_fraction" in given:
        yield "data.valid replaces data.valid_fraction"
    if any(source.weight != 1.0 for source in data.valid or ()):
        yield "data.valid.weight is not used: validation takes samples of each as they are there"
    if data.reset_positions and not data.document_masking:
        yield "data.reset_positions is used with data.document_masking true only"
    if data.reset_positions and config.model.position_embedding == "rope":
        yield "data.reset_positions changes nothing under model.position_embedding rope, which knows distances only"
    if "optimizer.decay_fraction" in given and config.optimizer.schedule != "wsd":
        yield "optimizer.decay_fraction is used by optimizer.schedule wsd only"
    elif "optimizer.decay_fraction" in given and config.optimizer.decay_start == "dense":
        yield "optimizer.decay_start dense replaces optimizer.decay_fraction"
    if config.optimizer.decay_start == "dense" and config.optimizer.schedule == "constant":
        yield "optimizer.decay_start is not used by optimizer.schedule constant"
    elif config.optimizer.decay_start == "dense" and config.sparsity.algorithm == "dense":
        yield "optimizer.decay_start dense changes nothing in a run that is dense from its beginning"
    if "sparsity.init_density_power" in given and config.train.init_from is not None:
        yield "sparsity.init_density_power is not used with train.init_from, which has the initial weights"
    for name in ("model.rope_theta", "model.rope_scaling"):
        if name in given and config.model.position_embedding != "rope":
            yield f"{name} is used by model.position_embedding rope only"
    for name in ("parallel.sequence_parallel", "sparsity.balance_shards"):
        if name in given and config.parallel.tensor_parallel_size == 1:
            yield f"{name} is used with parallel.tensor_parallel_size above 1 only"
    if config.distillation.teacher is None:
        unused = sorted(name for name in given if name.startswith("distillation."))
        if unused:
            yield f"used with distillation.teacher only: {', '.join(unused)}"
    else:
        yield from _unused_distillation(config, given)
    for section, switch, is_on in (
        ("layer_dropping", "layer_dropping.theta", config.layer_dropping.theta is not None),
        ("activation_sparsity", "activation_sparsity.pattern 2:4", config.activation_sparsity.pattern != "none"),
        ("second_order", "sparsity.algorithm obert", config.sparsity.algorithm == "obert"),
        ("smt", "smt.density", config.smt.density is not None),
        ("spiel", "spiel.density", config.spiel.density is not None),
        ("switching", "switching.clusters", config.switching.clusters is not None),
        ("tensor_train", "tensor_train.rank", config.tensor_train.rank is not None),
        ("layer_tying", "layer_tying.mode fixed or dynamic", config.layer_tying.mode != "none"),
        ("task", "task.path", config.task.path is not None),
    ):
        unused = sorted(name for name in given if name.startswith(f"{section}."))
        if unused and not is_on:
            yield f"used with {switch} only: {', '.join(unused)}"
    if config.spiel.trains_by_sm3:
        unused = sorted(given & {"optimizer.beta1", "optimizer.beta2"})
        if unused:
            yield f"not used with spiel.variant moment_approximation: {', '.join(unused)}"
    if "task.max_tokens" in given and config.task.path is not None and config.task.kind != "answer":
        yield "task.max_tokens is used by task.kind answer only"
    if "stacking.until" in given and config.stacking.num_layers is None:
        yield "stacking.until is used with stacking.num_layers only"
    if config.train.resume == "auto" and data.train is None:
        yield "data.train is unset: the run can be planned, not trained"


def _unused_distillation(config: RunConfig, given: set[str]) -> Iterator[str]:
    distillation = config.distillation
    if "distillation.temperature" in given and not distillation.logits_weight:
        yield "distillation.temperature is used with distillation.logits_weight above 0 only"
    of_hidden = {"layer_map", "tokens", "epsilon", "reduction", "last_state", "ratio_over"}
    unused = sorted(given & {f"distillation.{name}" for name in of_hidden})
    if unused and not distillation.hidden_weight:
        yield f"used with distillation.hidden_weight above 0 only: {', '.join(unused)}"


def _given(section: Section) -> set[str]:
    """Fields that say something else than their default (a saved configuration spells out every field)."""
    return {
        name
        for name in section.model_fields_set
        if getattr(section, name) != type(section).model_fields[name].get_default(call_default_factory=True)
    }
