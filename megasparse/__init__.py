"""MegaSparse: distributed pretraining of transformer language models with Mixed Sparsity Training.

The map of the package is in ``megasparse/README.md``; the entry of a run is ``launch/pretrain.py``.
"""

__version__ = "0.1.0"
