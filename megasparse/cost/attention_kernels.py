"""Which kernel computes the attention of a run: for the plan, and before the run starts.

    config = resolve_dense_fallback(config, "cpu")        # which patterns full attention runs in place of
    check_attention(config, "cpu", planned=True)         # ConfigError where kernels.hybrid_attention cannot run
    attention_kernels(config, "cpu", planned=True)       # "causal for full; cpu for local, strided, sparse, fixed"

`planned`: nothing is compiled, and the device need not be there. The layers decide for themselves in the same way
(``hybrid_attention.select_kernel``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from megasparse.config.loader import ConfigError, load_config
from megasparse.config.schema import RunConfig
from megasparse.cost.layer_kernels import DTYPES
from megasparse.kernels import hybrid_attention
from megasparse.kernels.hybrid_attention import break_even
from megasparse.parallel import Mesh


def attention_kernels(config: RunConfig, device: str, *, planned: bool = False) -> str:
    """Kernel of the attention, or the kernels with their patterns."""
    asked, wide = config.kernels.hybrid_attention, config.attention.widened_patterns
    masked = config.data.document_masking
    shape = config.model.seq_length, config.attention.stride, *_place(config, device)
    found: dict[str, list[str]] = {}
    for pattern in hybrid_attention.PATTERNS:
        runs = "full" if pattern in wide else pattern
        kernel = hybrid_attention.select_kernel(asked, runs, *shape, documents=masked, planned=planned)
        found.setdefault(kernel, []).append(f"{pattern} (as full)" if pattern in wide else pattern)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{kernel} for {', '.join(names)}" for kernel, names in found.items())


def check_attention(config: RunConfig, device: str, *, planned: bool = False) -> None:
    """Raise ConfigError where a kernel that was asked for by name cannot run."""
    try:
        hybrid_attention.check_forced(config.kernels.hybrid_attention, *_place(config, device), planned=planned)
    except ValueError as error:
        raise ConfigError(f"kernels.hybrid_attention: {str(error).removeprefix('hybrid_attention kernel: ')}") from None


def prepare_attention(config: RunConfig, device: str) -> bool:
    """Build what the run wants to use, before any process group starts; whether it can run.

    One process builds, its neighbours wait. Raises ConfigError where a kernel that was asked for by name cannot run.
    """
    if not uses_compiled(config, device):
        return True
    check_attention(config, device)
    return hybrid_attention.why_slow(*_place(config, device)) is None


def uses_compiled(config: RunConfig, device: str) -> bool:
    """Whether the run has the compiled kernel for CPUs in view: by name, for a pattern of long enough sequences, or for
    full attention with documents or where it was measured to be faster."""
    asked, attention = config.kernels.hybrid_attention, config.attention
    if device != "cpu" or asked not in ("auto", "cpu"):
        return False
    place, seq_length = _place(config, device), config.model.seq_length
    named = attention.named_patterns() - attention.widened_patterns
    limits = (break_even.mask_limit("cpu", pattern, attention.stride, *place) for pattern in named - {"full"})
    masked = config.data.document_masking and seq_length >= break_even.SHORTEST_FULL
    full_too = masked or break_even.computes_full_faster("cpu", *place, seq_length)
    return asked == "cpu" or full_too or any(seq_length >= limit for limit in limits)


def attention_warnings(config: RunConfig, device: str, *, planned: bool = False) -> list[str]:
    """Patterns in whose place full attention runs; an unreadable table; what keeps `auto` from the compiled kernel."""
    found = []
    if config.kernels.hybrid_attention == "auto":
        if problem := break_even.TABLE.problem():
            found.append(problem)
        reason = hybrid_attention.why_slow(*_place(config, device), planned=planned)
        if reason and uses_compiled(config, device):
            found.append(f"kernels.hybrid_attention auto uses no compiled kernel: {reason}")
    if wide := sorted(config.attention.widened_patterns & config.attention.named_patterns()):
        found.append(f"attention.dense_fallback: full attention runs in place of {', '.join(wide)}")
    return found


def resolve_dense_fallback(config: RunConfig, device: str, saved: Path | None = None) -> RunConfig:
    """The configuration with a list of patterns in place of attention.dense_fallback: true.

    saved: configuration that the run was last started with; its list holds on, whatever has been measured since.
    """
    if config.attention.dense_fallback is not True:
        return config
    if saved is not None and saved.is_file():
        with suppress(ConfigError):  # what is wrong with it is told when the run goes on
            before = load_config([saved]).attention.dense_fallback
            if isinstance(before, list):
                return with_dense_fallback(config, before)
    named = sorted(config.attention.named_patterns())
    shape = config.model.seq_length, config.attention.stride, *_place(config, device)
    runs = hybrid_attention.widened(config.kernels.hybrid_attention, named, *shape)
    return with_dense_fallback(config, [name for name, other in zip(named, runs, strict=True) if name != other])


def with_dense_fallback(config: RunConfig, patterns: Sequence[str]) -> RunConfig:
    attention = config.attention.model_copy(update={"dense_fallback": list(patterns)})
    return config.model_copy(update={"attention": attention})


def agree_on_dense_fallback(config: RunConfig, mesh: Mesh) -> RunConfig:
    """The patterns of rank 0 on all ranks: each may have a table of its own."""
    wide = [int(name in config.attention.widened_patterns) for name in hybrid_attention.PATTERNS]
    first = mesh.from_first(torch.tensor(wide)).tolist()
    agreed = sorted(name for name, is_wide in zip(hybrid_attention.PATTERNS, first, strict=True) if is_wide)
    return config if agreed == sorted(config.attention.widened_patterns) else with_dense_fallback(config, agreed)


def _place(config: RunConfig, device: str) -> tuple[str, torch.dtype, int]:
    return device, DTYPES[config.train.precision], config.model.head_dim
