"""The section `sparsity`: the density over a run, what is dropped and grown, and how it is stored; see ``schema``."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megasparse.config.section import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, Section

Phase = Literal["warm_up", "ultra_sparse", "restoration", "dense"]
DropScoreName = Literal["magnitude", "magnitude_gradient", "magnitude_over_gradient", "snip"]
Algorithm = Literal["mst", "dense", "static", "set", "rigl", "gradual", "obert", "spdf"]


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


def check_points(points: list[tuple[float, float]]) -> None:
    """Raise ValueError unless `points` are [progress, density] with progress rising from 0 to at most 1."""
    if len(points) < 2:
        raise ValueError(f"points: need at least two [progress, density] pairs, got {points}")
    progress = [u for u, _ in points]
    if progress[0] != 0.0 or progress[-1] > 1.0 or any(b <= a for a, b in pairwise(progress)):
        raise ValueError(f"points: progress must rise strictly from 0 to at most 1, got {progress}")
    if wrong := [density for _, density in points if not 0.0 < density <= 1.0]:
        raise ValueError(f"points: density {wrong[0]} is outside (0, 1]")
