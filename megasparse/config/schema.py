"""The configuration of a run: one strict, typed, immutable schema.

Every field has a default, a type, a range and a sentence of help. Values that contradict each other are refused
here, before anything is started. ``megasparse.config.loader`` builds a ``RunConfig`` from YAML files and dotted
overrides; nothing else in the package parses settings.
"""

from __future__ import annotations

from itertools import pairwise
from math import inf, lcm
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megasparse.config.activation_sparsity import ActivationSparsityConfig
from megasparse.config.adapters import SmtConfig, SpielConfig
from megasparse.config.distillation import DistillationConfig
from megasparse.config.execution import DeepSpeedConfig, KernelsConfig, ParallelConfig
from megasparse.config.layer_dropping import LayerDroppingConfig
from megasparse.config.layer_tying import LayerTyingConfig
from megasparse.config.second_order import SecondOrderConfig
from megasparse.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Section,
)
from megasparse.config.switching import SwitchingConfig
from megasparse.config.task import TaskConfig
from megasparse.config.tensor_train import TensorTrainConfig

Pattern = Literal["full", "local", "strided", "sparse", "fixed"]
Phase = Literal["warm_up", "ultra_sparse", "restoration", "dense"]
DropScoreName = Literal["magnitude", "magnitude_gradient", "magnitude_over_gradient", "snip"]
Algorithm = Literal["mst", "dense", "static", "set", "rigl", "gradual", "obert", "spdf"]

DENSITY_TOLERANCE = 1e-9


class RunSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run; its folder is `<folder>/<name>`."""
    folder: str = "runs"
    """Folder that holds the run folders."""
    seed: NonNegativeInt = 1234
    """Seed of the initial weights, of the order of the data and of random growth."""


class RopeScaling(Section):
    """Lower rotary frequencies for contexts longer than those of the training."""

    type: Literal["linear", "llama3"]
    """linear: all frequencies are divided by the factor; llama3: low ones are, high ones stay, as in Llama 3.1."""
    factor: Annotated[float, Field(ge=1.0)]
    """Longest context over that of the training."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: fewer turns than this over `original_seq_length`, and the frequency is divided by the factor."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: more turns than this, and the frequency stays; between the two it is interpolated."""
    original_seq_length: PositiveInt = 8192
    """llama3: longest context of the training."""

    @model_validator(mode="after")
    def _factors_are_ordered(self) -> RopeScaling:
        if self.type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor: {self.low_freq_factor} must be below high_freq_factor {self.high_freq_factor}"
            )
        return self


class ModelConfig(Section):
    num_layers: PositiveInt = 12
    """Transformer blocks."""
    hidden_size: PositiveInt = 768
    """Width of the residual stream."""
    num_attention_heads: PositiveInt = 12
    """Query heads."""
    num_key_value_heads: PositiveInt | None = None
    """Key and value heads (grouped-query attention); unset: as many as query heads."""
    attention_head_dim: PositiveInt | None = None
    """Width of a head; unset: hidden_size / num_attention_heads."""
    ffn_hidden_size: PositiveInt | None = None
    """Width inside the MLP; unset: 4 x hidden_size, or 8/3 x hidden_size rounded up to 128 where gated (swiglu)."""
    seq_length: PositiveInt = 1024
    """Tokens per sample."""
    vocab_size: PositiveInt | None = None
    """Entries of the vocabulary; unset: the tokenizer's."""
    vocab_size_multiple: PositiveInt = 64
    """The embedding is padded to a multiple of this many rows."""
    position_embedding: Literal["learned", "rope"] = "learned"
    """learned: GPT-2; rope: rotary (Llama)."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Rotary frequencies for longer contexts; unset: as rope_theta gives them."""
    normalization: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before attention, before the MLP and before the head."""
    normalization_position: Literal["pre", "post"] = "pre"
    """post: normalisation after each residual sum instead, and none before the head."""
    residual_weight: Literal["none", "admin"] = "none"
    """admin: learnable weights of the residual sums, set by the variances of the first forward pass (post only)."""
    normalization_epsilon: PositiveFloat = 1e-5
    """Added to the variance."""
    activation: Literal["gelu", "gelu_exact", "relu2", "swiglu"] = "gelu"
    """gelu is the tanh approximation of GPT-2, gelu_exact none (nanoGPT); relu2 is the square of ReLU; swiglu
    has a fused gate and up projection."""
    bias: bool = True
    """Biases in linear layers and in layernorm."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values; unset: as `bias` (Qwen2: true where `bias` is false)."""
    tie_embeddings: bool = True
    """The head shares the weight of the token embedding."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; residual projections get init_std / sqrt(2 num_layers)."""

    @model_validator(mode="after")
    def _shapes_divide(self) -> ModelConfig:
        if self.attention_head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} does not divide hidden_size {self.hidden_size}; "
                f"must be one of {divisors(self.hidden_size)}"
            )
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}; must be one of {divisors(self.num_attention_heads)}"
            )
        if self.position_embedding == "rope" and self.attention_head_dim is not None and self.head_dim % 2:
            raise ValueError(f"attention_head_dim: rope needs an even one, got {self.head_dim}; must be even ones")
        if self.position_embedding == "rope" and self.head_dim % 2:
            raise ValueError(
                f"hidden_size: rope needs an even head dimension, {self.hidden_size} / {self.num_attention_heads} = "
                f"{self.head_dim}; must be multiples of {2 * self.num_attention_heads}"
            )
        return self

    @property
    def head_dim(self) -> int:
        return self.attention_head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def mlp_width(self) -> int:
        """Width inside the MLP after the default is filled in."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        # Here, as it imports torch: tools that write data read settings and need neither.
        from megasparse.utils.activations import ACTIVATIONS

        if ACTIVATIONS[self.activation].gated:
            return -(-8 * self.hidden_size // (3 * 128)) * 128
        return 4 * self.hidden_size

    def padded_vocab_size(self, vocab_size: int, tensor_parallel_size: int = 1) -> int:
        """Rows of the embedding for a tokenizer of `vocab_size` entries, divisible over the tensor-parallel ranks."""
        multiple = lcm(self.vocab_size_multiple, tensor_parallel_size)
        return -(-vocab_size // multiple) * multiple


class PatternWindow(Section):
    start: Fraction
    """Training progress at which the window opens."""
    end: Fraction
    """Training progress at which it closes (exclusive)."""
    pattern: Pattern
    """Pattern that holds inside."""

    @model_validator(mode="after")
    def _is_not_empty(self) -> PatternWindow:
        if self.start >= self.end:
            raise ValueError(f"start: {self.start} must be below end {self.end}")
        return self


class PatternOverride(Section):
    layers: list[NonNegativeInt] | None = None
    """Layers it applies to; unset: all, or as `every` says."""
    every: PositiveInt | None = None
    """Every so many layers, instead of a list: 4 is layers 0, 4, 8, ..."""
    first: NonNegativeInt = 0
    """The first of these layers."""
    heads: list[NonNegativeInt] | OpenFraction | None = None
    """Query heads it applies to, as a list, or as a share of all heads (0.5 is every other one), spread evenly so that
    each tensor-parallel rank has its part; unset: all."""
    pattern: Pattern
    """Pattern of these heads whenever the schedule asks for anything but `full`."""

    @model_validator(mode="after")
    def _layers_are_named_once(self) -> PatternOverride:
        if self.every is not None and self.layers is not None:
            raise ValueError(f"every: {self.every} contradicts layers {self.layers}; must be one of the two")
        if self.every is None and self.first:
            raise ValueError(f"first: {self.first} needs every; must be 0, or every: N")
        return self

    def layer_numbers(self, num_layers: int) -> list[int]:
        if self.every is not None:
            return list(range(self.first, num_layers, self.every))
        return list(range(num_layers)) if self.layers is None else self.layers

    def head_numbers(self, num_heads: int) -> list[int]:
        if isinstance(self.heads, float):
            count = round(self.heads * num_heads)
            return [h for h in range(num_heads) if (h + 1) * count // num_heads > h * count // num_heads]
        return list(range(num_heads)) if self.heads is None else self.heads


class AttentionConfig(Section):
    stride: PositiveInt = 128
    """Stride s of the hybrid sparse attention patterns, in tokens."""
    stride_offsets: Literal["none", "spread"] | list[NonNegativeInt] = "none"
    """Offset of the stride for each query head, so that heads look at different tokens under `strided`, `sparse` and
    `fixed`; none: 0 for all; spread: head h of H has h s // H; or a list with one number below s for each head."""
    phases: dict[Phase, Pattern] = {"ultra_sparse": "sparse"}
    """Pattern of each phase of the sparsity schedule; a phase left out is `full`."""
    windows: list[PatternWindow] | None = None
    """Pattern by training progress; replaces `phases`. Outside every window the pattern is `full`."""
    overrides: list[PatternOverride] = []
    """Exceptions by layer and head; the last that matches wins."""
    dense_fallback: bool | list[Pattern] = False
    """Full attention in place of patterns, which changes the model; true: of those for which the table of measurements
    (kernels.tune, tools/tune_kernels.py --attention) says that full attention is faster at this sequence length. A run
    resolves at its start which these are, and its config.yaml lists them. Or a list of patterns."""

    def head_offsets(self, num_heads: int) -> tuple[int, ...]:
        """Offset of each query head."""
        if self.stride_offsets == "spread":
            return tuple(head * self.stride // num_heads for head in range(num_heads))
        return (0,) * num_heads if self.stride_offsets == "none" else tuple(self.stride_offsets)

    @property
    def widened_patterns(self) -> frozenset[Pattern]:
        """Patterns in whose place full attention runs."""
        return frozenset(self.dense_fallback if isinstance(self.dense_fallback, list) else ())

    @property
    def sliding_window(self) -> int | None:
        """Tokens that each token sees, where the pattern is `local` at all times and for all heads; else None."""
        windows = self.windows or []
        always = len(windows) == 1 and (windows[0].start, windows[0].end, windows[0].pattern) == (0.0, 1.0, "local")
        return self.stride if always and not self.overrides else None

    def named_patterns(self) -> set[Pattern]:
        """All patterns that occur, `full` aside."""
        from_schedule = self.phases.values() if self.windows is None else (window.pattern for window in self.windows)
        return {*from_schedule, *(override.pattern for override in self.overrides)} - {"full"}

    @model_validator(mode="after")
    def _offsets_are_below_the_stride(self) -> AttentionConfig:
        stride = self.stride
        for offset in self.stride_offsets if isinstance(self.stride_offsets, list) else ():
            if offset >= stride:
                raise ValueError(f"stride_offsets: {offset} is not below stride {stride}; must be 0 to {stride - 1}")
        return self


class DataSource(Section):
    path: str
    """Prefix of an indexed data set: `<path>.bin` and `<path>.idx`."""
    weight: PositiveFloat = 1.0
    """Share of the samples, relative to the other sources."""


class DataConfig(Section):
    train: Annotated[list[DataSource], Field(min_length=1)] | None = None
    """Indexed data sets to train on, blended by weight."""
    valid: Annotated[list[DataSource], Field(min_length=1)] | None = None
    """Indexed data sets for validation; unset: `valid_fraction` of each training set, cut off at its end."""
    valid_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.02
    """Share of each training set kept for validation where `valid` is unset."""
    document_masking: bool = False
    """Tokens attend within their document only, though a sample holds several (Megatron-LM: reset_attention_mask)."""
    reset_positions: bool = False
    """With document masking: learned positions begin anew with each document (Megatron-LM: reset_position_ids)."""
    tokenizer: Literal["sentencepiece", "huggingface", "bytes"] | None = None
    """Kind of the tokenizer (for samples and the vocabulary size)."""
    tokenizer_path: str | None = None
    """File of the tokenizer."""
    allow_changed: bool = False
    """Go on with other data, weights or tokenizer than when the run was last started; what changed is told."""


class OptimizerConfig(Section):
    lr: PositiveFloat = 6e-4
    """Peak learning rate."""
    min_lr_ratio: Fraction = 0.1
    """Final learning rate over the peak."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Decay after the warm-up; wsd: constant, then a linear decay over `decay_fraction` of the steps."""
    decay_fraction: Fraction = 0.2
    """Share of the steps in which wsd decays."""
    decay_start: Literal["schedule", "dense"] = "schedule"
    """schedule: cosine and linear decay from the end of the warm-up on, wsd as `decay_fraction` says; dense: the rate
    stays at its peak until the model has become dense, and decays from there to the end."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """AdamW: decay of the first moment."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """AdamW: decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """AdamW: added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW: decoupled weight decay of matrices; vectors have none."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


class TrainConfig(Section):
    steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    global_batch_size: PositiveInt = 32
    """Samples per optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: PositiveInt = 4
    """Samples per forward pass of a rank."""
    micro_batch_size_by_phase: dict[Phase, PositiveInt] = {}
    """The same in some phases, such as {ultra_sparse: 16}: larger while the density is low, where packed storage has
    freed memory. The samples of a step, and their order, stay what they are."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the model; master weights and moments are always float32."""
    activation_recomputation: bool = False
    """Keep only the input of each block and recompute it in the backward pass."""
    compile: Literal["none", "blocks"] = "none"
    """blocks: torch.compile for each block of the model, which joins what lies between the products. Meant for GPUs; on
    CPUs `kernels.elementwise` is faster. The first steps take minutes."""
    log_interval: PositiveInt = 10
    """Steps between lines of metrics."""
    valid_interval: NonNegativeInt = 100
    """Steps between validations; 0: only at the end."""
    valid_samples: PositiveInt = 64
    """Samples per validation (fewer where the set is smaller)."""
    save_interval: NonNegativeInt = 0
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept."""
    resume: Literal["auto", "never"] = "never"
    """auto: go on from the newest good checkpoint of the run folder where there is one."""
    init_from: str | None = None
    """Model folder (tools/convert_checkpoint.py) whose weights the run starts from, with a fresh optimizer, at step 0;
    unset: random weights."""
    stop_after: PositiveInt | None = None
    """Leave cleanly, with a checkpoint, after this step, as if the time were up; schedules keep to `steps`."""
    trackers: list[str] = ["tensorboard"]
    """Where curves are shown beside metrics.jsonl: any of tensorboard, wandb (Weights & Biases) and mlflow."""
    sample_tokens: NonNegativeInt = 200
    """Tokens of the text sampled at the end; 0: none."""
    sample_prompt: str = "\n"
    """Text that the sample continues."""
    profile_steps: NonNegativeInt = 0
    """Steps whose trace (torch profiler, all ranks) is written into the run folder, after the first few; 0: none."""
    start_timeout_seconds: PositiveInt = 600
    """How long the ranks wait at the start for each other to come; they come apart by what each does alone before:
    importing, opening the data, compiling kernels."""
    distributed_timeout_seconds: PositiveInt = 1800
    """A collective that waits longer than this fails; a rank that makes no progress for longer than this, in the first
    step, a validation, a checkpoint, or at the start or the end of the run, ends the run."""
    step_timeout_seconds: PositiveInt = 300
    """The same limit for all other steps: longer than any part of a step (forward, backward, ...) takes."""
    skip_step_sigma: PositiveFloat | None = None
    """Skip a step whose gradient norm is more than this many standard deviations above the mean of the last 128 applied
    steps (6 is usual); unset: only those with a loss or gradient that is not finite."""
    max_skipped_steps: PositiveInt = 10
    """So many skipped steps in a row end the run."""

    def in_phase(self, phase: Phase) -> TrainConfig:
        """With the micro-batch of a phase."""
        size = self.micro_batch_size_by_phase.get(phase, self.micro_batch_size)
        return self if size == self.micro_batch_size else self.model_copy(update={"micro_batch_size": size})

    def accumulation_steps(self, data_parallel_size: int) -> int:
        """Micro-batches of a rank in an optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * data_parallel_size)


