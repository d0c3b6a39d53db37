"""The forecast of a run on a cluster: FLOPs, memory, traffic, step time by phase, total time and energy, best layouts.

    result = forecast(config, cluster, assumptions)

One process on a CPU, no process group; the model has shapes only. Every number about time is extrapolated: from data
sheets and assumptions, or from rates measured on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from megasparse.config.checks import check_run
from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.config.stages import stages
from megasparse.cost.ledger import FlopCounter, Flops
from megasparse.cost.resources import memory_per_rank
from megasparse.planning.assumptions import CASES, Assumptions
from megasparse.planning.chips import AS_OF
from megasparse.planning.cluster import Cluster
from megasparse.planning.layout import Layout, layout_fault, possible_counts, possible_layouts, tensor_parallel_sizes
from megasparse.planning.rates import Rates, sheet_rates
from megasparse.planning.step_time import StepModel
from megasparse.planning.workload import Shards, Stretch
from megasparse.sparsity.schedule import settings_at
from megasparse.training.plan import resolve_storage

MAKE_RATES = Callable[[Cluster, str, Assumptions], Rates]
Work = Sequence[tuple[StepModel, tuple[Stretch, ...]]]
"""The stages of a run (section `stacking`), each with the model of its steps."""
HOUR = 3600.0


@dataclass(frozen=True)
class Planner:
    """A model and a schedule on a cluster; layouts are tried one after the other."""

    config: RunConfig
    cluster: Cluster
    assumptions: Assumptions
    shards: Shards
    make_rates: MAKE_RATES = sheet_rates

    @property
    def usable_memory(self) -> float:
        return self.cluster.chip.memory * (1.0 - self.assumptions["memory_reserve"])

    @cached_property
    def sizes(self) -> list[int]:
        """Tensor-parallel sizes within a node with which every rank holds whole heads and blocks."""
        found = []
        for size in tensor_parallel_sizes(self.config, self.cluster.ranks_per_node):
            try:
                self.shards.model(Layout(size, 1, 1, False).applied_to(self.config))
            except ConfigError:
                continue
            found.append(size)
        return found

    def memory(self, config: RunConfig) -> dict[str, int]:
        """At its peak over the run."""
        schedule, kinds = self.shards.controller(config).schedule, {}
        for step in self.shards.settled_steps(config):
            own, stored = settings_at(config, schedule, step), self.shards.stored(config, step)
            kinds[own.train.micro_batch_size, id(stored)] = own, stored
        found = [memory_per_rank(own, stored, self.cluster.count) for own, stored in kinds.values()]
        return max(found, key=lambda parts: parts["total"])

    def fits(self, layout: Layout) -> bool:
        return self.memory(layout.applied_to(self.config))["total"] <= self.usable_memory

    def work(self, config: RunConfig, assumptions: Assumptions) -> Work:
        """Of the stages of the run, the whole model last."""
        found = []
        for stage in stages(config):
            rates = self.make_rates(self.cluster, stage.train.precision, assumptions)
            shard, controller = self.shards.model(stage), self.shards.controller(stage)
            steps = StepModel(stage, self.cluster, rates, assumptions, shard, controller, self.shards)
            found.append((steps, self.shards.stretches(stage)))
        return found

    def row(self, layout: Layout, memory: int) -> dict[str, Any]:
        """What a layout costs, in short."""
        config = layout.applied_to(self.config)
        seconds = total_seconds(self.work(config, self.assumptions))
        return {
            **asdict(layout),
            "words": layout.words(),
            "memory": memory,
            "seconds": seconds,
            "gpu_hours": seconds * self.cluster.count / HOUR,
        }


def forecast(
    config: RunConfig,
    cluster: Cluster,
    assumptions: Assumptions,
    *,
    top: int = 5,
    make_rates: MAKE_RATES = sheet_rates,
    measured: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Plain numbers and strings, as printed and as JSON. measured: what a probe of this machine found, to be shown.

    Raises ConfigError where nothing can be planned: an impossible setting, a number of ranks that no layout can use, a
    model that fits in no layout.
    """
    _check(config, cluster)
    shards = Shards.of(config)
    config, choice = resolve_storage(config, shards.vocab_size, cluster.count, cluster.chip.device)
    # Blocks that do not fit the ranks of the configuration itself are an error of it.
    shards.controller(config)
    planner = Planner(config, cluster, assumptions, shards, make_rates)
    given = Layout.of(config)
    candidates = possible_layouts(config, cluster.count, planner.sizes)
    needs = {layout: planner.memory(layout.applied_to(config))["total"] for layout in candidates}
    rows = [planner.row(layout, need) for layout, need in needs.items() if need <= planner.usable_memory]
    if not rows:
        raise ConfigError(_nothing_fits(planner, needs))
    rows.sort(key=lambda row: (row["seconds"], row["memory"]))
    best = Layout(*(rows[0][name] for name in Layout.__dataclass_fields__))
    chosen = given if not layout_fault(config, cluster.count) and planner.fits(given) else best
    return {
        "run": config.run.name,
        "cluster": _cluster_facts(cluster),
        "assumptions": list(assumptions.rows()),
        "measured": measured,
        "layout": {**asdict(chosen), "words": chosen.words(), "is_given": chosen == given},
        **_details(planner, chosen.applied_to(config)),
        "layouts": rows[:top],
        "layouts_that_fit": len(rows),
        "layouts_tried": len(needs),
        "notes": [
            *([f"sparsity.storage auto takes {choice.storage}: {choice.reason}"] if choice else []),
            *_notes(planner, given, measured),
        ],
    }


