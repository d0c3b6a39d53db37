"""Models: equations over the layers, with the counts and the sampling that belong to them."""

from megasparse.models.flops import FlopCount, count_flops
from megasparse.models.generate import generate
from megasparse.models.gpt import GPT

__all__ = ["GPT", "FlopCount", "count_flops", "generate"]
