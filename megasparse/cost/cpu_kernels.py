"""Which kernels a run uses beside those of layers and attention patterns, in C++ on CPUs, and in Triton for elementwise
work on GPUs: for the plan, and their build before the run starts.

    kernel = cpu_kernel(config, "elementwise", "cpu", planned=True)      # "cpu" or "torch"
    prepare_cpu_kernels(config, "cpu")                                   # builds what is used
"""

from __future__ import annotations

import torch

from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.kernels import cross_entropy, elementwise, optimizer

KERNELS = {"elementwise": elementwise.cpu, "optimizer": optimizer.cpu, "loss": cross_entropy.cpu}
"""By their setting in the section `kernels`."""


def cpu_kernel(config: RunConfig, name: str, device: str, *, planned: bool = False) -> str:
    """planned: what can be told without a build. Raises ConfigError where the kernel that was asked for cannot run."""
    asked = _asked(config, name)
    if asked == "triton" or (asked == "auto" and name == "elementwise" and device != "cpu"):
        return _triton(asked, device, planned)
    reason = None if asked == "torch" else KERNELS[name].why_not(device, planned)
    if asked == "cpu" and reason is not None:
        raise ConfigError(f"kernels.{name}: cpu cannot be used here: {reason}; must be auto or torch")
    return "torch" if asked == "torch" or reason is not None else "cpu"


def _triton(asked: str, device: str, planned: bool) -> str:
    """The elementwise kernels of a GPU. They take every precision of training."""
    reason = elementwise.gpu.why_not(device, torch.float32, planned)
    if asked == "triton" and reason is not None:
        raise ConfigError(f"kernels.elementwise: triton cannot be used here: {reason}; must be auto or torch")
    return "triton" if reason is None else "torch"


def prepare_cpu_kernels(config: RunConfig, device: str) -> bool:
    """Build what the run wants to use; whether all can run as planned. Raises as ``cpu_kernel`` does."""
    # All are built, whatever comes of the first.
    return all([cpu_kernel(config, name, device, planned=True) == cpu_kernel(config, name, device) for name in KERNELS])


def cpu_kernel_obstacles(config: RunConfig, device: str, *, planned: bool = False) -> dict[str, str]:
    """What keeps `auto` from these kernels on a CPU, by setting; empty where nothing does."""
    asked = [name for name in KERNELS if device == "cpu" and _asked(config, name) == "auto"]
    return {name: reason for name in asked if (reason := KERNELS[name].why_not(device, planned)) is not None}


def _asked(config: RunConfig, name: str) -> str:
    """torch.compile joins torch's own operators between the products, and no others."""
    is_traced = name == "elementwise" and config.train.compile == "blocks"
    return "torch" if is_traced else getattr(config.kernels, name)
