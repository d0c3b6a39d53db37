"""Kernels: pure functions on tensors. Of MegaSparse they import only `utils`.

``hybrid_attention`` computes attention under the patterns of hybrid sparse attention, ``block_sparse`` the products
of a linear layer whose weight is zero outside of active units. Each has a plain PyTorch reference and a table of the
kernels that can take its place; README.md says how one is added.
"""