class StackingConfig(Section):
    num_layers: PositiveInt | None = None
    """Layers of the small model that the run begins with, a divisor of `model.num_layers`; unset: no stacking."""
    until: OpenFraction = 0.1
    """Progress at which the layers of the small model are copied in turn to `model.num_layers`; moments begin anew."""


class SparsityGroup(Section):
    pattern: str
    """Shell-style pattern of weight names, such as `layers.*.mlp.*`; the first group that matches a weight wins."""
    dense: bool = False
    """Keep these weights dense."""
    block_size: PositiveInt | None = None
    """Unit of these weights; unset: `sparsity.block_size`."""
    density: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Lowest density of these weights; unset: from `sparsity.density` and the distribution."""
    algorithm: Literal["mst", "static", "set", "rigl"] | None = None
    """Whose growth and drop fraction these weights take where neither is set; their density follows the run's
    schedule. Unset: `sparsity.algorithm`."""
    drop_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Drop fraction of these weights; unset: the algorithm's, or `sparsity.drop_fraction`."""
    drop_score: DropScoreName | None = None
    """Drop score of these weights; unset: `sparsity.drop_score`."""
    growth: Literal["mixed", "gradient", "random"] | None = None
    """Growth of these weights; unset: the algorithm's, or `sparsity.growth`."""


