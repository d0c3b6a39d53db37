"""Density over progress: values written down by hand at the edges of phases, and properties that hold everywhere."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasparse.config.schema import AttentionConfig, PatternOverride, PatternWindow, SparsityConfig
from megasparse.sparsity.schedule import PatternSchedule, build_density_schedule, is_update_due

EDGES = {"density": 0.1, "warmup_end": 0.2, "restoration_start": 0.6, "restoration_end": 0.8}


def schedule(**settings):
    return build_density_schedule(SparsityConfig(**{**EDGES, **settings}))


def test_mst_at_the_edges_of_its_phases() -> None:
    mst = schedule()
    # Half-way down the cubic: 1 - 0.9 (1 - 0.5^3); half-way up the line: 0.1 + 0.45.
    for progress, density, phase in [
        (0.0, 1.0, "warm_up"), (0.1, 0.2125, "warm_up"), (0.2, 0.1, "ultra_sparse"), (0.5999, 0.1, "ultra_sparse"),
        (0.6, 0.1, "restoration"), (0.7, 0.55, "restoration"), (0.8, 1.0, "dense"), (1.0, 1.0, "dense"),
    ]:  # fmt: skip
        assert mst.density(progress) == pytest.approx(density, abs=1e-12)
        assert mst.phase(progress) == phase
    assert mst.density(0.8) == 1.0 and mst.density(0.2) == 0.1
    assert mst.min_density == 0.1
    assert mst.phase_progress(0.4) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("dense", [1.0, 1.0, 1.0, 1.0]), ("static", [0.1] * 4), ("set", [0.1] * 4), ("rigl", [0.1] * 4),
        ("gradual", [1.0, 0.2125, 0.1, 0.1]), ("spdf", [0.1, 0.1, 0.1, 1.0]),
    ],
)  # fmt: skip
def test_other_algorithms(algorithm, expected) -> None:
    other = schedule(algorithm=algorithm)
    assert [other.density(u) for u in (0.0, 0.1, 0.3, 0.6)] == pytest.approx(expected)
    assert other.density(1.0) == pytest.approx({"spdf": 1.0, "dense": 1.0}.get(algorithm, 0.1))


def test_shapes() -> None:
    falls = {"cubic": 0.2125, "linear": 0.55, "steps": 0.55}
    for shape, half in falls.items():
        assert schedule(warmup_shape=shape).density(0.1) == pytest.approx(half)
    # A cubic rise mirrors the cubic fall: slow at first.
    assert schedule(restoration_shape="cubic").density(0.7) == pytest.approx(0.1 + 0.9 * 0.125)


def test_steps_are_even_and_begin_on_time() -> None:
    steps = schedule(warmup_shape="steps", shape_steps=4, warmup_end=0.1)
    # 0.075 / 0.1 is 0.7499999999999999 in floating point.
    found = [steps.density(u) for u in (0.0, 0.0249, 0.025, 0.05, 0.075, 0.0999, 0.1)]
    assert found == pytest.approx([1.0, 1.0, 0.775, 0.55, 0.325, 0.325, 0.1])


def test_empty_phases_are_left_out() -> None:
    at_once = schedule(warmup_end=0.0, restoration_end=0.6)
    assert at_once.density(0.0) == 0.1 and at_once.density(0.6) == 1.0
    assert [segment.phase for segment in at_once.segments] == ["ultra_sparse", "dense"]


def test_free_points() -> None:
    points = schedule(points=[(0.0, 1.0), (0.25, 0.2), (0.5, 0.2), (0.75, 1.0)])
    assert [points.density(u) for u in (0.0, 0.125, 0.3, 0.625, 0.9, 1.0)] == pytest.approx(
        [1.0, 0.6, 0.2, 0.6, 1.0, 1.0]
    )
    assert [points.phase(u) for u in (0.1, 0.3, 0.6, 0.9)] == ["warm_up", "ultra_sparse", "restoration", "dense"]


edge = st.floats(0.0, 1.0)


@given(
    edges=st.tuples(edge, edge, edge).map(sorted), low=st.floats(0.001, 1.0),
    progress=st.tuples(edge, edge).map(sorted),
    fall=st.sampled_from(["cubic", "linear", "steps"]), rise=st.sampled_from(["cubic", "linear", "steps"]),
)  # fmt: skip
def test_density_stays_in_range_and_is_monotone_within_segments(edges, low, progress, fall, rise) -> None:
    a, b, c = edges
    mst = schedule(
        density=low, warmup_end=a, restoration_start=b, restoration_end=c, warmup_shape=fall, restoration_shape=rise
    )
    first, second = (mst.density(u) for u in progress)
    assert low * (1 - 1e-9) <= first <= 1.0 and low * (1 - 1e-9) <= second <= 1.0
    if mst.segment(progress[0]) is mst.segment(progress[1]):
        segment = mst.segment(progress[0])
        if segment.last < segment.first:
            assert second <= first + 1e-12
        else:
            assert second >= first - 1e-12
    assert mst.segments[0].start == 0.0 and mst.segments[-1].end == 1.0
    assert all(x.end == y.start for x, y in pairwise(mst.segments))


def test_updates_are_due_at_multiples_of_their_interval_and_not_at_step_0() -> None:
    assert [step for step in range(10) if is_update_due(step, 3)] == [3, 6, 9]
    linear = schedule(warmup_shape="linear", warmup_end=0.5)
    at_updates = [linear.density(step / 10) for step in (0, 2, 4, 6)]
    assert at_updates == pytest.approx([1.0, 0.64, 0.28, 0.1])


def test_attention_patterns_follow_phases_windows_and_overrides() -> None:
    by_phase = PatternSchedule(AttentionConfig(phases={"ultra_sparse": "sparse", "dense": "local"}), 2, 3)
    assert [by_phase.pattern(0.5, p) for p in ("warm_up", "ultra_sparse", "dense")] == ["full", "sparse", "local"]
    windows = [PatternWindow(start=0.2, end=0.4, pattern="fixed"), PatternWindow(start=0.3, end=0.6, pattern="local")]
    by_window = PatternSchedule(AttentionConfig(windows=windows), 2, 3)
    found = [by_window.pattern(u, "ultra_sparse") for u in (0.1, 0.2, 0.35, 0.4, 0.6)]
    assert found == ["full", "fixed", "fixed", "local", "full"]
    overrides = [PatternOverride(heads=[0], pattern="local"), PatternOverride(layers=[1], heads=[0, 2], pattern="full")]
    table = PatternSchedule(AttentionConfig(overrides=overrides), 2, 3)
    assert table.layer_patterns("sparse") == [("local", "sparse", "sparse"), ("full", "sparse", "full")]
    assert table.layer_patterns("full") == [("full",) * 3] * 2


def test_half_of_the_heads_local_and_every_fourth_layer_dense() -> None:
    overrides = [
        PatternOverride(heads=0.5, pattern="local"),
        PatternOverride(every=4, first=3, pattern="full"),
    ]
    table = PatternSchedule(AttentionConfig(overrides=overrides), 9, 4).layer_patterns("strided")
    halves = ("strided", "local", "strided", "local")
    assert table == [halves, halves, halves, ("full",) * 4] * 2 + [halves]
    shares = {0.2: [5], 0.3: [2, 5], 1 / 3: [2, 5], 0.75: [1, 2, 4, 5], 0.9: [1, 2, 3, 4, 5]}
    for share, heads in shares.items():
        assert PatternOverride(heads=share, pattern="local").head_numbers(6) == heads


def test_offsets_of_heads() -> None:
    assert AttentionConfig().head_offsets(3) == (0, 0, 0)
    assert AttentionConfig(stride=8, stride_offsets="spread").head_offsets(3) == (0, 2, 5)
    assert AttentionConfig(stride=4, stride_offsets="spread").head_offsets(6) == (0, 0, 1, 2, 2, 3)
    assert AttentionConfig(stride=4, stride_offsets=[3, 0]).head_offsets(2) == (3, 0)
    assert all(offset < 128 for offset in AttentionConfig(stride_offsets="spread").head_offsets(300))
