"""The sections `smt` and `spiel`: fine-tuning of few entries of frozen matrices, and what it does not go with.

Sparse Matrix Tuning: He et al. 2025, arXiv 2405.15525. SpIEL: Ansell et al. 2024, arXiv 2401.16405.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from megasparse.config.section import OpenFraction, Section

if TYPE_CHECKING:
    from megasparse.config.schema import RunConfig

BlockSize = Literal[16, 32, 64, 128, 256]
BlockScore = Literal["mean_of_magnitudes", "magnitude_of_mean", "norm"]


class SmtConfig(Section):
    density: OpenFraction | None = None
    """Share of the entries of attention and MLP matrices that is trained, as whole blocks; all other weights are
    frozen. Needs `train.init_from`. Unset: no Sparse Matrix Tuning."""
    block_size: BlockSize = 64
    """Side of the blocks. Blocks at the end of a matrix that it does not divide are smaller."""
    allocation: Literal["kind", "matrix"] = "kind"
    """kind: blocks are chosen over all layers, among attention matrices and among MLP matrices each for itself; matrix:
    every matrix has the same share."""
    score: BlockScore = "mean_of_magnitudes"
    """What ranks blocks, of the gradient averaged over the warm-up: mean of |g| of the entries, |mean of g| (signs
    cancel), or the Frobenius norm."""
    warmup_steps: Annotated[int, Field(ge=2)] = 100
    """Steps in which all of the attention and MLP matrices are trained while gradients are collected."""
    restore_base_after_warmup: bool = True
    """Take the weights of `train.init_from` again when blocks are chosen; false: keep those of the warm-up, which then
    are part of checkpoints and of the adapter."""


class SpielConfig(Section):
    density: OpenFraction | None = None
    """Share of the entries of each attention and MLP matrix that is trained; all other weights are frozen. Needs
    `train.init_from`. Unset: no SpIEL."""
    variant: Literal["accumulated_gradients", "moment_approximation"] = "accumulated_gradients"
    """accumulated_gradients: AdamW, and entries come by their gradients (SpIEL-AG); moment_approximation: SM3, which
    keeps a number for each row and column in place of moments, and entries come by these (SpIEL-MA)."""
    interval: Annotated[int, Field(ge=2)] = 20
    """Steps from one exchange of entries to the next."""
    selection_steps: Annotated[int, Field(ge=2)] = 5
    """Steps at the beginning of each interval after which entries are exchanged; accumulated_gradients collects the
    gradients of candidates in them."""
    drop_fraction: OpenFraction = 0.2
    """Share of the entries that is exchanged, falling linearly to 0 over the run; all of them in the first interval."""

    @property
    def trains_by_sm3(self) -> bool:
        """Whether what is trained has no moments."""
        return self.density is not None and self.variant == "moment_approximation"


def adapter_conflicts(config: RunConfig) -> list[str]:
    """What contradicts fine-tuning of few entries, one sentence each."""
    name = config.adapter_field
    if name is None:
        return []
    train, sparsity, size = config.train, config.sparsity, config.parallel.tensor_parallel_size
    refused = {
        "train.init_from": (train.init_from is None, "unset", "the model folder whose weights are tuned"),
        # A topology and an adapter would decide on the same entries.
        "sparsity.algorithm": (sparsity.algorithm != "dense", sparsity.algorithm, "dense"),
        # Units are chosen over whole matrices, which lie on one rank each.
        "parallel.tensor_parallel_size": (size > 1, size, "1"),
        # Gradients of the frozen matrices are taken before the loss scale is known to fit.
        "train.precision": (train.precision == "fp16", "fp16", "fp32 or bf16"),
        "train.compile": (train.compile == "blocks", "blocks", "none"),
        "stacking.num_layers": (config.stacking.num_layers is not None, config.stacking.num_layers, "unset"),
        "layer_dropping.theta": (config.layer_dropping.theta is not None, config.layer_dropping.theta, "unset"),
        "switching.clusters": (config.switching.clusters is not None, config.switching.clusters, "unset"),
        # It multiplies by the weights itself.
        "activation_sparsity.pattern": (config.activation_sparsity.pattern != "none", "2:4", "none"),
    }
    if config.spiel.density is not None:
        settings = config.spiel
        long = settings.selection_steps > settings.interval
        most = f"at most spiel.interval {settings.interval}"
        refused["spiel.selection_steps"] = (long, settings.selection_steps, most)
        refused["smt.density"] = (config.smt.density is not None, config.smt.density, "unset")
    if config.smt.density is not None:
        short = config.smt.warmup_steps >= train.steps
        refused["smt.warmup_steps"] = (short, config.smt.warmup_steps, f"below train.steps {train.steps}")
        # Norms of the warm-up say nothing of those of the chosen entries.
        refused["train.skip_step_sigma"] = (train.skip_step_sigma is not None, train.skip_step_sigma, "unset")
    return [
        f"{field}: {value} does not go with {name}; must be {must}, or {name} unset"
        for field, (is_refused, value, must) in refused.items()
        if is_refused
    ]
