"""The configuration of a run: one strict, typed, immutable schema.

Every field has a default, a type, a range and a sentence of help. Values that contradict each other are refused
before anything is started: within a section by the section, between sections by ``checks``. Sections stand in modules
beside this one, and what they are made of in ``section``; all of it can be imported from here.
``megasparse.config.loader`` builds a ``RunConfig`` from YAML files and dotted overrides; nothing else in the package
parses settings.
"""

from __future__ import annotations

from math import inf

from megasparse.config.activation_sparsity import ActivationSparsityConfig
from megasparse.config.adapters import SmtConfig, SpielConfig
from megasparse.config.attention import AttentionConfig, Pattern, PatternOverride, PatternWindow
from megasparse.config.distillation import DistillationConfig
from megasparse.config.execution import DeepSpeedConfig, KernelsConfig, ParallelConfig
from megasparse.config.layer_dropping import LayerDroppingConfig
from megasparse.config.layer_tying import LayerTyingConfig
from megasparse.config.model import ModelConfig, RopeScaling, divisors
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
from megasparse.config.sparsity import Algorithm, DropScoreName, Phase, SparsityConfig, SparsityGroup, check_points
from megasparse.config.switching import SwitchingConfig
from megasparse.config.task import TaskConfig
from megasparse.config.tensor_train import TensorTrainConfig
from megasparse.config.training import DataConfig, DataSource, OptimizerConfig, RunSection, StackingConfig, TrainConfig

__all__ = [
    "ActivationSparsityConfig",
    "Algorithm",
    "AttentionConfig",
    "DataConfig",
    "DataSource",
    "DeepSpeedConfig",
    "DistillationConfig",
    "DropScoreName",
    "Fraction",
    "KernelsConfig",
    "LayerDroppingConfig",
    "LayerTyingConfig",
    "ModelConfig",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OpenFraction",
    "OptimizerConfig",
    "ParallelConfig",
    "Pattern",
    "PatternOverride",
    "PatternWindow",
    "Phase",
    "PositiveFloat",
    "PositiveInt",
    "RopeScaling",
    "RunConfig",
    "RunSection",
    "SecondOrderConfig",
    "Section",
    "SmtConfig",
    "SparsityConfig",
    "SparsityGroup",
    "SpielConfig",
    "StackingConfig",
    "SwitchingConfig",
    "TaskConfig",
    "TensorTrainConfig",
    "TrainConfig",
    "check_points",
    "divisors",
]


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
