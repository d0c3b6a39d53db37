"""What is asked of a quantisation, and the checks that need no model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megasparse.config.loader import ConfigError
from megasparse.kernels.quantized import BITS

ACTIVATIONS = ("int8", "float")
ROUNDINGS = ("nearest", "discquant")
GROUP = 32
"""Inputs that share a scale at 3 and 4 bits, where nothing is said; at 8 bits all inputs of an output share one."""


@dataclass(frozen=True)
class QuantizeSettings:
    """The command line; meanings are in ``tools/quantize.py --help``. None: nothing was said."""

    model: Path
    output: Path
    bits: int = 8
    group: int | None = None
    activations: str | None = None
    smoothing: float | None = None
    rounding: str = "nearest"
    keep_float: tuple[str, ...] = ()
    calibration: str | None = None
    samples: int | None = None
    window: int | None = None
    seed: int | None = None
    steps: int | None = None
    batch: int | None = None
    lr: float | None = None
    strength: float | None = None
    device: str = "cpu"

    @property
    def group_or_default(self) -> int | None:
        return GROUP if self.group is None and self.bits < 8 else self.group

    @property
    def activations_or_default(self) -> str:
        if self.activations is not None:
            return self.activations
        return "int8" if self.bits == 8 and self.group is None else "float"

    @property
    def needs_calibration(self) -> bool:
        return self.smoothing is not None or self.rounding == "discquant"


def check_settings(settings: QuantizeSettings) -> None:
    """Raise ConfigError for settings that are wrong, contradict each other, or would be ignored."""
    for name, value, allowed in (
        ("bits", settings.bits, BITS),
        ("activations", settings.activations_or_default, ACTIVATIONS),
        ("rounding", settings.rounding, ROUNDINGS),
    ):
        if value not in allowed:
            raise ConfigError(f"--{name}: {value}; must be one of {', '.join(map(str, allowed))}")
    if settings.activations == "int8" and (settings.bits < 8 or settings.group is not None):
        given = f"--bits {settings.bits}" if settings.bits < 8 else f"--group {settings.group}"
        raise ConfigError(f"--activations: int8 with {given}; must be float, or 8 bits without groups")
    if settings.smoothing is not None and settings.activations_or_default != "int8":
        raise ConfigError(
            f"--smoothing: {settings.smoothing:g}; must be left out: it is for --activations int8, which are float here"
        )
    if settings.smoothing is not None and not 0.0 < settings.smoothing < 1.0:
        raise ConfigError(f"--smoothing: {settings.smoothing:g}; must be above 0 and below 1")
    if settings.rounding == "discquant" and settings.bits == 8:
        raise ConfigError("--rounding: discquant with --bits 8; must be nearest, or 3 or 4 bits")
    _check_calibration(settings)
    for name, smallest in (("group", 1), ("samples", 1), ("window", 2), ("steps", 1), ("batch", 1)):
        number = getattr(settings, name)
        if number is not None and number < smallest:
            raise ConfigError(f"--{name}: {number}; must be at least {smallest}")
    for name in ("lr", "strength"):
        number = getattr(settings, name)
        if number is not None and not 0.0 < number < math.inf:
            raise ConfigError(f"--{name}: {number:g}; must be above 0 and finite")


def _check_calibration(settings: QuantizeSettings) -> None:
    if settings.needs_calibration and settings.calibration is None:
        why = "--smoothing" if settings.smoothing is not None else "--rounding discquant"
        raise ConfigError(f"--calibration: missing; {why} needs a text or a token file")
    unused = {} if settings.calibration is not None else _named(settings, "--calibration", "samples", "window", "seed")
    if settings.rounding != "discquant":
        unused |= _named(settings, "--rounding discquant", "steps", "batch", "lr", "strength")
    for name, (value, purpose) in unused.items():
        raise ConfigError(f"--{name}: {value}; must be left out: it is for {purpose}")


def _named(settings: QuantizeSettings, purpose: str, *names: str) -> dict[str, tuple[object, str]]:
    return {name: (value, purpose) for name in names if (value := getattr(settings, name)) is not None}
