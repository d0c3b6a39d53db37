"""Ranks of one run must be the same program with the same settings on the same data: compared before they start.

    own = run_identity(config, record, device)
    with open_mesh(environment, 1800, agree=lambda store: agree(store, environment, own)): ...

They compare in the store where they meet, before the first process group: groups of ranks that differ may wait for each
other for ever. A rank that has the digest of rank 0 is only counted. Nothing may differ today: paths too are those of
files that all hosts see under one name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.launching.environment import LaunchEnvironment
from megasparse.parallel.mesh import Mesh
from megasparse.utils.differences import differences, shown
from megasparse.utils.hardware import package_versions

PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = (".py", ".cpp", ".h")
MAX_DIFFERENCES = 8
"""Of a rank that a message names."""
MAX_GROUPS = 4
"""Groups of ranks that differ alike that a message names."""
FAREWELL_SECONDS = 30
"""How long rank 0, which keeps the store, waits for the others to read why the run is refused."""


def run_identity(config: RunConfig, record: Mapping[str, Any], device: str) -> dict[str, Any]:
    """What must be equal on all ranks, as JSON values by the names that a message gives them.

    config: as it was given, before anything in it was resolved for a machine. record: of ``data.record``. device: its
    type.
    """
    sources = {
        f"data set {source.path}": found
        for kind in ("train", "valid")
        for source, found in zip(getattr(config.data, kind) or (), record[kind], strict=True)
    }
    tokenizer = {"tokenizer_sha256": record["tokenizer_sha256"], "end_of_document": record["end_of_document"]}
    return {**config.model_dump(mode="json"), **sources, "tokenizer": tokenizer, "device": device, **_code()}


def agree(
    store: dist.Store, environment: LaunchEnvironment, own: Mapping[str, Any], refusal: str | None = None
) -> None:
    """Raise the same ConfigError on all ranks where one differs from rank 0, naming it and what differs.

    refusal: of rank 0, why there can be no run at all; raised on all ranks.
    """
    store, rank = dist.PrefixStore("megasparse/identity", store), environment.rank
    content = json.dumps(own)
    digest = hashlib.sha256(content.encode()).hexdigest()
    if rank == 0:
        store.set("identity", content)
        store.set("digest", digest)
        if environment.world_size > 1:
            store.wait(["all have compared"])
        # Ranks that do not differ are counted, not asked one by one.
        told = [json.loads(store.get(f"differences/{number}")) for number in range(1, store.add("different", 0) + 1)]
        store.set("verdict", refusal or _verdict(dict(sorted(told))))
    else:
        if store.get("digest").decode() != digest:
            differences = _differences(json.loads(store.get("identity")), own)
            store.set(f"differences/{store.add('different', 1)}", json.dumps([rank, differences]))
        if store.add("compared", 1) == environment.world_size - 1:
            store.set("all have compared", "")
    verdict = store.get("verdict").decode()
    if not verdict:
        return
    if store.add("read", 1) == environment.world_size:
        store.set("read by all", "")
    with contextlib.suppress(dist.DistError):
        store.wait(["read by all"], timedelta(seconds=FAREWELL_SECONDS))
    raise ConfigError(verdict)


def check_steps(mesh: Mesh, step: int) -> None:
    """Raise the same ConfigError on all ranks where they have loaded states of different steps."""
    first = int(mesh.from_first(torch.tensor(step)))
    rank = mesh.first_rank_where(step != first)
    if rank is not None:
        other = int(mesh.from_rank(torch.tensor(step), rank))
        raise ConfigError(
            f"run.folder: rank {rank} stands at step {other}, rank 0 at step {first}; must be one folder that all "
            "ranks see alike"
        )


def _code() -> dict[str, str]:
    """A digest of every source of the package by its path in there, and versions of what it stands on."""
    files = sorted(path for path in PACKAGE.rglob("*") if path.suffix in SOURCES)
    digests = {
        f"{PACKAGE.name}/{path.relative_to(PACKAGE).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    versions = package_versions(("megasparse", "torch", "deepspeed"))
    return digests | {f"version of {name}": version for name, version in versions.items()}


def _differences(first: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Told by a rank that is not as rank 0."""
    found = [f"{name} is {shown(there)} instead of {shown(here)}" for name, here, there in differences(first, own)]
    more = len(found) - MAX_DIFFERENCES
    return "; ".join(found[:MAX_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


def _verdict(answers: Mapping[int, str]) -> str:
    """The message of the run; empty where no rank has told a difference."""
    ranks: dict[str, list[int]] = {}
    for rank, answer in answers.items():
        if answer:
            ranks.setdefault(answer, []).append(rank)
    if not ranks:
        return ""
    groups = [f"rank {_listed(group)}: {answer}" for answer, group in ranks.items()]
    more = f"; and {len(groups) - MAX_GROUPS} more like these" if len(groups) > MAX_GROUPS else ""
    return (
        f"ranks differ from rank 0: {'; '.join(groups[:MAX_GROUPS])}{more}; must be one configuration, one code and "
        "the same data on all ranks"
    )


def _listed(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:MAX_DIFFERENCES]))
    return named + (f" and {len(ranks) - MAX_DIFFERENCES} more" if len(ranks) > MAX_DIFFERENCES else "")
