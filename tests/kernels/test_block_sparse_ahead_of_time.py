"""What Triton compiles the sparse linear layer to, for chips that are not here: spills, shared memory, tensor cores.

`python tests/kernels/ahead_of_time.py` prints the numbers of all defaults.
"""

from __future__ import annotations

import os
import re
from itertools import product
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import ahead_of_time as aot  # noqa: E402
from triton.runtime import driver  # noqa: E402

from megasparse.kernels.block_sparse import (  # noqa: E402
    activated,
    assign_slots,
    build_index,
    gpu,
    pack,
    triton_kernels,
    waves,
)
from megasparse.kernels.block_sparse.tiles import (  # noqa: E402
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Tile,
    default_tile,
    swapped_tile,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


USUAL = {
    ("sm_80", False): (32, 128),
    ("sm_90", False): (16, 64, 128),
    ("gfx942", False): (64,),
    ("sm_90", True): (32,),
}
"""Sizes of blocks by chip and storage, without `--exhaustive`."""
DEFAULTS = [
    pytest.param(
        chip, is_packed, size, marks=() if size in USUAL.get((chip, is_packed), ()) else pytest.mark.exhaustive
    )
    for chip, is_packed in [*((chip, False) for chip in aot.TARGETS), ("sm_90", True), ("sm_80", True)]
    for size in (16, 32, 64, 128)
]


@pytest.mark.parametrize("kernel", [FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT])
@pytest.mark.parametrize(("chip", "is_packed", "block_size"), DEFAULTS)
def test_defaults_in_bfloat16(chip, is_packed, block_size, kernel) -> None:
    made = aot.compile_kernel(kernel, block_size, BF16, chip, is_packed=is_packed)
    check_limits(made, chip)
    if chip == "gfx942":
        assert "v_mfma" in made.assembly
        return
    # Loads run ahead of the products only where each operand has two buffers or more.
    tile = default_tile(kernel, block_size, BF16)
    assert made.shared >= 2 * (tile.rows + tile.columns) * tile.depth * BF16.itemsize
    if kernel == WEIGHT_GRADIENT:
        check_room(made, tile, chip)
    # 16 bytes at a time, also where the columns of a tile come from several blocks.
    assert "cp.async.cg.shared.global" in made.assembly and ", 0x10, " in made.assembly
    if chip == "sm_90":
        assert "wgmma.mma_async" in made.assembly
    else:
        assert "mma.sync.aligned.m16n8k16" in made.assembly


@pytest.mark.parametrize("activation", activated.NAMES)
@pytest.mark.parametrize("kernel", [FORWARD, INPUT_GRADIENT])
@pytest.mark.parametrize(
    ("chip", "is_packed", "block_size"),
    [
        pytest.param(
            *place, marks=() if place in (("sm_80", False, 64), ("sm_90", True, 128)) else pytest.mark.exhaustive
        )
        for place in product(("sm_80", "sm_90"), (False, True), (16, 32, 64, 128))
    ],
)
def test_activations_in_bfloat16(chip, is_packed, block_size, kernel, activation) -> None:
    """As the product alone: nothing spills, and the loads and stores of z are wide too."""
    made = aot.compile_kernel(kernel, block_size, BF16, chip, is_packed=is_packed, activation=activation)
    alone = aot.compile_kernel(kernel, block_size, BF16, chip, is_packed=is_packed)
    check_limits(made, chip)
    assert made.shared == alone.shared and made.registers <= alone.registers + 14
    wide = r"ld\.global\S*\.v4" if kernel == INPUT_GRADIENT else r"st\.global\S*\.v4"
    more = len(re.findall(wide, made.assembly)) - len(re.findall(wide, alone.assembly))
    tile = default_tile(kernel, block_size, BF16)
    assert more == tile.rows * tile.columns // (tile.warps * 32 * 8)


@pytest.mark.parametrize(
    "kernel, block_size, dtype, chip, precision",
    [
        *((kernel, 128, FP32, "sm_80", "ieee") for kernel in (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)),
        (FORWARD, 16, FP32, "sm_90", "ieee"),
        (WEIGHT_GRADIENT, 16, FP32, "gfx942", "ieee"),
        (FORWARD, 64, FP32, "sm_80", "tf32"),
        (WEIGHT_GRADIENT, 64, FP32, "sm_90", "tf32"),
        (FORWARD, 64, FP16, "sm_80", "ieee"),
        (WEIGHT_GRADIENT, 128, FP16, "gfx942", "ieee"),
        (aot.SPLIT, 64, BF16, "sm_80", "ieee"),
        (aot.SPLIT, 128, BF16, "sm_90", "ieee"),
    ],
)
def test_other_defaults(kernel, block_size, dtype, chip, precision) -> None:
    made = aot.compile_kernel(kernel, block_size, dtype, chip, precision=precision)
    check_limits(made, chip)
    tensor_cores = "tf32" in made.assembly or "mma" in made.assembly.replace("mmap", "")
    if dtype == FP32 and chip != "gfx942":
        assert tensor_cores == (precision == "tf32")


@pytest.mark.parametrize(
    "kernel, block_size",
    [(INPUT_GRADIENT, 128), *(pytest.param(FORWARD, size, marks=pytest.mark.exhaustive) for size in (64, 128))],
)
def test_swapped_operands_are_the_widest_products(kernel, block_size) -> None:
    """256 tokens in one instruction, and half the instructions for a multiplication with blocks of 128."""
    tile = swapped_tile(block_size)
    made = aot.compile_kernel(kernel, block_size, BF16, "sm_90", tile)
    assert "wgmma.mma_async.sync.aligned.m64n256k16" in made.assembly and ", 0x10, " in made.assembly
    assert made.spills == 0 and made.shared <= aot.SHARED_LIMIT["sm_90"]
    # All registers of a processor: 64 Ki.
    assert made.registers * tile.warps * 32 <= 2**16
    default = default_tile(kernel, block_size, BF16)
    steps, share = [], {128: 0.6, 64: 0.9}[block_size]
    for each, of in ((tile, made), (default, aot.compile_kernel(kernel, block_size, BF16, "sm_90", default))):
        work = each.rows * each.columns * each.depth
        steps.append(aot.loop_instructions(of, "sm_90") * each.warps / work)
    assert steps[0] < share * steps[1]


def test_limits_are_seen_to_be_broken() -> None:
    """A tile far too large spills: the test above would tell."""
    tile = aot.Tile(256, 128, 64, warps=4, stages=4)
    made = aot.compile_kernel(FORWARD, 128, BF16, "sm_80", tile)
    assert made.spills > 0 and made.shared > aot.SHARED_LIMIT["gfx942"]


@pytest.fixture
def launches(monkeypatch):
    """Compiled kernels of every launch of ``gpu``, which are compiled for sm_90 and not run."""
    seen = []

    def launcher(function):
        def launch(grid):
            return lambda *args, **options: seen.append(function.run(*args, grid=grid, warmup=True, **options))

        return type("Launcher", (), {"__getitem__": lambda self, grid: launch(grid)})()

    names = ("product_kernel", "gradient_kernel", "sum_kernel")
    kernels = SimpleNamespace(**{name: launcher(getattr(triton_kernels, name)) for name in names})
    monkeypatch.setattr(gpu, "_kernels", lambda: kernels)
    # A number that no device has, because Triton keeps what it compiled by device.
    device = SimpleNamespace(
        get_current_target=lambda: aot.TARGETS["sm_90"],
        get_current_device=lambda: 1000,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(driver, "_active", device)
    return seen


@pytest.mark.parametrize("is_packed", [False, True])
def test_launches_compile_once_for_all_steps(launches, is_packed) -> None:
    """As Triton specializes the arguments of real launches: wide loads, and nothing new for other numbers of tokens or
    of active blocks, which would stall a run in the middle."""
    block_size = 64
    sets = []
    for tokens, num_active in ((300, 16), (304, 17), (512, 24)):
        mask = torch.zeros(64, dtype=torch.bool)
        mask[torch.randperm(64)[:num_active]] = True
        slots = assign_slots(mask, num_active + 1) if is_packed else None
        index = build_index(mask.view(8, 8), block_size, slot_blocks=slots)
        x, dy, weight = (torch.randn(rows, 8 * block_size).bfloat16() for rows in (tokens, tokens, 8 * block_size))
        weight = pack(weight, slots, block_size) if is_packed else weight
        launches.clear()
        gpu.forward(x, weight, torch.zeros(8 * block_size).bfloat16(), index)
        gpu.backward(dy, x, weight, index, (True, True, True))
        gpu.activated_forward(x, weight, None, index, "gelu")
        gpu.activated_input_gradient(dy, weight, index, "gelu", x)
        gpu.weight_gradient(dy, x, index, splits=2)
        assert len(launches) == 7
        sets.append([made.hash for made in launches])
        for made in launches[:6]:
            assert ", 0x10, " in made.asm["ptx"] and "wgmma.mma_async" in made.asm["ptx"]
    assert sets[0] == sets[1] == sets[2]


def check_room(made: aot.Compiled, tile: Tile, chip: str) -> None:
    """As many programs at once as the weight gradient is cut for, of 2^16 registers and most threads: 2,048."""
    memory = {"sm_80": 164, "sm_90": 228}[chip] * 1024
    device = waves.Processors(1, memory, 2**16, loads_fragments=chip == "sm_80")
    threads = tile.warps * 32
    # The assembler gives registers to a warp in units of 8 for each thread.
    real = min(memory // (made.shared + 1024), 2**16 // (threads * (-(-made.registers // 8) * 8)), 2048 // threads)
    assert waves.programs_at_once(tile, BF16, device) <= real


def check_limits(made: aot.Compiled, chip: str) -> None:
    assert made.spills == 0
    assert 0 < made.shared <= aot.SHARED_LIMIT[chip]
    # 255 is what one thread can have at all; above 168 fewer than three programs of four warps run at once.
    assert 0 < made.registers <= 192
