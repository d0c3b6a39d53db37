"""What a number was measured on: processor or GPU, and versions of the packages."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from megasparse.kernels.block_sparse.break_even import hardware_name

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
