"""Density and attention pattern over training: pure functions of progress.

Progress u is the number of finished optimizer steps over the number of steps of the run, in [0, 1].

    schedule = build_density_schedule(config.sparsity)
    schedule.density(0.3), schedule.phase(0.3)

The three phases are those of Mixed Sparsity Training (Hu et al., arXiv 2408.11746): warm-up, ultra-sparse,
restoration. Static masks, SET, RigL, gradual pruning and SPDF are other lists of segments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megasparse.config.schema import AttentionConfig, Pattern, Phase, RunConfig, SparsityConfig


@dataclass(frozen=True)
class Segment:
    """The stretch [start, end) of training in which the density goes from `first` to `last`."""

    phase: Phase
    start: float
    end: float
    first: float
    last: float
    shape: str = "linear"
    shape_steps: int = 1

    def density(self, progress: float) -> float:
        if self.first == self.last:
            return self.first
        x = (progress - self.start) / (self.end - self.start)
        return self.first + (self.last - self.first) * self._share(min(max(x, 0.0), 1.0))

    def _share(self, x: float) -> float:
        """Share of the way that is done at x in [0, 1]; a cubic rise is a cubic fall run backwards."""
        if self.shape == "linear":
            return x
        if self.shape == "steps":
            # A little more, so that a step that rounding puts just below its boundary is not lost.
            return math.floor(x * self.shape_steps + 1e-9) / self.shape_steps
        return 1 - (1 - x) ** 3 if self.last < self.first else x**3


@dataclass(frozen=True)
class DensitySchedule:
    """Density over progress, as segments that cover [0, 1]."""

    segments: tuple[Segment, ...]

    def segment(self, progress: float) -> Segment:
        for segment in self.segments:
            if progress < segment.end:
                return segment
        return self.segments[-1]

    def density(self, progress: float) -> float:
        return self.segment(progress).density(progress)

    def phase(self, progress: float) -> Phase:
        return self.segment(progress).phase

    def phase_progress(self, progress: float) -> float:
        """Progress inside the present segment, in [0, 1]."""
        segment = self.segment(progress)
        return (progress - segment.start) / (segment.end - segment.start)

    def phase_starts(self, steps: int) -> list[int]:
        """First step (0-based) of each segment in a run of so many: a step belongs to where its progress lies."""
        starts = {
            next((n for n in _near(segment.start * steps) if n / steps >= segment.start), steps)
            for segment in self.segments
        }
        return sorted(start for start in starts if start < steps)

    @property
    def dense_from(self) -> float | None:
        """Progress from which on the density is 1 to the end; None where it never is."""
        start = None
        for segment in reversed(self.segments):
            if (segment.first, segment.last) != (1.0, 1.0):
                break
            start = segment.start
        return start

    @property
    def min_density(self) -> float:
        return min(min(segment.first, segment.last) for segment in self.segments)


def _near(position: float) -> range:
    """Whole numbers among which the first one from `position` on is, however that was rounded."""
    return range(max(math.floor(position) - 1, 0), math.floor(position) + 3)


def settings_at(config: RunConfig, schedule: DensitySchedule, step: int) -> RunConfig:
    """The configuration as it holds in step `step` (0-based), whose phase may have its own micro-batch."""
    train = config.train.in_phase(schedule.phase(step / config.train.steps))
    return config if train is config.train else config.model_copy(update={"train": train})


def build_density_schedule(sparsity: SparsityConfig) -> DensitySchedule:
    """The segments of an algorithm (or of free points), empty ones left out."""
    low, a = sparsity.density, sparsity.warmup_end
    b, c = sparsity.restoration_start, sparsity.restoration_end
    fall = (sparsity.warmup_shape, sparsity.shape_steps)
    rise = (sparsity.restoration_shape, sparsity.shape_steps)
    if sparsity.algorithm == "dense":
        segments = [Segment("dense", 0.0, 1.0, 1.0, 1.0)]
    elif sparsity.points is not None:
        segments = list(_segments_of_points(sparsity.points))
    elif sparsity.algorithm == "mst":
        segments = [
            Segment("warm_up", 0.0, a, 1.0, low, *fall),
            Segment("ultra_sparse", a, b, low, low),
            Segment("restoration", b, c, low, 1.0, *rise),
            Segment("dense", c, 1.0, 1.0, 1.0),
        ]
    elif sparsity.algorithm in ("gradual", "obert"):
        segments = [Segment("warm_up", 0.0, a, 1.0, low, *fall), Segment("ultra_sparse", a, 1.0, low, low)]
    elif sparsity.algorithm == "spdf":
        segments = [Segment("ultra_sparse", 0.0, b, low, low), Segment("dense", b, 1.0, 1.0, 1.0)]
    else:
        segments = [Segment("ultra_sparse", 0.0, 1.0, low, low)]
    return DensitySchedule(tuple(segment for segment in segments if segment.end > segment.start))


def _segments_of_points(points: list[tuple[float, float]]) -> Iterator[Segment]:
    """Lines between free points; the phase follows from the slope. The last density holds to the end."""
    for (start, first), (end, last) in zip(points, [*points[1:], (1.0, points[-1][1])], strict=True):
        if first == last:
            phase: Phase = "dense" if first == 1.0 else "ultra_sparse"
        else:
            phase = "warm_up" if last < first else "restoration"
        yield Segment(phase, start, end, first, last)


@dataclass(frozen=True)
class PatternSchedule:
    """Attention pattern of every layer and head over progress (hybrid sparse attention, design of Hu et al.)."""

    attention: AttentionConfig
    num_layers: int
    num_heads: int

    def pattern(self, progress: float, phase: Phase) -> Pattern:
        """The pattern that holds, exceptions by layer and head left aside."""
        if self.attention.windows is None:
            return self.attention.phases.get(phase, "full")
        for window in self.attention.windows:
            if window.start <= progress < window.end:
                return window.pattern
        return "full"

    def edges(self, schedule: DensitySchedule) -> list[float]:
        """Progress at which the pattern may change."""
        if self.attention.windows is None:
            return [segment.start for segment in schedule.segments]
        return [edge for window in self.attention.windows for edge in (window.start, window.end)]

    def layer_patterns(self, pattern: Pattern) -> list[tuple[Pattern, ...]]:
        """Pattern that runs in each query head of each layer while the schedule asks for `pattern`."""
        table = [[pattern] * self.num_heads for _ in range(self.num_layers)]
        if pattern != "full":
            for override in self.attention.overrides:
                for layer in override.layer_numbers(self.num_layers):
                    for head in override.head_numbers(self.num_heads):
                        table[layer][head] = override.pattern
        wide = self.attention.widened_patterns
        return [tuple("full" if name in wide else name for name in row) for row in table]


def pattern_at(config: RunConfig, finished_steps: int, schedule: PatternSchedule) -> Pattern:
    """The attention pattern of the last of so many steps: the one that the weights were trained under."""
    progress = max(min(finished_steps, config.train.steps) - 1, 0) / config.train.steps
    return schedule.pattern(progress, build_density_schedule(config.sparsity).phase(progress))


def first_dense_step(config: RunConfig) -> int | None:
    """The step in which a topology update makes the model dense for good; 0 where it is so from its beginning, None
    where it never becomes so."""
    steps, dense_from = config.train.steps, build_density_schedule(config.sparsity).dense_from
    if dense_from is None:
        return None
    return next(
        (step for step in range(0, steps, config.sparsity.update_interval) if step / steps >= dense_from), steps
    )


def is_update_due(step: int, update_interval: int) -> bool:
    """Whether the topology may change before optimizer step `step` (0-based) is applied."""
    # At step 0 there are no gradients' moments yet and no exploration to reward.
    return step > 0 and step % update_interval == 0
