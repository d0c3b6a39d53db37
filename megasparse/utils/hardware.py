"""What a number was measured on: processor or GPU, and versions of the packages."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("megasparse", "torch", "deepspeed", "numpy", "sentencepiece")


def describe_hardware(device: torch.device, world_size: int) -> str:
    """Such as `AMD EPYC, 2 cores, 2 ranks`; with several nodes, rank 0's."""
    name = hardware_name(device.type)
    return f"{name}, {os.cpu_count()} cores, {world_size} rank{'s' if world_size > 1 else ''}"


def package_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed as a package"
    return versions


@cache
def hardware_name(device: str) -> str:
    """Model of the processor, or of the GPU; empty for a GPU that is not there."""
    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return _processor_facts().get("model name") or platform.processor() or platform.machine()


@cache
def hardware_model(device: str) -> str:
    """Numbers of the processor's family and model, as `25.1`: virtual machines call many processors `AMD EPYC`.

    Empty for GPUs, whose names tell, and where the system does not say.
    """
    facts = {} if device == "cuda" else _processor_facts()
    numbers = [facts.get(name, "") for name in ("cpu family", "model")]
    return ".".join(numbers) if all(numbers) else ""


def _processor_facts() -> dict[str, str]:
    """What Linux says of the first core."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
