"""lm-evaluation-harness with MegaSparse models (extra `eval`: pip install 'megasparse[eval]').

    python launch/evaluate_harness.py --model megasparse --model_args run=runs/x,step=300 --tasks lambada_openai
    torchrun --standalone --nproc_per_node 8 launch/evaluate_harness.py --model megasparse --model_args run=runs/x ...

All options are those of the command `lm_eval`; this script only registers the model `megasparse` and lets rank 0 alone
print. model_args: megasparse/evaluation/harness.py. Exit status 2 for what the user must mend.
"""

from __future__ import annotations

import os
import sys

from megasparse.launching import LaunchEnvironment
from megasparse.launching.exit import EXPECTED, explain_and_exit
from megasparse.launching.failures import exit_after_lost_peer, exit_now
from megasparse.launching.host_memory import use_huge_pages
from megasparse.utils.streams import use_utf8


def main() -> int:
    use_utf8()
    rank = 0
    # The deepspeed launcher adds it, the harness does not know it.
    sys.argv = [word for word in sys.argv if not word.startswith("--local_rank")]
    try:
        rank = LaunchEnvironment.from_variables(os.environ).rank
        # DeepSpeed is here only for reading its files; the model says later which device it takes.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        use_huge_pages(os.environ)
        try:
            import megasparse.evaluation.harness  # noqa: F401  (registers the model)
        except ModuleNotFoundError as error:
            raise ValueError(f"{error.name} is not installed: pip install 'megasparse[eval]'") from None
        from lm_eval.__main__ import cli_evaluate

        if rank > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
        with exit_after_lost_peer(rank, "start the evaluation again"):
            cli_evaluate()
            exit_now(0)
    except EXPECTED as error:
        explain_and_exit(error, rank)
    return 0


if __name__ == "__main__":
    sys.exit(main())