def total_seconds(work: Work) -> float:
    total = 0.0
    for steps, found in work:
        interval = steps.config.sparsity.update_interval
        for moment in (moment for stretch in found for moment in stretch.moments):
            step = steps.step(moment)
            total += moment.steps * (step.seconds + step.topology_extra / interval)
    return total


def _details(planner: Planner, config: RunConfig) -> dict[str, Any]:
    """Everything about one layout."""
    work = planner.work(config, planner.assumptions)
    steps, _ = work[-1]
    phases = [_phase(stage, stretch) for stage, found in work for stretch in found]
    seconds = sum(phase["seconds"] for phase in phases)
    flops = {kind: sum(phase["flops"][kind] for phase in phases) for kind in ("dense", "algorithmic", "executed")}
    dense = _dense_seconds(work, planner)
    tokens = config.train.global_batch_size * config.model.seq_length
    return {
        "model": {
            "parameters": steps.shard.num_parameters(),
            "sparsifiable": sum(topology.numel for topology in steps.controller.topologies.values()),
            "tokens": tokens * config.train.steps,
        },
        "flops": flops,
        "phases": phases,
        "memory": {**planner.memory(config), "usable": planner.usable_memory, "chip": planner.cluster.chip.memory},
        "sent": steps.sent,
        "time": {
            "seconds": seconds,
            "gpu_hours": seconds * planner.cluster.count / HOUR,
            "tokens_per_second": tokens * config.train.steps / seconds,
            "share_of_peak": flops["algorithmic"] / (seconds * steps.rates.peak * planner.cluster.count),
            "dense_seconds": dense,
            "dense_share_of_peak": flops["dense"] / (dense * steps.rates.peak * planner.cluster.count),
            "speedup_over_dense": dense / seconds,
        },
        "energy": _energy(planner, seconds),
        "cases": _cases(planner, config),
    }


def _phase(steps: StepModel, stretch: Stretch) -> dict[str, Any]:
    """Means over the steps of a stretch."""
    counter = FlopCounter(steps.config, steps.shard, steps.kernels)
    found = [(moment.steps, steps.step(moment)) for moment in stretch.moments]
    parts = {name: sum(n * step.parts[name] for n, step in found) / stretch.steps for name in found[0][1].parts}
    flops = Flops()
    for moment in stretch.moments:
        flops.add(moment.flops(counter, steps.config.sparsity.update_interval))
    return {
        "name": stretch.phase,
        "pattern": stretch.pattern,
        "num_layers": steps.config.model.num_layers,
        "start_step": stretch.start_step,
        "end_step": stretch.end_step,
        "density": sum(moment.steps * moment.density for moment in stretch.moments) / stretch.steps,
        "flops": asdict(flops),
        "step_seconds": sum(parts.values()),
        "step_seconds_by_part": parts,
        "sent": _mean_sent(steps, stretch),
        "topology_step_extra_seconds": sum(n * step.topology_extra for n, step in found) / stretch.steps,
        "seconds": total_seconds([(steps, (stretch,))]),
    }


def _mean_sent(steps: StepModel, stretch: Stretch) -> dict[str, float]:
    """Bytes that a rank sends in a step, by kind; for a topology update as many as it takes on top."""
    found = [(moment.steps, steps.at(moment).sent) for moment in stretch.moments]
    return {kind: sum(n * sent[kind] for n, sent in found) / stretch.steps for kind in found[0][1]}


def _dense_seconds(work: Work, planner: Planner) -> float:
    """Of dense training that grows alike."""
    return sum(
        sum(stretch.steps for stretch in found) * steps.whole.step(planner.shards.dense_moment(steps.config)).seconds
        for steps, found in work
    )


