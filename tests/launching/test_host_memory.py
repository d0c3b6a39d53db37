"""Host memory on CPUs: pages of 2 MiB, and freed tensors that stay with the process until it gives them back."""

from __future__ import annotations

import gc
import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megasparse.launching import host_memory
from megasparse.launching.host_memory import MALLOC_VARIABLES, use_huge_pages


def test_huge_pages_are_asked_for_unless_the_user_has_decided() -> None:
    for decided, wanted in (({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")):
        variables = dict(decided)
        use_huge_pages(variables)
        assert variables == {"THP_MEM_ALLOC_ENABLE": wanted}


ROOT = Path(__file__).resolve().parents[2]
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FILLED = """
import os
import torch
from megasparse.launching.host_memory import use_huge_pages

use_huge_pages(os.environ)
x = torch.ones(2**24)
print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="the system has no huge pages to give"
)
def test_torch_asks_for_huge_pages_also_after_its_import() -> None:
    variables = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", FILLED], env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # KiB; a system that is short of memory in one piece may have given fewer than the 32 that were asked for.
    assert int(done.stdout) >= 2048


FREED = """
import os
import torch
from megasparse.launching import keep_host_memory
from megasparse.launching.host_memory import return_memory


def resident() -> int:
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))


keep_host_memory(os.environ)
before = resident()
# The second one lies behind the first, so that the first leaves a hole.
x, behind = torch.ones(2**26), torch.ones(2**22)
held = resident()
del x
freed = resident()
return_memory(torch.device("cpu"))
print(before, held, freed, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep what was freed")
@pytest.mark.parametrize(
    ("decided", "is_kept"),
    [
        ({}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, False),
    ],
)
def test_freed_tensors_stay_until_they_are_given_back_unless_the_user_has_decided(decided, is_kept: bool) -> None:
    variables = {name: value for name, value in os.environ.items() if name not in (*MALLOC_VARIABLES, "GLIBC_TUNABLES")}
    done = subprocess.run(
        [sys.executable, "-c", FREED], env=variables | decided, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    before, held, freed, returned = map(int, done.stdout.split())  # MiB, of which 256 and 16 are the tensors
    assert held - before > 250
    assert (held - freed < 64) if is_kept else (held - freed > 192)
    assert held - returned > 192


def test_another_c_library_is_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    assert not host_memory.keep_freed_memory({})
    host_memory.return_memory(torch.device("cpu"))


def test_pretraining_on_a_cpu_asks_for_it_before_it_begins(monkeypatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("megasparse.launching.keep_host_memory", lambda variables: calls.append("memory"))
    monkeypatch.setattr("megasparse.training.run.pretrain", lambda *_: calls.append("training"))
    monkeypatch.setattr("megasparse.launching.failures.exit_now", lambda status: None)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", str(ROOT / "configs" / "quickstart.yaml")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "launch" / "pretrain.py"), run_name="__main__")
    assert ended.value.code == 0 and calls == ["memory", "training"]
