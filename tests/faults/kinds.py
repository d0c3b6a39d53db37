"""All kinds of faults by name; `SELECTED` are those of `make test`."""

from __future__ import annotations

from collections.abc import Callable

import disks
import files
import kernel_cache
import moments
import numbers_gone_wrong
import other_runs
from attempt import Attempt

KINDS: dict[str, Callable[[Attempt], None]] = {
    "kill in a step": moments.kill_in(moments.OF_A_STEP),
    "kill in a save": moments.kill_in(moments.OF_A_SAVE),
    "kill in a start": moments.kill_in(moments.OF_A_START),
    "kill at the end": moments.kill_in(moments.OF_THE_END),
    "kill at any time": moments.kill_at_any_time,
    "signal in a step": moments.signal_in(moments.OF_A_STEP),
    "signal in a save": moments.signal_in(moments.OF_A_SAVE),
    "signal in a start": moments.signal_in(moments.OF_A_START),
    "signal at the end": moments.signal_in(moments.OF_THE_END),
    "signal at any time": moments.signal_at_any_time,
    "Ctrl-C twice": moments.signal_twice,
    "flipped byte": files.in_checkpoints(files.flip_byte),
    "zeroed page": files.in_checkpoints(files.zero_page),
    "truncated file": files.in_checkpoints(files.truncate),
    "file of another step": files.in_checkpoints(files.take_other_step),
    "missing file": files.in_checkpoints(files.remove),
    "damaged file of the run": files.damaged_run_file,
    "damaged lines": files.damaged_lines,
    "stray names": files.stray_names,
    "power cut": disks.power_cut,
    "disk full": disks.disk_full,
    "read-only disk": disks.read_only,
    "folder deleted": disks.folder_deleted,
    "damaged kernel cache": kernel_cache.damaged_cache,
    "NaN in a gradient": numbers_gone_wrong.nan_gradient,
    "mask bit": numbers_gone_wrong.mask_bit,
    "ranks that differ": other_runs.ranks_that_differ,
    "code that differs": other_runs.other_code,
    "data replaced": other_runs.data_replaced,
    "two runs at once": other_runs.two_runs,
}
SELECTED: list[tuple[str, int]] = [
    ("kill in a save", 0),
    ("kill in a step", 11),
    ("signal in a step", 7),
    ("signal in a save", 18),
    ("signal in a start", 62),
    ("power cut", 0),
    ("flipped byte", 7),
    ("zeroed page", 7),
    ("truncated file", 7),
    ("file of another step", 7),
]
"""Kinds that are cheap, and the numbers of tries. Most are of the layout of one rank, whose starts cost one second."""

PROOF = ("file of another step", 62)
"""Weights of step 4 under the index of step 6: a run that compares no checksums goes on from them."""