def _energy(planner: Planner, seconds: float) -> dict[str, float] | None:
    """None: the power of the chip is not known."""
    watts, pue = planner.cluster.chip.watts, planner.assumptions["pue"]
    megawatts = planner.cluster.count * watts * pue / 1e6
    return {"megawatt_hours": megawatts * seconds / HOUR, "megawatts": megawatts, "pue": pue} if watts else None


def _cases(planner: Planner, config: RunConfig) -> list[dict[str, Any]]:
    """Total time with the kernels' efficiency alone, and with all assumptions, at their low and high ends."""
    usual = planner.assumptions
    rows = []
    for what, case in product(("kernel_efficiency", "all"), CASES):
        efficiency = usual.at(case)["kernel_efficiency"]
        changed = Assumptions({**usual.given, "kernel_efficiency": efficiency}, usual.case)
        assumptions = usual.at(case) if what == "all" else changed
        work = planner.work(config, assumptions)
        seconds = total_seconds(work)
        numbers = {"seconds": seconds, "speedup_over_dense": _dense_seconds(work, planner) / seconds}
        rows.append({"assumptions": what, "case": case, "kernel_efficiency": efficiency, **numbers})
    return rows


def _cluster_facts(cluster: Cluster) -> dict[str, Any]:
    """All that is known of the chip, and of the cluster in its place where both say something."""
    facts = {**vars(cluster.chip), "peak": dict(cluster.chip.peak), **vars(cluster), "chip": cluster.chip.name}
    return {**facts, "nodes": cluster.nodes, "as_of": AS_OF}


def _check(config: RunConfig, cluster: Cluster) -> None:
    """Raises ConfigError where the count does not divide, or settings contradict each other at any count."""
    size = config.parallel.tensor_parallel_size
    if cluster.count % size:
        raise ConfigError(
            f"--count: {cluster.count} is no multiple of parallel.tensor_parallel_size {size}; must be multiples "
            f"of {size}"
        )
    # One data-parallel rank and one sample at a time divide every batch.
    one = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": 1})})
    check_run(one, size)


def _nothing_fits(planner: Planner, needs: dict[Layout, int]) -> str:
    config, cluster = planner.config, planner.cluster
    possible = possible_counts(config, cluster.ranks_per_node, planner.sizes)
    if not needs:
        near = sorted(sorted(possible, key=lambda count: abs(count - cluster.count))[:4])
        return (
            f"--count: no layout divides train.global_batch_size {config.train.global_batch_size} over {cluster.count} "
            f"ranks with tensor-parallel sizes of {', '.join(map(str, planner.sizes))}; values nearby that fit: "
            f"{', '.join(map(str, near))}"
        )
    need = min(needs.values())
    text = (
        f"--count: the model fits in none of the {len(needs)} layouts on {cluster.count} x {cluster.chip.title}: "
        f"the smallest needs {need / 1e9:.1f} GB of {planner.usable_memory / 1e9:.1f} GB usable"
    )
    larger = [count for count in possible if count > cluster.count]
    # More ranks need no more memory each, so the largest number answers for all.
    if larger and _fits_somewhere(planner, larger[-1]):
        count = next(count for count in larger if _fits_somewhere(planner, count))
        return f"{text}; the smallest count that fits is {count}"
    return f"{text}; no count fits: train.global_batch_size, the chip's memory or train.precision must change"


def _fits_somewhere(planner: Planner, count: int) -> bool:
    moved = replace(planner, cluster=replace(planner.cluster, count=count))
    return any(moved.fits(layout) for layout in possible_layouts(planner.config, count, planner.sizes))


def _notes(planner: Planner, given: Layout, measured: dict[str, Any] | None) -> list[str]:
    config, cluster = planner.config, planner.cluster
    notes = []
    if fault := layout_fault(config, cluster.count):
        notes.append(f"the configuration's own layout does not run on this cluster, the best one is shown: {fault}")
    elif not planner.fits(given):
        need = planner.memory(config)["total"]
        notes.append(
            f"the configuration's own layout ({given.words()}) needs {need / 1e9:.1f} GB and does not fit; the best "
            "one that does is shown"
        )
    if measured is None:
        notes.append(
            "extrapolated: times, energy and the ranking follow from data sheets and assumptions; we have measured no "
            "training step on this chip"
        )
        notes.append(f"extrapolated: kernel_efficiency {planner.assumptions['kernel_efficiency']:g} is assumed")
    else:
        notes.append(
            "extrapolated from rates measured here in some seconds at the shapes of the configuration's own layout; no "
            "training step was run, and other layouts take the slowest of these rates"
        )
    if config.deepspeed.offload_optimizer != "none":
        notes.append("extrapolated: deepspeed.offload_optimizer: the way to host memory and its optimizer are left out")
    if config.sparsity.storage == "packed":
        notes.append("extrapolated: sparsity.storage: the time of building the engine anew is left out")
    return notes