class SparsityConfig(Section):
    algorithm: Algorithm = "mst"
    """mst: falls, stays, rises; dense: off; static, set, rigl: constant density; gradual: falls and stays; obert:
    the same by second-order scores (section `second_order`); spdf: static, then dense. All but `dense` are settings of
    one machine."""
    density: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Lowest density over the sparse weights (d_min)."""
    block_size: PositiveInt = 64
    """Side of the square blocks that are dropped and grown together; 1: single weights."""
    warmup_end: Fraction = 0.1
    """Progress at which the density has fallen to `density` (a)."""
    restoration_start: Fraction = 0.7
    """Progress at which the density begins to rise (b)."""
    restoration_end: Fraction = 0.85
    """Progress from which the model is dense again (c)."""
    warmup_shape: Literal["cubic", "linear", "steps"] = "cubic"
    """How the density falls."""
    restoration_shape: Literal["cubic", "linear", "steps"] = "linear"
    """How the density rises."""
    shape_steps: PositiveInt = 4
    """Number of equal steps where a shape is `steps`."""
    points: list[tuple[float, float]] | None = None
    """Free schedule as [progress, density] points joined by lines; replaces the phase boundaries and shapes."""
    distribution: Literal["uniform", "erdos_renyi"] = "uniform"
    """How the global density is shared between layers."""
    depth_boost: NonNegativeFloat = 0.0
    """First and last layer are up to (1 + depth_boost) times as dense as the middle, at equal total."""
    update_interval: PositiveInt = 100
    """Optimizer steps between topology updates (dT)."""
    drop_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Share zeta of the active units that are replaced at a topology update; unset: the algorithm's (0.3, static 0)."""
    drop_anneal: Literal["run", "phase", "none"] = "run"
    """The cosine decay of the drop fraction runs over the whole run, over each phase, or not at all."""
    drop_score: DropScoreName = "magnitude"
    """magnitude: |w|; magnitude_gradient: |w| + lambda |g|; magnitude_over_gradient: |w / g|; snip: |w g|. The lowest
    are dropped."""
    drop_score_lambda: NonNegativeFloat = 1.0
    """Lambda of `magnitude_gradient`."""
    growth: Literal["mixed", "gradient", "random"] | None = None
    """Which inactive units are grown; unset: the algorithm's (mst mixed, set random, rigl gradient)."""
    growth_ratio: NonNegativeFloat = 3.0
    """r of mixed growth: r / (r + 1) of the new units by gradient, the rest at random."""
    regrown: Literal["reset", "keep"] = "reset"
    """Units that are dropped and grown again in the same topology update begin anew at 0, or keep weights and moments
    (as in the authors' code)."""
    row_floor: bool = False
    """Keep at least one active block in every row of blocks."""
    balance_shards: bool = False
    """Keep as many active units of a layer on each tensor-parallel rank, so that none waits; topologies then depend on
    the tensor-parallel size."""
    skip_optimizer_on_update: bool = False
    """The optimizer makes no step on a topology update (paper preset)."""
    init_density_power: NonNegativeFloat = 0.0
    """q: where a run begins below density 1, initial weights of a sparse matrix are multiplied by (its density)^-q.
    With 0.5 its outputs vary as those of the dense matrix (Dey et al. 2024, arXiv 2405.15743)."""
    lr_density_power: NonNegativeFloat | Literal["auto"] = 0.5
    """p: the learning rate of a sparse matrix is multiplied by min(density^-p, lr_density_cap). auto: 1 without a cap
    where the run is born sparse (from random weights, beginning below density 1); 0.5 and a cap of 4 where the masks
    come from trained weights."""
    lr_density_cap: Annotated[float, Field(ge=1.0)] | None = 4.0
    """Largest multiplier, null: none; the weight decay is divided by the multiplier."""
    regrowth_warmup_steps: NonNegativeInt = 0
    """The update of a new weight grows linearly over this many steps."""
    per_weight_step_counts: bool = False
    """AdamW corrects the bias of its moments by the steps of each weight instead of by the global step."""
    low_rank: NonNegativeInt = 0
    """Rank of a dense low-rank branch beside each sparse matrix; 0: none."""
    fold_low_rank: bool = False
    """When the model has become dense for good, the product of each branch is added to its matrix, and the branch is
    computed no more."""
    head: bool = False
    """The head (with tied embeddings: the embedding too) is sparse as well (paper preset)."""
    groups: list[SparsityGroup] = []
    """Exceptions by weight name."""
    storage: Literal["dense", "packed", "auto"] = "dense"
    """dense: a sparse matrix is stored whole, with zeros. packed: while the density is low only its active blocks are,
    so that gradients, optimizer state, traffic and checkpoints fall with the density; the engine is built anew in the
    few steps in which their number changes much. auto: packed where the plan expects it to save at least twice the time
    that building anew takes, and nothing speaks against it; decided at the start of a run, which keeps it."""
    capacity_change_cost: NonNegativeFloat = 10.0
    """Steps that building the engine anew for packed storage is taken to cost, in what dense storage adds to a step: a
    stretch in which smaller storage saves less is passed over. 0: always as small as it can be."""

    @property
    def starts_dense(self) -> bool:
        """Whether the schedule begins at density 1."""
        if self.points is not None and self.algorithm != "dense":
            return self.points[0][1] == 1.0
        falls = self.algorithm in ("mst", "gradual", "obert") and self.warmup_end > 0
        return self.algorithm == "dense" or self.density == 1.0 or falls

    @model_validator(mode="after")
    def _boundaries_are_ordered(self) -> SparsityConfig:
        order = (self.warmup_end, self.restoration_start, self.restoration_end)
        if self.algorithm == "mst" and self.points is None and list(order) != sorted(order):
            names = "warmup_end, restoration_start, restoration_end"
            raise ValueError(f"{names}: must not decrease, got {', '.join(map(str, order))}")
        if self.points is not None:
            check_points(self.points)
        return self

    @model_validator(mode="after")
    def _topology_rules_fit_the_algorithm(self) -> SparsityConfig:
        if self.algorithm in ("static", "spdf") and self.drop_fraction:
            raise ValueError(
                f"drop_fraction: {self.drop_fraction} contradicts algorithm {self.algorithm}, whose topology does not "
                "evolve; must be unset, 0"
            )
        if self.row_floor and self.block_size == 1:
            raise ValueError("row_floor: true needs blocks, but unit is 1; must be false, or a unit above 1")
        if self.lr_density_power == "auto" and self.lr_density_cap != 4.0:
            raise ValueError(
                f"lr_density_cap: {self.lr_density_cap} contradicts lr_density_power auto, which sets it; must be unset"
            )
        if self.row_floor and self.balance_shards:
            raise ValueError("row_floor: true contradicts balance_shards; must be false, or balance_shards false")
        return self


