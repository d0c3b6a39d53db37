"""What is asked of a pruning, and the checks that need no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megasparse.config.loader import ConfigError
from megasparse.pruning.patterns import Pattern
from megasparse.pruning.sds import PENALTY
from megasparse.pruning.sparsegpt import COLUMNS, DAMPING

METHOD_NAMES = ("magnitude", "wanda", "sparsegpt")
DISTRIBUTIONS = ("uniform", "alpha")
SAMPLES = 128
WINDOW = 2048
"""Calibration windows and their tokens, where nothing is said; a model with shorter sequences takes its own length."""
SPREAD = 0.3


@dataclass(frozen=True)
class PruneSettings:
    """The command line; meanings are in ``tools/prune.py --help``. None: nothing was said."""

    model: Path
    output: Path
    method: str = "sparsegpt"
    pattern: Pattern = Pattern()
    density: float | None = None
    distribution: str = "uniform"
    spread: float | None = None
    keep_dense: tuple[str, ...] = ()
    keep_zeros: bool = False
    calibration: str | None = None
    samples: int | None = None
    window: int | None = None
    seed: int | None = None
    damping: float | None = None
    columns: int | None = None
    sds: bool = False
    sds_penalty: float | None = None
    restart: bool = False
    device: str = "cpu"

    @property
    def needs_calibration(self) -> bool:
        return self.method != "magnitude" or self.sds

    @property
    def target_density(self) -> float:
        density = self.pattern.density if self.density is None else self.density
        assert density is not None, "check_settings asks for it"
        return density

    @property
    def spread_or_default(self) -> float:
        return SPREAD if self.spread is None else self.spread

    @property
    def sds_penalty_or_default(self) -> float:
        return PENALTY if self.sds_penalty is None else self.sds_penalty

    @property
    def damping_or_default(self) -> float:
        return DAMPING if self.damping is None else self.damping

    @property
    def columns_or_default(self) -> int:
        return COLUMNS if self.columns is None else self.columns


def check_settings(settings: PruneSettings) -> None:
    """Raise ConfigError for settings that are wrong, contradict each other, or would be ignored."""
    _one_of("method", settings.method, METHOD_NAMES)
    _one_of("distribution", settings.distribution, DISTRIBUTIONS)
    _check_density(settings)
    if settings.needs_calibration and settings.calibration is None:
        needs = "--sds" if settings.method == "magnitude" else f"--method {settings.method}"
        raise ConfigError(f"--calibration: missing; {needs} needs a text or a token file")
    unused = {} if settings.needs_calibration else _named(settings, "calibration", "samples", "window", "seed")
    if settings.method != "sparsegpt":
        unused |= _named(settings, "damping", "columns")
    for name, value in unused.items():
        raise ConfigError(f"--{name}: {value}; must be left out: --method {settings.method} does not use it")
    if settings.spread is not None and settings.distribution != "alpha":
        raise ConfigError(f"--spread: {settings.spread}; must be left out: it is for --distribution alpha")
    if not 0.0 < settings.spread_or_default < 1.0:
        raise ConfigError(f"--spread: {settings.spread}; must be above 0 and below 1")
    if settings.sds_penalty is not None and not settings.sds:
        raise ConfigError(f"--sds-penalty: {settings.sds_penalty}; must be left out: it is for --sds")
    if not 0.0 < settings.sds_penalty_or_default <= 100.0:
        raise ConfigError(f"--sds-penalty: {settings.sds_penalty}; must be above 0 and at most 100")
    if settings.damping is not None and not 0.0 < settings.damping <= 1.0:
        raise ConfigError(f"--damping: {settings.damping}; must be above 0 and at most 1")
    for name, smallest in (("samples", 1), ("window", 2), ("columns", 1)):
        number = getattr(settings, name)
        if number is not None and number < smallest:
            raise ConfigError(f"--{name}: {number}; must be at least {smallest}")


def _check_density(settings: PruneSettings) -> None:
    density, prescribed = settings.density, settings.pattern.density
    if density is None and prescribed is None:
        raise ConfigError("--density: missing; must be above 0 and below 1")
    if density is not None and not 0.0 < density < 1.0:
        raise ConfigError(f"--density: {density:g}; must be above 0 and below 1")
    if density is not None and prescribed is not None and density != prescribed:
        raise ConfigError(
            f"--density: {density:g} contradicts --pattern {settings.pattern}; must be left out, or {prescribed:g}"
        )
    if prescribed is not None and settings.distribution != "uniform":
        raise ConfigError(
            f"--distribution: {settings.distribution} contradicts --pattern {settings.pattern}, which gives every "
            "layer the same density; must be uniform"
        )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"--{name}: {value}; must be one of {', '.join(allowed)}")


def _named(settings: PruneSettings, *names: str) -> dict[str, object]:
    return {name: value for name in names if (value := getattr(settings, name)) is not None}
