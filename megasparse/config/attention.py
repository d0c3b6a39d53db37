"""The section `attention`: which pattern holds when, and in which layers and heads; see ``schema``."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from megasparse.config.section import Fraction, NonNegativeInt, OpenFraction, PositiveInt, Section
from megasparse.config.sparsity import Phase

Pattern = Literal["full", "local", "strided", "sparse", "fixed"]


class PatternWindow(Section):
    start: Fraction
    """Training progress at which the window opens."""
    end: Fraction
    """Training progress at which it closes (exclusive)."""
    pattern: Pattern
    """Pattern that holds inside."""

    @model_validator(mode="after")
    def _is_not_empty(self) -> PatternWindow:
        if self.start >= self.end:
            raise ValueError(f"start: {self.start} must be below end {self.end}")
        return self


class PatternOverride(Section):
    layers: list[NonNegativeInt] | None = None
    """Layers it applies to; unset: all, or as `every` says."""
    every: PositiveInt | None = None
    """Every so many layers, instead of a list: 4 is layers 0, 4, 8, ..."""
    first: NonNegativeInt = 0
    """The first of these layers."""
    heads: list[NonNegativeInt] | OpenFraction | None = None
    """Query heads it applies to, as a list, or as a share of all heads (0.5 is every other one), spread evenly so that
    each tensor-parallel rank has its part; unset: all."""
    pattern: Pattern
    """Pattern of these heads whenever the schedule asks for anything but `full`."""

    @model_validator(mode="after")
    def _layers_are_named_once(self) -> PatternOverride:
        if self.every is not None and self.layers is not None:
            raise ValueError(f"every: {self.every} contradicts layers {self.layers}; must be one of the two")
        if self.every is None and self.first:
            raise ValueError(f"first: {self.first} needs every; must be 0, or every: N")
        return self

    def layer_numbers(self, num_layers: int) -> list[int]:
        if self.every is not None:
            return list(range(self.first, num_layers, self.every))
        return list(range(num_layers)) if self.layers is None else self.layers

    def head_numbers(self, num_heads: int) -> list[int]:
        if isinstance(self.heads, float):
            count = round(self.heads * num_heads)
            return [h for h in range(num_heads) if (h + 1) * count // num_heads > h * count // num_heads]
        return list(range(num_heads)) if self.heads is None else self.heads


class AttentionConfig(Section):
    stride: PositiveInt = 128
    """Stride s of the hybrid sparse attention patterns, in tokens."""
    stride_offsets: Literal["none", "spread"] | list[NonNegativeInt] = "none"
    """Offset of the stride for each query head, so that heads look at different tokens under `strided`, `sparse` and
    `fixed`; none: 0 for all; spread: head h of H has h s // H; or a list with one number below s for each head."""
    phases: dict[Phase, Pattern] = {"ultra_sparse": "sparse"}
    """Pattern of each phase of the sparsity schedule; a phase left out is `full`."""
    windows: list[PatternWindow] | None = None
    """Pattern by training progress; replaces `phases`. Outside every window the pattern is `full`."""
    overrides: list[PatternOverride] = []
    """Exceptions by layer and head; the last that matches wins."""
    dense_fallback: bool | list[Pattern] = False
    """Full attention in place of patterns, which changes the model; true: of those for which the table of measurements
    (kernels.tune, tools/tune_kernels.py --attention) says that full attention is faster at this sequence length. A run
    resolves at its start which these are, and its config.yaml lists them. Or a list of patterns."""

    def head_offsets(self, num_heads: int) -> tuple[int, ...]:
        """Offset of each query head."""
        if self.stride_offsets == "spread":
            return tuple(head * self.stride // num_heads for head in range(num_heads))
        return (0,) * num_heads if self.stride_offsets == "none" else tuple(self.stride_offsets)

    @property
    def widened_patterns(self) -> frozenset[Pattern]:
        """Patterns in whose place full attention runs."""
        return frozenset(self.dense_fallback if isinstance(self.dense_fallback, list) else ())

    @property
    def sliding_window(self) -> int | None:
        """Tokens that each token sees, where the pattern is `local` at all times and for all heads; else None."""
        windows = self.windows or []
        always = len(windows) == 1 and (windows[0].start, windows[0].end, windows[0].pattern) == (0.0, 1.0, "local")
        return self.stride if always and not self.overrides else None

    def named_patterns(self) -> set[Pattern]:
        """All patterns that occur, `full` aside."""
        from_schedule = self.phases.values() if self.windows is None else (window.pattern for window in self.windows)
        return {*from_schedule, *(override.pattern for override in self.overrides)} - {"full"}

    @model_validator(mode="after")
    def _offsets_are_below_the_stride(self) -> AttentionConfig:
        stride = self.stride
        for offset in self.stride_offsets if isinstance(self.stride_offsets, list) else ():
            if offset >= stride:
                raise ValueError(f"stride_offsets: {offset} is not below stride {stride}; must be 0 to {stride - 1}")
        return self
