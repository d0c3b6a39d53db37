#!/bin/sh
# Pretrains a small model on the Python standard library's own source: tokenizer, tokens, training, report.
# Needs nothing from the network. Words given to it go to the run: sh launch/quickstart.sh sparsity.algorithm=rigl
set -eu

cd "$(dirname "$0")/.."
sh launch/quickstart_data.sh

export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec deepspeed --num_accelerators 2 launch/pretrain.py --config configs/quickstart.yaml "$@"
