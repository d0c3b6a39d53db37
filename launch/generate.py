"""Sample text from a run, or from a model folder (tools/convert_checkpoint.py).

    python launch/generate.py --run runs/quickstart-mst --prompt "def " [--step 300] [--num-samples 3]

The newest good checkpoint answers, or that of --step, in float32, under the attention pattern of its last training
step. On a CPU pruned layers are packed, and computed by sparse kernels where that is faster (--kernels). Text goes to
standard output, all else to standard error. Exit status: 0, or 2 for what the user must mend.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from megasparse.data.arguments import positive
from megasparse.launching.host_memory import use_huge_pages
from megasparse.utils.streams import use_utf8


def main() -> int:
    use_utf8()
    arguments = parse_arguments()
    # DeepSpeed is here only for reading its files; its search for an accelerator would print on standard output.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    use_huge_pages(os.environ)
    from megasparse.inference.compression import compress_model
    from megasparse.inference.generation import check_sampling
    from megasparse.inference.sampling import sample_text
    from megasparse.inference.trained import open_trained

    try:
        check_sampling(arguments.temperature, arguments.top_k or None, arguments.top_p)
        trained = open_trained(arguments.run, arguments.step, arguments.device)
        for reason in trained.passed_over:
            print(f"warning: passed over: {reason}", file=sys.stderr)
        print(f"step {trained.step}, attention {trained.pattern}, on {arguments.device}", file=sys.stderr)
        plan = compress_model(trained.model, arguments.kernels)
        if plan.num_packed:
            print(*plan.lines(), sep="\n", file=sys.stderr)
        first_seed = trained.config.run.seed if arguments.seed is None else arguments.seed
        for seed in range(first_seed, first_seed + arguments.num_samples):
            if arguments.num_samples > 1:
                print(f"--- seed {seed}")
            text = sample_text(
                trained.model,
                trained.tokenizer,
                arguments.prompt,
                arguments.tokens,
                seed=seed,
                temperature=arguments.temperature,
                top_k=arguments.top_k or None,
                top_p=arguments.top_p,
                end_tokens=trained.end_tokens,
                begin_token=trained.begin_token,
            )
            print(text)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, metavar="FOLDER", help="run folder or model folder")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to take; default: the newest good one")
    parser.add_argument("--prompt", default="\n", metavar="TEXT", help="text to continue; default: a line end")
    parser.add_argument("--tokens", type=positive, default=200, metavar="N", help="tokens to add at most; default: 200")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: greedy; default: 0.8")
    parser.add_argument("--top-k", type=int, default=50, metavar="K", help="0: all tokens; default: 50")
    parser.add_argument("--top-p", type=float, metavar="P", help="fewest tokens that reach probability P; default: all")
    parser.add_argument("--seed", type=_seed, metavar="S", help="of the first sample; default: the run's")
    parser.add_argument("--num-samples", type=positive, default=1, metavar="N", help="samples of seeds S, S + 1, ...")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0], help=f"default here: {devices[0]}")
    kernels = "of pruned layers on a CPU; auto: sparse where faster; default: auto"
    parser.add_argument("--kernels", choices=("auto", "dense", "sparse"), default="auto", help=kernels)
    return parser.parse_args()


def _seed(text: str) -> int:
    """A seed, with room for those of further samples."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text}; must be 0 to 2^63 - 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
