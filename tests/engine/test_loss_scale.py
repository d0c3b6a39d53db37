"""The loss scale of float16 training goes on where both runs adapt one, and nowhere else."""

from __future__ import annotations

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from megasparse.engine.restore import restore_loss_scale

SAVED = {"dynamic": True, "cur_scale": 512.0, "cur_iter": 70, "last_overflow_iter": 60, "cur_hysteresis": 1}


def dynamic_scaler() -> DynamicLossScaler:
    return DynamicLossScaler(
        init_scale=2.0**16,
        scale_window=1000,
        min_scale=1.0,
        delayed_shift=2,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=True,
        dtype=torch.float16,
    )


def test_a_dynamic_scale_goes_on() -> None:
    scaler = dynamic_scaler()
    restore_loss_scale(scaler, {**SAVED, "scale_window": 7})
    assert {key: getattr(scaler, key) for key in SAVED} == SAVED
    assert scaler.scale_window == 1000, "a setting, not a state"


def test_a_run_of_another_precision_keeps_its_own() -> None:
    scaler = LossScaler(scale=1.0)
    restore_loss_scale(scaler, SAVED)
    assert scaler.loss_scale == 1.0 and not scaler.dynamic
    scaler = dynamic_scaler()
    restore_loss_scale(scaler, {"dynamic": False, "cur_scale": 1.0})
    restore_loss_scale(scaler, {})
    assert scaler.cur_scale == 2.0**16
    restore_loss_scale(None, SAVED)
