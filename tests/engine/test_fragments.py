"""When gradients may be read: after DeepSpeed's own streams and copies."""

from __future__ import annotations

from types import SimpleNamespace

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from megasparse.engine.fragments import wait_for_reductions


def test_gradients_on_their_way_to_the_host_are_waited_for() -> None:
    """With offloading DeepSpeed itself waits in its step, which comes after the gradient norm."""
    waited: list[bool] = []
    wait_for_reductions(SimpleNamespace(_wait_for_offload_copies=lambda: waited.append(True)))
    assert waited == [True]
    assert hasattr(DeepSpeedZeroOptimizer, "_wait_for_offload_copies"), "the name is DeepSpeed's"
    wait_for_reductions(SimpleNamespace())
