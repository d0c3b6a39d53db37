"""What the servers of tests import, from which ranks and programs are forked: what takes long in each is done once.

No thread is started, so that what is forked misses none.

    import imported_once            # in a process that will fork
"""

from __future__ import annotations

import gc
import os
import warnings
from pathlib import Path

from pages import leave_out_figures

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    # DeepSpeed looks at Muon for every optimizer, which imports torch's compiler.
    import deepspeed.runtime.zero.muon.muon_optimizer
    import torch

    import megasparse.data.arguments
    import megasparse.launching.exit
    import megasparse.reporting.report
    import megasparse.training.run
    import megasparse.utils.streams
    from megasparse.reporting.page import template_environment

leave_out_figures()
torch.set_num_threads(1)
# DeepSpeed asks a compiler which of its operators could be built.
assert deepspeed.ops.__compatible_ops__ and megasparse
assert len(list(Path("/proc/self/task").iterdir())) == 1, "a thread has been started: forked processes would miss it"
for name in ("report.html", "macros.html", "style.css"):
    template_environment().get_template(name)
# Collections of garbage in what is forked pass over all of this: half a second each otherwise.
gc.freeze()
