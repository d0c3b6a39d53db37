"""Which kernel computes what lies between the products of a run: for the plan, and its build before the run starts.

kernel = elementwise_kernel(config, "cpu", planned=True)      # "cpu" or "torch"
prepare_elementwise(config, "cpu")                            # builds it, if it is used
"""

from __future__ import annotations

from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.kernels.elementwise import cpu


def elementwise_kernel(config: RunConfig, device: str, *, planned: bool = False) -> str:
    """planned: what can be told without a build. Raises ConfigError where the kernel that was asked for cannot run."""
    asked = config.kernels.elementwise
    reason = None if asked == "torch" else cpu.why_not(device, planned)
    if asked == "cpu" and reason is not None:
        raise ConfigError(f"kernels.elementwise: cpu cannot be used here: {reason}; must be auto or torch")
    return "torch" if asked == "torch" or reason is not None else "cpu"


def prepare_elementwise(config: RunConfig, device: str) -> bool:
    """Build what the run wants to use; whether it can run as planned. Raises as ``elementwise_kernel`` does."""
    return elementwise_kernel(config, device, planned=True) == elementwise_kernel(config, device)


def elementwise_obstacle(config: RunConfig, device: str, *, planned: bool = False) -> str | None:
    """What keeps `auto` from the kernels for CPUs on a CPU; None where nothing does."""
    return cpu.why_not(device, planned) if config.kernels.elementwise == "auto" and device == "cpu" else None
