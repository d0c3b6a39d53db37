"""What limits block-sparse products on a GPU, by hand."""

from __future__ import annotations

import pytest

from megasparse.cost.layer_kernels import LayerShape
from megasparse.planning.sparse_products import SparseLimits
from megasparse.planning.workload import Product

H100 = SparseLimits(dense=800e12, cache=6e12, memory=3e12, bytes_per_value=2)


def product(block_size: int, widths: tuple[int, int], density: float = 0.1, tokens: int = 16384) -> Product:
    return Product(1, LayerShape(block_size, tokens, widths), density, density)


@pytest.mark.parametrize(("block_size", "widths"), [(64, (1600, 6400)), (128, (4096, 4096))])
def test_the_cache_limits_small_blocks(block_size, widths) -> None:
    """A tile of 128 x b values and a block of b x b, of 2 bytes, for 2 x 128 x b x b FLOPs."""
    flops_per_byte = 2 * 128 * block_size**2 / (2 * (128 * block_size + block_size**2))
    assert H100.efficiency(product(block_size, widths)) == pytest.approx(flops_per_byte * 6e12 / 800e12)


def test_the_memory_limits_narrow_layers() -> None:
    """Input and output of 16,384 tokens x 1,600 values, and a tenth of the weights, once."""
    moved, flops = 2 * (2 * 16384 * 1600 + 0.1 * 1600**2), 2 * 16384 * 0.1 * 1600**2
    assert H100.efficiency(product(128, (1600, 1600))) == pytest.approx(flops / 800e12 / (moved / 3e12))


def test_without_known_limits_the_cores_decide() -> None:
    assert SparseLimits(dense=800e12).efficiency(product(16, (256, 256))) == 1.0


def test_more_density_and_larger_blocks_never_lower_it() -> None:
    found = [H100.efficiency(product(block, (4096, 4096), d)) for block in (16, 32, 64, 128) for d in (0.05, 0.1, 0.5)]
    assert found == pytest.approx(sorted(found)) and 0 < found[0] < found[-1] < 1
