"""Sections that say what a run learns from and how: its name and seed, data, optimizer, steps and batches, growth in
depth; see ``schema``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megasparse.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Section,
)
from megasparse.config.sparsity import Phase


class RunSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run; its folder is `<folder>/<name>`."""
    folder: str = "runs"
    """Folder that holds the run folders."""
    seed: NonNegativeInt = 1234
    """Seed of the initial weights, of the order of the data and of random growth."""


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
