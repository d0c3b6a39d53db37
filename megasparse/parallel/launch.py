"""Who this process is, from what its launcher put into the environment.

environment = LaunchEnvironment.from_variables(os.environ)

Knows ``deepspeed`` and ``torchrun`` (RANK, LOCAL_RANK, WORLD_SIZE); a process that nobody launched is a run of one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LaunchEnvironment:
    """What the launcher said of this process."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_variables(cls, variables: Mapping[str, str]) -> LaunchEnvironment:
        """From RANK, LOCAL_RANK and WORLD_SIZE, as ``deepspeed`` and ``torchrun`` set them; without them one process.

        Raises ValueError where they are not numbers or contradict each other.
        """
        values = {}
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)):
            text = variables.get(name, str(default))
            if not text.isdecimal():
                raise ValueError(f"{name}: {text!r} in the environment is not a whole number")
            values[name] = int(text)
        if values["RANK"] >= values["WORLD_SIZE"]:
            raise ValueError(f"RANK: {values['RANK']} must be below WORLD_SIZE {values['WORLD_SIZE']}")
        return cls(values["RANK"], values["LOCAL_RANK"], values["WORLD_SIZE"])


def choose_accelerator(variables: MutableMapping[str, str]) -> str:
    """`cuda` or `cpu`, the choice of the user (DS_ACCELERATOR) before that of the machine.

    Writes it down for DeepSpeed, which looks when it is imported and otherwise warns that it had to guess.
    """
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return variables.setdefault("DS_ACCELERATOR", found)


def fill_rendezvous(environment: LaunchEnvironment) -> None:
    """Complete the variables that torch and DeepSpeed read. A process that no launcher started meets itself."""
    if environment.world_size == 1 and "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    for name, value in (("RANK", environment.rank), ("LOCAL_RANK", environment.local_rank)):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("WORLD_SIZE", str(environment.world_size))
