"""Gradients of the only data-parallel rank stay where the backward pass has put them.

    leave_gradients_in_place(engine)     # after deepspeed.initialize, with one data-parallel rank

DeepSpeed would copy them into a bucket, divide them by 1, reduce them over one rank, and copy them twice more. In bf16
on a CPU, with a vocabulary of 50,304, that was a sixth of a step (width 768, 2 layers, 2,048 tokens), and a bucket of
1 GB. Values are the same to the bit.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

NEEDED = ("average_tensor", "bit16_groups", "contiguous_gradients", "copy_grads_in_partition", "reduce_bucket_size")
"""Private names of DeepSpeed's optimizer; a version without them copies."""

OTHERS = ("cpu_offload", "has_moe_layers", "overlap_comm", "zenflow")
"""With these, averaging and copying do more than that."""


def leave_gradients_in_place(engine: Any) -> None:
    """For an engine of DeepSpeed with one data-parallel rank; where it cannot be done, nothing changes."""
    if engine.zero_optimization_stage() == 0:
        # float32, by ``config.checks``: in mixed precision the reduction would hand gradients to the optimizer too.
        engine.enable_backward_allreduce = False
        return
    zero = engine.optimizer
    # A subclass, or ZeRO 3, does more in the same places.
    if type(zero) is not DeepSpeedZeroOptimizer or any(not hasattr(zero, name) for name in NEEDED):
        return
    if not zero.contiguous_gradients or any(getattr(zero, name, False) for name in OTHERS) or _sums_apart(zero):
        return
    # A gradient larger than a bucket is reduced by itself, where it lies. (DeepSpeed divides by this size.)
    zero.reduce_bucket_size = 0.5
    zero.average_tensor = lambda tensor, communication_dtype: None
    zero.copy_grads_in_partition = lambda parameter, group: None


def _sums_apart(zero: Any) -> bool:
    """Whether gradients are summed in another dtype than theirs, in buffers that averaging fills."""
    sums_apart = getattr(zero, "_use_compact_grad_partition_buffer", lambda group: False)
    return any(map(sums_apart, range(len(zero.bit16_groups))))
