"""What Triton compiles hybrid sparse attention to, for chips that are not here: spills, shared memory, tensor cores.

`python tests/kernels/attention_ahead_of_time.py` prints the numbers of all launches.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import attention_ahead_of_time as aot  # noqa: E402
from ahead_of_time import SHARED_LIMIT, TARGETS  # noqa: E402
from attention_ahead_of_time import FORWARD, KEYS, QUERIES  # noqa: E402
from triton.runtime import driver  # noqa: E402

from megasparse.kernels.hybrid_attention import gpu, gpu_tiles, operators  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize(
    "kernel, launch, dtype, head_dim, chip, masked",
    [
        (FORWARD, "sparse rows", BF16, 64, "sm_80", True),
        (QUERIES, "fixed", BF16, 64, "sm_80", False),
        (KEYS, "sparse rows", BF16, 128, "sm_80", False),
        (FORWARD, "fixed", BF16, 64, "sm_90", False),
        (QUERIES, "sparse tiles 2", BF16, 128, "sm_90", False),
        (KEYS, "strided tiles", FP16, 80, "sm_90", True),
        (FORWARD, "fixed", BF16, 128, "gfx942", False),
        (QUERIES, "sparse rows", BF16, 64, "gfx942", False),
        (KEYS, "sparse tiles 1", FP16, 96, "gfx942", False),
        (KEYS, "fixed", FP32, 64, "sm_80", False),
    ],
)
def test_launches_fit(kernel, launch, dtype, head_dim, chip, masked) -> None:
    made = aot.compile_kernel(kernel, launch, dtype, head_dim, chip, masked=masked, heads=2 if masked else 1)
    assert made.spills == 0
    assert 0 < made.shared <= SHARED_LIMIT[chip]
    assert 0 < made.registers <= (512 if chip == "gfx942" else 255)
    if dtype != FP32:
        units = {"sm_80": "mma.sync.aligned.m16n8k16", "sm_90": "wgmma.mma_async", "gfx942": "v_mfma"}
        assert units[chip] in made.assembly
        # 16 bytes of a row at a time.
        wide = {"sm_80": "cp.async.cg.shared.global", "sm_90": "cp.async.cg.shared.global", "gfx942": "_dwordx4"}
        assert wide[chip] in made.assembly


def test_tiles_of_short_residues_are_short() -> None:
    for length, side in ((3, 16), (17, 32), (33, 64), (1000, 64)):
        tile = gpu_tiles.forward_tile(aot.LAUNCHES["strided tiles"], length, BF16, 64)
        assert (tile.queries, tile.keys) == (side, side)


@pytest.fixture
def launches(monkeypatch):
    """Compiled kernels of every launch of ``gpu``, which are compiled for sm_90 and not run."""
    seen = []

    def launcher(function):
        def launch(grid):
            return lambda *args, **options: seen.append(function.run(*args, grid=grid, warmup=True, **options))

        return type("Launcher", (), {"__getitem__": lambda self, grid: launch(grid)})()

    real = vars(gpu._kernels())
    kernels = SimpleNamespace(**{name: launcher(function) for name, function in real.items()})
    monkeypatch.setattr(gpu, "_kernels", lambda: kernels)
    # A number that no device has, because Triton keeps what it compiled by device.
    device = SimpleNamespace(
        get_current_target=lambda: TARGETS["sm_90"],
        get_current_device=lambda: 1001,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(driver, "_active", device)
    return seen


def test_launches_compile_once_for_all_lengths(launches) -> None:
    """As Triton specializes the arguments of real launches: wide loads, and nothing new for other numbers of tokens,
    documents or strides, which would stall a run in the middle."""
    sets = []
    for seq_length, stride in ((301, 16), (304, 33), (512, 128)):
        shapes = [(2, seq_length, heads, 64) for heads in (2, 1, 1)]
        q, k, v = (torch.randn(shape).bfloat16().transpose(1, 2).requires_grad_() for shape in shapes)
        documents = torch.zeros(2, seq_length, dtype=torch.int64)
        launches.clear()
        settings = ["local"] * 2, stride, documents, [0] * 2
        operators.attend("triton", q, k, v, *settings).backward(torch.zeros_like(q))
        assert len(launches) == 3
        sets.append([made.hash for made in launches])
        for made in launches:
            assert "cp.async.cg.shared.global" in made.asm["ptx"] and "wgmma.mma_async" in made.asm["ptx"]
    assert sets[0] == sets[1] == sets[2]