class RunConfig(Section):
    """Everything that defines a run. See the sections for the fields."""

    run: RunSection = RunSection()
    model: ModelConfig = ModelConfig()
    attention: AttentionConfig = AttentionConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    stacking: StackingConfig = StackingConfig()
    sparsity: SparsityConfig = SparsityConfig()
    distillation: DistillationConfig = DistillationConfig()
    activation_sparsity: ActivationSparsityConfig = ActivationSparsityConfig()
    layer_dropping: LayerDroppingConfig = LayerDroppingConfig()
    second_order: SecondOrderConfig = SecondOrderConfig()
    task: TaskConfig = TaskConfig()
    smt: SmtConfig = SmtConfig()
    spiel: SpielConfig = SpielConfig()
    switching: SwitchingConfig = SwitchingConfig()
    tensor_train: TensorTrainConfig = TensorTrainConfig()
    layer_tying: LayerTyingConfig = LayerTyingConfig()
    kernels: KernelsConfig = KernelsConfig()
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @property
    def adapter_field(self) -> str | None:
        """The setting that asks for a few trained entries in frozen matrices; None: all weights are trained."""
        given = (name for name in ("spiel", "smt") if getattr(self, name).density is not None)
        return next((f"{name}.density" for name in given), None)

    @property
    def adapter_unit(self) -> int | None:
        """Side of the units that it trains."""
        if self.spiel.density is not None:
            return 1
        return None if self.smt.density is None else self.smt.block_size

    @property
    def is_born_sparse(self) -> bool:
        """Whether the run begins with random weights, not all of them active."""
        return self.train.init_from is None and not self.sparsity.starts_dense

    @property
    def lr_density_rule(self) -> tuple[float, float]:
        """p and c: the learning rate of a sparse matrix is multiplied by min(density^-p, c)."""
        power, cap = self.sparsity.lr_density_power, self.sparsity.lr_density_cap
        if power == "auto":
            return (1.0, inf) if self.is_born_sparse else (0.5, 4.0)
        return power, inf if cap is None else cap


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def check_points(points: list[tuple[float, float]]) -> None:
    """Raise ValueError unless `points` are [progress, density] with progress rising from 0 to at most 1."""
    if len(points) < 2:
        raise ValueError(f"points: need at least two [progress, density] pairs, got {points}")
    progress = [u for u, _ in points]
    if progress[0] != 0.0 or progress[-1] > 1.0 or any(b <= a for a, b in pairwise(progress)):
        raise ValueError(f"points: progress must rise strictly from 0 to at most 1, got {progress}")
    if wrong := [density for _, density in points if not 0.0 < density <= 1.0]:
        raise ValueError(f"points: density {wrong[0]} is outside (0, 1]")
