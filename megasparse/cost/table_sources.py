"""What is told of the tables that choose kernels: which of them decide here though they are of another machine.

table_warnings(config, kernels)     # ["kernels.tune never: no measurements of this machine ..."], or []
"""

from __future__ import annotations

from collections.abc import Iterator

from megasparse.config.schema import RunConfig
from megasparse.cost.layer_kernels import DTYPES, LayerKernels
from megasparse.kernels import block_sparse, hybrid_attention
from megasparse.kernels.block_sparse.break_even import TABLE as LAYERS_TABLE
from megasparse.kernels.common.tables import BreakEvenTable, this_machine
from megasparse.kernels.hybrid_attention.break_even import TABLE as ATTENTION_TABLE
from megasparse.sparsity.schedule import build_density_schedule
from megasparse.utils.dtypes import dtype_name


def table_warnings(config: RunConfig, kernels: LayerKernels) -> list[str]:
    """One sentence where measurements of another machine, or assumptions, decide about layers or attention.

    A device that is planned for and not there has no measurements; nothing is said of its assumptions.
    """
    device = kernels.device
    found: dict[str, dict[str, None]] = {}
    for what, table, kind in _decisions(config, kernels):
        if any(row.kind == kind for row in table.own_rows(device)):
            continue
        machine = table.stand_in(device, kind)
        if machine is not None or this_machine(device).hardware:
            source = "assumptions" if machine is None else f"those of {machine}"
            found.setdefault(source, {})[what] = None
    if not found:
        return []
    here = this_machine(device)
    decide = "; ".join(f"{source} decide about {' and '.join(whats)}" for source, whats in found.items())
    mend = "a run that starts here measures first" if config.kernels.tune == "auto" else "auto measures them"
    return [f"kernels.tune {config.kernels.tune}: no measurements of this machine ({here}): {decide}; {mend}"]


def patterns_of_run(config: RunConfig) -> list[str]:
    """The patterns that occur while the run trains, by name; `full` aside."""
    attention = config.attention
    if attention.windows is None:
        phases = {segment.phase for segment in build_density_schedule(config.sparsity).segments}
        scheduled = {pattern for phase, pattern in attention.phases.items() if phase in phases} - {"full"}
    else:
        scheduled = {window.pattern for window in attention.windows} - {"full"}
    # Exceptions hold while the schedule asks for a pattern.
    return sorted(scheduled | {override.pattern for override in attention.overrides} - {"full"}) if scheduled else []


def _decisions(config: RunConfig, kernels: LayerKernels) -> Iterator[tuple[str, BreakEvenTable, tuple[str, ...]]]:
    """(What is decided about, in which table, by which kind of rows)."""
    device, dtype = kernels.device, DTYPES[config.train.precision]
    for block_size in {shape.block_size for shape in kernels.shapes.values()}:
        backend, _ = block_sparse.explain(device, dtype, block_size, planned=True)
        if kernels.kernel == "auto" and kernels.forced_limit is None and backend is not None:
            yield "sparse layers", LAYERS_TABLE, (backend, dtype_name(dtype))
    if config.kernels.hybrid_attention != "auto":
        return
    for pattern in patterns_of_run(config):
        kernel = hybrid_attention.fast_kernel(device, dtype, config.model.head_dim, pattern=pattern, planned=True)
        if kernel != "reference":
            yield "attention", ATTENTION_TABLE, (kernel, pattern, dtype_name(dtype))
