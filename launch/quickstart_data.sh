#!/bin/sh
# Tokenizer and tokens of the quickstart under data/quickstart, from the Python standard library's own source, where
# they are missing. Needs nothing from the network.
set -eu

cd "$(dirname "$0")/.."
library=$(python -c "import sysconfig; print(sysconfig.get_paths()['stdlib'])")
data=data/quickstart
mkdir -p "$data"

set_of_files="--input $library --glob *.py --exclude site-packages dist-packages test tests idlelib encodings pydoc_data"
set -f # the patterns are for the tools, not for the shell

if [ ! -f "$data/tokenizer.model" ]; then
    # shellcheck disable=SC2086 # one word per option
    python tools/train_tokenizer.py $set_of_files --vocab-size 2048 --output "$data/tokenizer.model"
fi
if [ ! -f "$data/tokens.idx" ]; then
    # shellcheck disable=SC2086
    python tools/preprocess_data.py $set_of_files --output-prefix "$data/tokens" --overwrite \
        --tokenizer sentencepiece --tokenizer-path "$data/tokenizer.model"
fi
