"""Which kernel computes the attention of a run: for the plan, and before the run starts.

    check_attention(config, "cpu", planned=True)         # ConfigError where kernels.hybrid_attention cannot run
    attention_kernels(config, "cpu", planned=True)       # "reference for full; cpu for local, strided, sparse, fixed"

`planned`: nothing is compiled, and the device need not be there. The layers decide for themselves in the same way
(``hybrid_attention.select_kernel``).
"""

from __future__ import annotations

from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.kernels import hybrid_attention
from megasparse.training.kernels import DTYPES


def attention_kernels(config: RunConfig, device: str, *, planned: bool = False) -> str:
    """Kernel of the attention, or the kernels with their patterns."""
    patterns: dict[str, list[str]] = {}
    shape = config.model.seq_length, config.attention.stride, device, DTYPES[config.train.precision]
    for pattern in hybrid_attention.PATTERNS:
        kernel = hybrid_attention.select_kernel(config.kernels.hybrid_attention, pattern, *shape, planned=planned)
        patterns.setdefault(kernel, []).append(pattern)
    if len(patterns) == 1:
        return next(iter(patterns))
    return "; ".join(f"{kernel} for {', '.join(names)}" for kernel, names in patterns.items())


def check_attention(config: RunConfig, device: str, *, planned: bool = False) -> None:
    """Raise ConfigError where a kernel that was asked for by name cannot run."""
    kernel, dtype = config.kernels.hybrid_attention, DTYPES[config.train.precision]
    try:
        hybrid_attention.check_kernel(kernel, device, dtype, planned=planned)
    except ValueError as error:
        raise ConfigError(f"kernels.hybrid_attention: {str(error).removeprefix('hybrid_attention kernel: ')}") from None


def prepare_attention(config: RunConfig, device: str) -> bool:
    """Build what the run wants to use, before any process group starts; whether it can run.

    One process builds, its neighbours wait. Raises ConfigError where a kernel that was asked for by name cannot run.
    """
    if not uses_compiled(config, device):
        return True
    check_attention(config, device)
    return hybrid_attention.why_slow(device, DTYPES[config.train.precision]) is None


def uses_compiled(config: RunConfig, device: str) -> bool:
    """Whether the run has the compiled kernel in view: by name, or for a pattern of long enough sequences."""
    asked, tokens = config.kernels.hybrid_attention, config.model.seq_length
    wanted = has_patterns(config) and tokens >= hybrid_attention.FASTER_FROM["cpu"]
    return device == "cpu" and (asked == "cpu" or (asked == "auto" and wanted))


def attention_warnings(config: RunConfig, device: str, *, planned: bool = False) -> list[str]:
    """What keeps `auto` from the compiled kernel, where it would be used."""
    if config.kernels.hybrid_attention != "auto" or not uses_compiled(config, device):
        return []
    reason = hybrid_attention.why_slow(device, DTYPES[config.train.precision], planned=planned)
    return [f"kernels.hybrid_attention auto uses no compiled kernel: {reason}"] if reason else []


def has_patterns(config: RunConfig) -> bool:
    """Whether any head is ever under another pattern than `full`."""
    attention = config.attention
    scheduled = attention.phases.values() if attention.windows is None else [w.pattern for w in attention.windows]
    return any(pattern != "full" for pattern in scheduled)
