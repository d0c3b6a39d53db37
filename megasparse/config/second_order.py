"""The section `second_order`: pruning by an empirical Fisher matrix (Kurtic et al. 2022, arXiv 2203.07259)."""

from __future__ import annotations

from megasparse.config.section import PositiveFloat, PositiveInt, Section


class SecondOrderConfig(Section):
    fisher_block: PositiveInt = 16
    """Side B of the blocks of the Fisher matrix: neighbours in a row whose interaction is known. It divides the block
    sizes of the sparse matrices or is a multiple of them. Takes 4 B bytes a weight, divided as the optimizer state."""
    gradients: PositiveInt = 32
    """M: a topology update looks at the gradients of the last so many steps, back to the update before it at most."""
    damping: PositiveFloat = 0.01
    """Added to the diagonal of a block, times the mean of that diagonal over its active weights."""
