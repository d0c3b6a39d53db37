"""Measures, where a run starts for the first time on a machine, what the tables that choose kernels lack for it.

    if fit_tables(config, plan, tell=print, warn=print):      # the plan must be made anew: the tables have changed

Only the layers and patterns of this run are measured, in its precision and with its number of threads, within about
`BUDGET_SECONDS`. The rows go to the files that tools/tune_kernels.py writes, so that the next start finds them.
Whatever goes wrong is told, and the run goes on with the tables as they are.

Not covered: the process measures alone, as one of the ranks of its node. Ranks that train side by side also share
memory bandwidth, the last-level cache and the clock of the processor, which may slow dense and sparse products in
unequal measure. Tiles of the Triton kernels are not searched for: that takes minutes (tools/tune_kernels.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from filelock import FileLock, Timeout

from megasparse.config.schema import RunConfig
from megasparse.cost.layer_kernels import DTYPES
from megasparse.cost.table_sources import patterns_of_run
from megasparse.kernels import block_sparse, dense_products, hybrid_attention
from megasparse.kernels.block_sparse.break_even import TABLE as LAYERS_TABLE
from megasparse.kernels.block_sparse.measure import measure_row, round_seconds
from megasparse.kernels.common.build import NOWHERE, cache_folder
from megasparse.kernels.common.tables import BreakEvenTable, forget, this_machine
from megasparse.kernels.dense_products import table as dense_table
from megasparse.kernels.dense_products.table import TABLE as DENSE_TABLE
from megasparse.kernels.hybrid_attention.break_even import SHORTEST_FULL
from megasparse.kernels.hybrid_attention.break_even import TABLE as ATTENTION_TABLE
from megasparse.kernels.hybrid_attention.break_even import Row as AttentionRow
from megasparse.kernels.hybrid_attention.measure import HEADS, measure_rows
from megasparse.tuning.kernel_tuning import Case, as_measurement, code_versions, store, with_bar
from megasparse.utils.dtypes import dtype_name
from megasparse.utils.files import describe_failure

BUDGET_SECONDS = 15.0
"""For all cases together. Each gets a share of what is left by its work; one that begins within it is finished."""
DENSITIES = (0.1, 0.5, 1.0)
"""Fewer than tools/tune_kernels.py measures: more tokens tell more."""
USUAL_TOKENS = 1024
"""Up to which the work of a case grows with its tokens; beyond, fewer are measured where time is short."""
MIN_ROUNDS, MAX_ROUNDS, REPEATED_SECONDS = 3, 15, 1.0
"""The more rounds the shorter they are: a small case is repeated within so many seconds."""
FEWEST_TOKENS = 32
"""At which the search for a number of tokens that can be afforded begins. The slowest products that were seen, bfloat16
on a processor without instructions for it, do 2 GFLOP/s: a second for a layer of 4,096 x 4,096."""
USEFUL_TOKENS, LONGEST_ROUND = 256, 1.5
"""So many are measured, also beyond the share of a case, while a round takes no more seconds: with fewer, the packing
of the weights decides, and the answer is another one."""
WIDEST = 4096
"""Of a measured layer: a wider one, such as a head, is measured on as much of its width, with more tokens."""
DENSE_TOKENS, DENSE_SECONDS = 512, 2.0
"""Dense products are measured with no more tokens, which changes little, and with fewer where they take longer."""
SLOWEST_PRODUCTS = 30e9
"""FLOPs a second of dense float32 products, less than which is hardly met: tells how long they may take."""
SHORTEST, LONGEST = 128, 8192
"""Lengths at which attention is measured. Beyond, what is faster at the longest one stays so: its work grows slower."""
LOCK_SECONDS = 120
"""How long a run waits for another one that measures."""
SILENT_SECONDS = 2
COMMAND = "kernels.tune auto"

Tell = Callable[[str], Any]


@dataclass(frozen=True)
class Meter:
    """What takes the times; tests have another one."""

    layer: Callable[..., Any] = measure_row
    expected: Callable[..., Callable[[int], float]] = round_seconds
    patterns: Callable[..., list[AttentionRow]] = measure_rows
    dense: Callable[..., dense_table.Row] = dense_table.measure_row
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class LayerCase(Case):
    """A sparse layer, as a rank of the run has it."""

    table = LAYERS_TABLE

    @property
    def work(self) -> float:
        """Multiplications of a pass, about."""
        first, second = map(self._narrowed, self.widths)
        return 3.0 * first * second * min(self.tokens, USUAL_TOKENS) * (1 + sum(DENSITIES))

    def is_known(self, rows: Sequence[Any]) -> bool:
        sizes = self.block, self.tokens, *self.widths
        return any((row.kind, row.sizes) == ((self.backend, dtype_name(self.dtype)), sizes) for row in rows)

    def can_run(self, device: str) -> bool:
        """Builds the kernel."""
        return block_sparse.explain(device, self.dtype, self.block)[0] == self.backend

    def measure(self, device: str, seconds: float, meter: Meter) -> list[Any]:
        """On a CPU with as many of the tokens as `seconds` allow, and no more of the widths than `WIDEST`."""
        widths = self.widths if device == "cuda" else tuple(map(self._narrowed, self.widths))
        shape: dict[str, Any] = {"block": self.block, "widths": widths, "densities": DENSITIES}
        tokens, rounds = self.tokens, MIN_ROUNDS
        if device != "cuda":
            expected = meter.expected(self.backend, self.dtype, **shape)
            tokens, each = affordable_tokens(self.tokens, seconds / (MIN_ROUNDS + 1), expected)
            useful = min(self.tokens, USEFUL_TOKENS)
            if tokens < useful and each * useful / tokens <= LONGEST_ROUND:
                tokens, each = useful, each * useful / tokens
            rounds = rounds_within(seconds, each)
        row = meter.layer(self.backend, device, self.dtype, tokens=tokens, rounds=rounds, **shape, fastest=True)
        is_exact = (tokens, widths) == (self.tokens, self.widths)
        return [row if is_exact else replace(row, counts_for=(self.tokens, *self.widths))]

    def _narrowed(self, width: int) -> int:
        return min(width, WIDEST // self.block * self.block)


@dataclass(frozen=True)
class AttentionCase:
    """Patterns that one kernel computes, at the sequence length of the run."""

    kernel: str
    dtype: torch.dtype
    patterns: tuple[str, ...]
    stride: int
    head_dim: int
    seq_length: int
    table = ATTENTION_TABLE

    @property
    def work(self) -> float:
        """Multiplications of a pass with a mask and without, about."""
        return 14.0 * HEADS * self.head_dim * min(self.seq_length, LONGEST) ** 2

    def __str__(self) -> str:
        return f"{', '.join(self.patterns)} at {self.seq_length:,} tokens, {dtype_name(self.dtype)}, {self.kernel}"

    def is_known(self, rows: Sequence[AttentionRow]) -> bool:
        return all(
            any(_is_settled(row, self.seq_length) for row in rows if self._is_of(row, pattern))
            for pattern in self.patterns
        )

    def can_run(self, device: str) -> bool:
        """Builds the kernel."""
        shape = device, self.dtype, self.head_dim
        return all(hybrid_attention.fast_kernel(*shape, pattern=pattern) == self.kernel for pattern in self.patterns)

    def measure(self, device: str, seconds: float, meter: Meter) -> list[AttentionRow]:
        """At the length of the run and some shorter ones, the shortest first, as far as `seconds` allow."""
        rows = self.table.own_rows(device, code_versions())
        known = [row for row in rows if any(self._is_of(row, name) for name in self.patterns)]
        found: dict[tuple, AttentionRow] = {}
        lengths = _lengths(self.seq_length)
        options: dict[str, Any] = {"stride": self.stride, "head_dim": self.head_dim, "patterns": self.patterns}
        options["fastest"] = True
        for _ in range(2):  # the first one loads and imports what it needs
            began = meter.clock()
            meter.patterns(self.kernel, device, self.dtype, **options, lengths=lengths[:1], rounds=1)
        each, before = (meter.clock() - began) / 2, lengths[0]
        for length in lengths:
            # All work of a mask grows with the square of the length.
            each *= (length / before) ** 2
            started = meter.clock()
            left = seconds - (started - began)
            # What has not been decided at the lengths so far is, unless that alone takes more than all together may.
            is_decided = bool(found) and all(_is_settled(row, self.seq_length) for row in found.values())
            if found and each * (MIN_ROUNDS + 1) > (left if is_decided else BUDGET_SECONDS):
                break
            rounds = rounds_within(left, each)
            for row in meter.patterns(self.kernel, device, self.dtype, **options, lengths=[length], rounds=rounds):
                old = found.get(row.case) or next((other for other in known if other.case == row.case), row)
                found[row.case] = replace(
                    row,
                    seconds={**old.seconds, **row.seconds},
                    host_seconds={**old.host_seconds, **row.host_seconds},
                )
            each, before = (meter.clock() - started) / (rounds + 1), length
        return list(found.values())

    def _is_of(self, row: AttentionRow, pattern: str) -> bool:
        # The stride plays no role under `full`.
        kind, stride = (self.kernel, pattern, dtype_name(self.dtype)), row.stride if pattern == "full" else self.stride
        return (row.kind, row.sizes) == (kind, (stride, self.head_dim))


@dataclass(frozen=True)
class DenseCase:
    """The dense products of a layer, by torch and by oneDNN."""

    dtype: torch.dtype
    tokens: int
    widths: tuple[int, int]
    table = DENSE_TABLE

    @property
    def work(self) -> float:
        """Multiplications of a pass of each, about."""
        return 6.0 * min(self.tokens, DENSE_TOKENS) * self._narrowed[0] * self._narrowed[1]

    def __str__(self) -> str:
        return f"{self.widths[0]} -> {self.widths[1]}, dense, {self.tokens:,} tokens, {dtype_name(self.dtype)}"

    def is_known(self, rows: Sequence[Any]) -> bool:
        return any((row.kind, row.sizes) == ((dtype_name(self.dtype),), (self.tokens, *self.widths)) for row in rows)

    def can_run(self, device: str) -> bool:
        return dense_products.onednn.why_not(device, self.dtype) is None

    def measure(self, device: str, seconds: float, meter: Meter) -> list[Any]:
        """With no more than `DENSE_TOKENS`, and no more of the widths than `WIDEST`."""
        a_token = 2 * self.work / min(self.tokens, DENSE_TOKENS) / SLOWEST_PRODUCTS * (MIN_ROUNDS + 1)
        fitting = max(int(min(seconds, DENSE_SECONDS) / a_token), USEFUL_TOKENS)
        tokens = min(self.tokens, DENSE_TOKENS, fitting)
        row = meter.dense(self.dtype, tokens=tokens, widths=self._narrowed, rounds=MIN_ROUNDS)
        is_exact = (tokens, self._narrowed) == (self.tokens, self.widths)
        return [row if is_exact else replace(row, counts_for=(self.tokens, *self.widths))]

    @property
    def _narrowed(self) -> tuple[int, int]:
        inner, outer = self.widths
        return min(inner, WIDEST), min(outer, WIDEST)


RunCase = LayerCase | AttentionCase | DenseCase
TABLES = (LAYERS_TABLE, ATTENTION_TABLE, DENSE_TABLE)


def fit_tables(
    config: RunConfig, plan: Mapping[str, Any], *, tell: Tell | None, warn: Tell, meter: Meter | None = None
) -> bool:
    """Measure what the user's own tables lack for a run on this machine; whether they may have changed.

    plan: of the run, on the device that trains. tell: of progress; None: nothing is told. warn: of what went wrong.
    Neither a failure nor Ctrl-C ends the run.
    """
    device = plan["kernels"]["device"]
    wanted = missing(config, plan)
    if not wanted:
        return False
    try:
        able = [case for case in wanted if case.can_run(device)]
        if able:
            with _alone(tell or _silent):
                # Another run may have measured meanwhile.
                forget()
                still = missing(config, plan)
                if todo := [case for case in able if case in still]:
                    measure(todo, device, tell, warn, meter or Meter())
    except KeyboardInterrupt:
        warn("kernels.tune: interrupted; what was not measured is taken from the tables that are there")
    except Exception as error:
        reason = describe_failure(error) if isinstance(error, OSError) else str(error) or type(error).__name__
        warn(f"kernels.tune: not measured, the tables that are there are used: {reason}")
    forget()
    return True


def missing(config: RunConfig, plan: Mapping[str, Any]) -> list[RunCase]:
    """What decides about the kernels of the run, and is not in the user's own tables for this machine.

    What was measured with other kernels, or another torch, is measured anew; until then it is the best that is known.
    """
    device, dtype = plan["kernels"]["device"], DTYPES[config.train.precision]
    cases: list[RunCase] = [
        *_attention(config, device, dtype),
        *_dense(config, plan, device, dtype),
        *_layers(config, plan, device, dtype),
    ]
    rows = {table.name: table.own_rows(device, code_versions()) for table in TABLES}
    return [case for case in cases if not case.is_known(rows[case.table.name])]


def measure(todo: Sequence[RunCase], device: str, tell: Tell | None, warn: Tell, meter: Meter) -> None:
    """Within the budget, with a bar if anything is told; what was measured is kept also where something fails."""
    (tell or _silent)(
        f"measuring the kernels on this machine, once, for {BUDGET_SECONDS:.0f} s or less (Ctrl-C skips it): "
        f"{this_machine(device)}"
    )
    began = meter.clock()
    found: dict[str, tuple[BreakEvenTable, list[Any]]] = {}
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    try:
        # The random numbers of the run stay what they are without a measurement.
        with torch.random.fork_rng(devices), closing(with_bar(todo, shown=tell is not None)) as cases:
            for number, case in enumerate(cases):
                left = BUDGET_SECONDS - (meter.clock() - began)
                if left <= 0:
                    warn(f"kernels.tune: no time was left for {len(todo) - number} of {len(todo)}: the next start's")
                    break
                _, rows = found.setdefault(case.table.name, (case.table, []))
                share = case.work / sum(other.work for other in todo[number:])
                rows += case.measure(device, left * share, meter)
    finally:
        for table, rows in found.values():
            if rows:
                store(table.own(), as_measurement(rows, device, COMMAND), table)
        if device == "cuda":
            torch.cuda.empty_cache()
    (tell or _silent)(f"measured in {meter.clock() - began:.0f} s; kept in {cache_folder()}")


def affordable_tokens(wanted: int, seconds: float, expected: Callable[[int], float]) -> tuple[int, float]:
    """The largest number up to `wanted` that is expected to take no more than `seconds`, and what that takes.

    expected: number of tokens -> seconds. Numbers are tried in doubling steps, so that a step costs as much as all
    before it; below the first one nothing is tried.
    """
    tokens = min(FEWEST_TOKENS, wanted)
    took = expected(tokens)
    while tokens < wanted:
        more = min(2 * tokens, wanted)
        if took * more / tokens > seconds:
            # Once more before that is believed: another process may have had the core.
            took = min(took, expected(tokens))
            if took * more / tokens > seconds:
                break
        tokens, took = more, expected(more) if more < wanted else took * more / tokens
    return tokens, took


def rounds_within(seconds: float, each: float) -> int:
    """Rounds to measure, one more warms up. each: seconds of a round."""
    fitting = int(min(seconds, REPEATED_SECONDS) / max(each, 1e-9)) - 1
    return min(max(fitting, MIN_ROUNDS), MAX_ROUNDS)


def _layers(config: RunConfig, plan: Mapping[str, Any], device: str, dtype: torch.dtype) -> Iterator[LayerCase]:
    """Distinct layers about which a break-even density decides."""
    if config.kernels.break_even is not None:
        return
    seen = set()
    for row in plan["kernels"]["block_sparse"]:
        sizes = row["block_size"], row["tokens"], (row["in"], row["out"])
        # None: the kernel is forced, or there is none. Density 1: the layer is an ordinary one.
        if row["break_even"] is None or row["density"] >= 1.0 or sizes in seen:
            continue
        seen.add(sizes)
        backend, _ = block_sparse.explain(device, dtype, row["block_size"], planned=True)
        if backend is not None:
            yield LayerCase(backend, dtype, *sizes)


def _dense(config: RunConfig, plan: Mapping[str, Any], device: str, dtype: torch.dtype) -> Iterator[DenseCase]:
    """Distinct dense layers, where there is a choice."""
    if config.kernels.dense == "auto" and dense_products.onednn.why_not(device, dtype) is None:
        rows = plan["kernels"]["dense"]
        yield from dict.fromkeys(DenseCase(dtype, row["tokens"], (row["in"], row["out"])) for row in rows)


def _attention(config: RunConfig, device: str, dtype: torch.dtype) -> Iterator[AttentionCase]:
    """The patterns of the run by the kernel that computes them; on CPUs full attention too, which every run has."""
    head_dim = config.model.head_dim
    by_kernel: dict[str, list[str]] = {}
    if config.kernels.hybrid_attention != "auto":
        return
    stride, seq_length = config.attention.stride, config.model.seq_length
    compiled = device == "cpu" and hybrid_attention.fast_kernel(device, dtype, head_dim, planned=True) == "cpu"
    if compiled and seq_length >= SHORTEST_FULL:
        yield AttentionCase("cpu", dtype, ("full",), stride, head_dim, seq_length)
    for pattern in patterns_of_run(config):
        if pattern not in config.attention.widened_patterns:
            kernel = hybrid_attention.fast_kernel(device, dtype, head_dim, pattern=pattern, planned=True)
            by_kernel.setdefault(kernel, []).append(pattern)
    for kernel, patterns in by_kernel.items():
        if kernel != "reference":
            yield AttentionCase(kernel, dtype, tuple(patterns), stride, head_dim, seq_length)


def _lengths(seq_length: int) -> list[int]:
    """Lengths to measure: shorter ones tell from where on the kernel is faster, for validation and short texts."""
    longest = min(seq_length, LONGEST)
    shorter = (SHORTEST, longest // 4, longest // 2)
    return sorted({*(length for length in shorter if SHORTEST <= length < longest), longest})


def _is_settled(row: AttentionRow, seq_length: int) -> bool:
    """Whether the row tells which attention is fastest at a length: measured there, or won already at a shorter one.

    Under `full` no kernel's work grows slower than another's: there a quarter of the length has to do, or less where
    that takes longer than there is time for.
    """
    longest = min(seq_length, LONGEST)
    if str(longest) in row.seconds:
        return True
    below = [length for length in row.lengths if length < longest]
    if not below:
        return False
    times = row.seconds[str(below[-1])]
    if row.pattern == "full":
        growth = longest / 4 / below[-1]
        return growth <= 1 or (times["kernel"] + times["dense"]) * growth**2 * (MIN_ROUNDS + 1) > BUDGET_SECONDS
    return times["kernel"] <= min(times["mask"], times["dense"])


@contextmanager
def _alone(tell: Tell) -> Iterator[None]:
    """While no other process of this user measures: they would disturb each other, and find the same.

    Raises OSError where nothing can be kept, before anything is measured.
    """
    folder = cache_folder()
    if folder == NOWHERE:
        raise OSError("no cache folder: this user has no home; MEGASPARSE_CACHE names one")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for table in TABLES:
        if table.own().exists():
            table.read(table.own())  # ValueError: what is no table is not written over
    lock = FileLock(folder / "measuring.lock")
    try:
        lock.acquire(timeout=SILENT_SECONDS)
    except Timeout:
        tell(f"waiting for another run that measures the kernels, for {LOCK_SECONDS} s at most")
        lock.acquire(timeout=LOCK_SECONDS)
    try:
        yield
    finally:
        lock.release()


def _silent(text: str) -> None:
    """Tells nothing."""
