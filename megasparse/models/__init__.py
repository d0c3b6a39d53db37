"""Models: equations over the layers, and building one from a configuration."""

from megasparse.models.build import build_model
from megasparse.models.gpt import GPT

__all__ = ["GPT", "build_model"]
