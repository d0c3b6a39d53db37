"""The forecast as tables on a terminal or in a log.

print_forecast(result, make_console())
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from megasparse.monitoring.console import print_facts, print_table
from megasparse.planning.chips import AS_OF, CHIPS
from megasparse.utils.format import (
    format_bytes,
    format_compact,
    format_count,
    format_decimal,
    format_factor,
    format_flops,
    format_phase,
    format_seconds,
    format_share,
)


def print_forecast(result: Mapping[str, Any], console: Console) -> None:
    """Everything that matters of ``forecast``'s result."""
    for part in (_print_summary, _print_phases, _print_memory, _print_layouts, _print_cases, _print_assumptions):
        part(result, console)
    for note in result["notes"]:
        console.print(f"note: {note}", soft_wrap=True, markup=False)


def print_chips(console: Console) -> None:
    """The table of constants, with sources."""
    rows = [
        {
            "chip": chip.name,
            "what it is": chip.title,
            "TFLOP/s": ", ".join(f"{name} {value / 1e12:g}" for name, value in sorted(chip.peak.items())),
            "memory": f"{chip.memory / 1e9:g} GB, {chip.memory_bandwidth / 1e12:.3g} TB/s",
            "node / network": f"{chip.link_bandwidth / 1e9:g} / {chip.network_bandwidth / 1e9:g} GB/s",
            "power": f"{chip.watts:g} W",
            "source": chip.source,
        }
        for chip in CHIPS.values()
    ]
    print_table(rows, console, f"Chips, as of {AS_OF}")


def _print_summary(result: Mapping[str, Any], console: Console) -> None:
    cluster, model, flops, time = (result[name] for name in ("cluster", "model", "flops", "time"))
    energy = result["energy"]
    whose = "the configuration's own layout" if result["layout"]["is_given"] else "the best layout that fits"
    node, network = (cluster[name] / 1e9 for name in ("link_bandwidth", "network_bandwidth"))
    links = f"{node:.3g} GB/s in a node, {network:.3g} GB/s a rank between nodes"
    of_dense = {
        kind: f"{format_flops(count)} ({format_share(count / flops['dense'])})" for kind, count in flops.items()
    }
    rows = {
        "Model": f"{format_count(model['parameters'])} parameters, {format_count(model['tokens'])} tokens",
        "Cluster": f"{cluster['count']:,} x {cluster['title']}, {cluster['nodes']:,} nodes; {links}",
        "Layout": f"{whose}: {result['layout']['words']}",
        "FLOPs": f"dense {format_flops(flops['dense'])}, algorithmic {of_dense['algorithmic']}, "
        f"expected executed {of_dense['executed']}",
        "Time": f"{format_seconds(time['seconds'])}, {format_count(time['gpu_hours'])} GPU hours, "
        f"{format_count(time['tokens_per_second'])} tokens/s",
        "Dense training": f"{format_seconds(time['dense_seconds'])} on the same layout at "
        f"{format_share(time['dense_share_of_peak'])} of the peak: {format_factor(time['speedup_over_dense'])} the "
        "time",
    }
    if energy is not None:
        rows["Energy"] = (
            f"{energy['megawatt_hours']:,.3g} MWh: {cluster['watts']:g} W a chip x time x PUE {energy['pue']:g}"
        )
    rows["Sent per rank"] = f"in a step: {_named_bytes(result['sent'])}"
    print_facts(f"Forecast of {result['run']}", rows, console)


def _print_phases(result: Mapping[str, Any], console: Console) -> None:
    rows = []
    grows = len({phase["num_layers"] for phase in result["phases"]}) > 1
    for phase in result["phases"]:
        parts = sorted(phase["step_seconds_by_part"].items(), key=lambda item: -item[1])[:4]
        largest = [f"{name.replace('_', ' ')} {format_share(value / phase['step_seconds'])}" for name, value in parts]
        flops = [format_share(phase["flops"][kind] / phase["flops"]["dense"]) for kind in ("algorithmic", "executed")]
        row = {
            "phase": format_phase(phase["name"]) + (f", {phase['num_layers']} layers" if grows else ""),
            "steps": f"{phase['start_step']:,} to {phase['end_step']:,}",
            "density, attention": f"{format_share(phase['density'])}, {phase['pattern']}",
            "FLOPs alg. / exec.": " / ".join(flops),
            "step": format_seconds(phase["step_seconds"]),
            "gradients, weights sent": format_bytes(phase["sent"]["gradient_reduce"] + phase["sent"]["weight_gather"]),
            "topology update +": format_seconds(phase["topology_step_extra_seconds"]),
            "most of it": ", ".join(largest),
        }
        rows.append(row)
    print_table(rows, console, "Predicted steps")


def _print_memory(result: Mapping[str, Any], console: Console) -> None:
    memory = dict(result["memory"])
    total, usable, chip = (memory.pop(name) for name in ("total", "usable", "chip"))
    line = f"{format_bytes(total)} of {format_bytes(usable)} usable ({format_bytes(chip)}): {_named_bytes(memory)}"
    print_facts("Memory per rank", {"": line}, console)


def _print_layouts(result: Mapping[str, Any], console: Console) -> None:
    rows = [
        {
            "": str(number),
            "tensor parallel": str(row["tensor_parallel_size"]),
            "ZeRO": str(row["zero_stage"]),
            "micro-batch": str(row["micro_batch_size"]),
            "recomputation": "yes" if row["recomputation"] else "no",
            "memory": format_bytes(row["memory"]),
            "time": format_seconds(row["seconds"]),
            "GPU hours": format_count(row["gpu_hours"]),
        }
        for number, row in enumerate(result["layouts"], 1)
    ]
    counts = f"{result['layouts_that_fit']} of {result['layouts_tried']} allowed ones fit"
    print_table(rows, console, f"Cheapest layouts ({counts})")


def _print_cases(result: Mapping[str, Any], console: Console) -> None:
    names = {"kernel_efficiency": "kernel efficiency alone", "all": "all assumptions"}
    rows = [
        {
            "changed": names[row["assumptions"]],
            "case": row["case"],
            "kernel efficiency": format_decimal(row["kernel_efficiency"], 2),
            "time": format_seconds(row["seconds"]),
            "dense over sparse": format_factor(row["speedup_over_dense"]),
        }
        for row in result["cases"]
    ]
    print_table(rows, console, "If assumptions are wrong")


def _print_assumptions(result: Mapping[str, Any], console: Console) -> None:
    rows = [
        {
            "name": row["name"],
            "used": format_compact(row["used"]) + (" (given)" if row["given"] else ""),
            "low / expected / high": " / ".join(format_compact(row[case]) for case in ("low", "expected", "high")),
            "meaning": row["meaning"] + (f"; {row['basis']}" if row["basis"] else ""),
        }
        for row in result["assumptions"]
    ]
    print_table(rows, console, "Assumptions (--assume name=value)")


def _named_bytes(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {format_bytes(value)}" for name, value in parts.items())
