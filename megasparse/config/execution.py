"""Sections that say how a run is carried out, not what it computes: kernels, layout on the ranks, DeepSpeed; see
``schema``."""

from __future__ import annotations

from typing import Any, Literal

from megasparse.config.section import Fraction, PositiveInt, Section


class KernelsConfig(Section):
    block_sparse: Literal["auto", "dense", "reference", "cpu", "triton"] = "auto"
    """Kernel of the sparse linear layers; auto takes, layer by layer, the fastest one that this machine supports."""
    break_even: Fraction | None = None
    """Density above which auto takes dense products; unset: as measured (tune, tools/tune_kernels.py)."""
    dense: Literal["auto", "torch", "onednn"] = "auto"
    """Dense products of linear layers and head on CPUs: torch's own, or oneDNN's, which torch carries too: in fp32 in
    place of MKL's, in bf16 with operands that it multiplies faster; auto takes the latter in layers where they were
    measured to be faster (tune)."""
    hybrid_attention: Literal["auto", "reference", "tiled", "cpu", "triton"] = "auto"
    """Kernel of the attention patterns; auto takes the fastest one that this machine supports."""
    elementwise: Literal["auto", "torch", "cpu", "triton"] = "auto"
    """Kernel of activations, norms and rotary positions: torch's operators, or kernels that go through memory once, in
    C++ on CPUs and in Triton on GPUs (gate of SwiGLU, rotary positions, residual sum with the norm after it); auto
    takes one of the latter where it can run."""
    optimizer: Literal["auto", "torch", "cpu"] = "auto"
    """Kernel of the optimizer step and the gradient norm: torch's operators over all weights, or a C++ kernel on CPUs
    that passes over inactive blocks; auto takes the latter where it can run."""
    loss: Literal["auto", "torch", "cpu"] = "auto"
    """Kernel of the cross entropy: torch's operators, or a C++ kernel on CPUs that goes through the logits once and
    makes no float32 copy of them; auto takes the latter where it can run."""
    tune: Literal["auto", "never"] = "auto"
    """auto: a run that starts on a machine where its layers and patterns were not measured with its precision and
    number of threads measures them first, once, for about 15 s, and keeps that in the cache folder. never: what is
    missing is taken from the measurements of another machine that MegaSparse is shipped with, with a warning."""


class ParallelConfig(Section):
    tensor_parallel_size: PositiveInt = 1
    """Ranks that share each layer; neighbours in the numbering of the ranks, best within one node."""
    sequence_parallel: bool = False
    """Between layers each of them holds its share of the tokens instead of all: fewer activations."""


class DeepSpeedConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 1
    """Divided over the data-parallel ranks: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu: optimizer state lies in host memory and is updated there (stages 1 to 3)."""
    gradient_accumulation_dtype: Literal["precision", "fp32"] = "precision"
    """In what the gradients of the micro-batches of a step are added up: that of train.precision, or fp32, which loses
    nothing however many they are (stages 2 and 3)."""
    extra: dict[str, Any] = {}
    """Further keys of DeepSpeed's own configuration, passed on as they are; keys that MegaSparse derives are
    refused."""
