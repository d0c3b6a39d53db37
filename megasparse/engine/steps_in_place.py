"""DeepSpeed's optimizer step on CPUs without its copies of all gradients, and without its own norm.

Where most weights are inactive, those passes cost more than the update. The kernel takes averaged gradients as they
are, clips them on the way, and writes the weights of the model besides. Only this module and ``fragments`` touch
private parts of DeepSpeed's optimizers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import Tensor

from megasparse.engine.optimizer import MaskedAdamW

NEEDED = {
    DeepSpeedZeroOptimizer: (
        *("bit16_groups", "bit16_groups_flat", "parallel_partitioned_bit16_groups", "single_partition_of_fp32_groups"),
        *("params_in_partition", "params_not_in_partition", "averaged_gradients", "all_grad_tensors"),
        *("real_dp_process_group", "nccl_start_alignment_factor", "allgather_bucket_size", "free_grad_in_param_list"),
        *("_get_preflattened_grad_partition", "_release_preflattened_grad_buffers", "_optimizer_step"),
        "_update_model_bit16_weights",
    ),
    DeepSpeedZeroOptimizer_Stage3: (
        *("averaged_gradients", "fp32_partitioned_groups_flat", "_get_norm_groups", "_prepare_fp32_grad_for_sub_group"),
        "unscale_and_clip_grads",
    ),
}
"""Private names of DeepSpeed's optimizers; a version without them makes its own steps, with our kernel in them."""


@contextlib.contextmanager
def steps_in_place(engine: Any, optimizer: MaskedAdamW, norm: Tensor, *, copies_all: bool) -> Iterator[None]:
    """Let the next step of DeepSpeed's engine be one without copies, where that can be; every rank alike.

    norm: of all gradients as they are, finite. copies_all: all master weights are copied to the model, not only those
    of active blocks: where anybody may have changed them.
    """
    zero, limit = engine.optimizer, engine.gradient_clipping()
    if zero is optimizer:
        replaced: dict[str, Callable] = {"clip_fp32_gradients": lambda: None}
        owner = engine
    else:
        replaced, owner = _replacements(zero, optimizer, norm, copies_all), zero
    if replaced and limit > 0:
        optimizer.gradient_scale = min(1.0, limit / (float(norm) + 1e-6))
    with contextlib.ExitStack() as stack:
        for name, function in replaced.items():
            # Of the object, before its class's own.
            setattr(owner, name, function)
            stack.callback(delattr, owner, name)
        try:
            yield
        finally:
            optimizer.gradient_scale = 1.0
            optimizer.gradients.clear()
            optimizer.low.clear()


def _replacements(zero: Any, optimizer: MaskedAdamW, norm: Tensor, copies_all: bool) -> dict[str, Callable]:
    """Methods of DeepSpeed's optimizer by name; none where it is to make the step itself."""
    # Types, not subclasses: those do more in a step. With CPU offload gradients are in float32 copies already.
    if any(not hasattr(zero, name) for name in NEEDED.get(type(zero), ("",))) or float(zero.loss_scale) != 1.0:
        return {}
    if type(zero) is DeepSpeedZeroOptimizer:
        # Parts of a step that only other optimizers of DeepSpeed have.
        others = ("cpu_offload", "has_moe_layers", "zenflow", "torch_autocast_gradscaler")
        if any(getattr(zero, name, False) for name in others):
            return {}
        return {"step": partial(_step, zero, optimizer, norm, copies_all)}
    if any(getattr(zero, name, False) for name in ("offload_optimizer", "swap_optimizer", "torch_autocast_gradscaler")):
        return {}
    return {
        "_get_norm_groups": lambda: [norm.float()],
        "_prepare_fp32_grad_for_sub_group": partial(_hand_over, zero, optimizer),
        "unscale_and_clip_grads": lambda *_: None,
    }


def _hand_over(zero: Any, optimizer: MaskedAdamW, number: int) -> None:
    """The gradients of a group of stage 3, in place of a flat float32 copy."""
    optimizer.gradients[zero.fp32_partitioned_groups_flat[number]] = zero.averaged_gradients[number]
    zero.averaged_gradients[number] = None


@torch.no_grad()
def _step(zero: Any, optimizer: MaskedAdamW, norm: Tensor, copies_all: bool) -> None:
    """``DeepSpeedZeroOptimizer.step`` for a loss scale of 1 and gradients known to be finite."""
    zero.micro_step_id, zero.overflow, zero._global_grad_norm = INITIAL_MICRO_STEP_ID, False, norm.float()
    for number, flat in enumerate(zero.single_partition_of_fp32_groups):
        rank = dist.get_rank(group=zero.real_dp_process_group[number])
        low = zero.parallel_partitioned_bit16_groups[number][rank]
        whole = zero._get_preflattened_grad_partition(number)
        optimizer.gradients[flat] = zero.averaged_gradients[number] if whole is None else [whole]
        if not copies_all:
            optimizer.low[flat] = low
        zero._optimizer_step(number)
        if copies_all:
            low.copy_(flat)
        del optimizer.gradients[flat], whole
        zero.free_grad_in_param_list(zero.params_not_in_partition[number])
        zero.free_grad_in_param_list(zero.params_in_partition[number])
        zero._release_preflattened_grad_buffers(number)
        zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None
    all_gather_dp_groups(
        groups_flat=zero.bit16_groups_flat,
        partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
        dp_process_group=zero.real_dp_process_group,
        start_alignment_factor=zero.nccl_start_alignment_factor,
        allgather_bucket_size=zero.allgather_bucket_size,
    )
    for number in range(len(zero.bit16_groups)):
        zero._update_model_bit16_weights(number)
