"""Ranks that differ are refused on all of them, with one message that names rank and difference."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from harness import run_distributed

from megasparse.config.loader import ConfigError, load_config
from megasparse.data import IndexedDatasetWriter
from megasparse.data.record import make_record
from megasparse.launching import LaunchEnvironment
from megasparse.launching.identity import agree, check_steps, run_identity
from megasparse.launching.rendezvous import open_store
from megasparse.parallel import Mesh

CASES = {
    "optimizer.lr=1e-3": "rank 1: optimizer.lr is 0.001 instead of 0.0006",
    "optimizer.beta1=0.8": "rank 1: optimizer.beta1 is 0.8 instead of 0.9",
    "train.global_batch_size=64": "rank 1: train.global_batch_size is 64 instead of 32",
    "attention.stride=64": "rank 1: attention.stride is 64 instead of 128",
    "parallel.tensor_parallel_size=2": "rank 1: parallel.tensor_parallel_size is 2 instead of 1",
    "attention.dense_fallback=true": "rank 1: attention.dense_fallback is True instead of False",
    "data.train=[{path: b}]": "rank 1: data.train[0].path is b instead of a; data set a is ",
}


def write(folder: Path, name: str, tokens: list[int]) -> None:
    with IndexedDatasetWriter(folder / name, "uint16") as writer:
        writer.add_document(tokens)
        writer.finalize()


def compare(folder: Path) -> dict[str, str]:
    """What each case ends in on this rank; "" where it is accepted."""
    environment = LaunchEnvironment.from_variables(os.environ)
    rank, store, found = environment.rank, open_store(environment, 60), {}
    # Data that each host has for itself, under one name; rank 1's of the same size.
    os.chdir(folder / str(rank))

    def attempt(name: str, words: list[str], refusal: str | None = None, **changed: str) -> None:
        config = load_config([], ["data.train=[{path: a}]", "data.tokenizer=bytes", *words])
        own = run_identity(config, make_record(config, None), "cpu") | changed
        try:
            agree(dist.PrefixStore(name, store), environment, own, refusal)
            found[name] = ""
        except ConfigError as error:
            found[name] = str(error)

    os.chdir(folder / "0")
    attempt("equal", [])
    for override in CASES:
        attempt(override, [override] if rank == 1 else [])
    attempt("refusal", [], "rank 0 cannot" if rank == 0 else None)
    attempt("code", [], **{"megasparse/training/loop.py": "0" * 64} if rank else {})
    attempt("version", [], **{"version of torch": "1.0"} if rank else {})
    os.chdir(folder / str(min(rank, 1)))
    attempt("data", [])
    # Rank 0 keeps the store.
    time.sleep(2 if rank == 0 else 0)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("hosts")
    for rank in range(3):
        (folder / str(rank)).mkdir()
        write(folder / str(rank), "a", [1, 2, 3 + rank])
        write(folder / str(rank), "b", [1, 2, 3])
    return run_distributed(compare, 3, folder, timeout=120, with_mesh=False)


def test_equal_ranks_may_start(found: list[dict[str, str]]) -> None:
    assert [rank["equal"] for rank in found] == ["", "", ""]


@pytest.mark.parametrize("override", CASES)
def test_a_setting_of_one_rank_is_named_on_all(found: list[dict[str, str]], override: str) -> None:
    assert all(rank[override] == found[0][override] for rank in found)
    assert f"ranks differ from rank 0: {CASES[override]}" in found[0][override]
    assert found[0][override].endswith("; must be one configuration, one code and the same data on all ranks")


def test_code_is_named_by_its_file_and_ranks_that_differ_alike_together(found: list[dict[str, str]]) -> None:
    assert ": rank 1, 2: megasparse/training/loop.py is 000000000000 instead of " in found[2]["code"]
    assert ": rank 1, 2: version of torch is 1.0 instead of 2" in found[0]["version"]


def test_other_data_under_the_same_name_is_named(found: list[dict[str, str]]) -> None:
    assert all(rank["data"] == found[0]["data"] for rank in found)
    assert ": rank 1, 2: data set a.samples_sha256 is " in found[0]["data"]


def test_what_rank_0_alone_knows_ends_all(found: list[dict[str, str]]) -> None:
    assert [rank["refusal"] for rank in found] == ["rank 0 cannot"] * 3


def steps(mesh: Mesh) -> str:
    check_steps(mesh, 7)
    try:
        check_steps(mesh, 8 if mesh.rank == 2 else 7)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_at_different_steps_are_named() -> None:
    first, second, third = run_distributed(steps, 3, timeout=120)
    assert first == second == third and first.startswith("run.folder: rank 2 stands at step 8, rank 0 at step 7; must")
