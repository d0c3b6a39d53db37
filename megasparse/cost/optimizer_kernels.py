"""Which kernel makes the optimizer steps of a run: for the plan, and its build before the run starts.

kernel = optimizer_kernel(config, "cpu", planned=True)      # "cpu" or "torch"
prepare_optimizer(config, "cpu")                            # builds it, if it is used
"""

from __future__ import annotations

from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.kernels.optimizer import cpu


def optimizer_kernel(config: RunConfig, device: str, *, planned: bool = False) -> str:
    """planned: what can be told without a build. Raises ConfigError where the kernel that was asked for cannot run."""
    asked = config.kernels.optimizer
    reason = None if asked == "torch" else cpu.why_not(device, planned)
    if asked == "cpu" and reason is not None:
        raise ConfigError(f"kernels.optimizer: cpu cannot be used here: {reason}; must be auto or torch")
    return "torch" if asked == "torch" or reason is not None else "cpu"


def prepare_optimizer(config: RunConfig, device: str) -> bool:
    """Build what the run wants to use; whether it can run as planned. Raises as ``optimizer_kernel`` does."""
    return optimizer_kernel(config, device, planned=True) == optimizer_kernel(config, device)


def optimizer_obstacle(config: RunConfig, device: str, *, planned: bool = False) -> str | None:
    """What keeps `auto` from the kernel for CPUs on a CPU; None where nothing does."""
    return cpu.why_not(device, planned) if config.kernels.optimizer == "auto" and device == "cpu" else None
