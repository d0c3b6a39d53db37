"""The tokens that calibration looks at: windows of a text or of a token file, drawn without overlap.

windows = calibration_windows("train.txt", tokenizer, vocab_size, samples=128, window=512, seed=0)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megasparse.config.loader import ConfigError
from megasparse.data.tokenizer import Tokenizer
from megasparse.evaluation.inputs import is_token_file, open_tokens, read_text

OPTION = "--calibration"


def calibration_windows(
    path: str, tokenizer: Tokenizer | None, vocab_size: int, *, samples: int, window: int, seed: int
) -> Tensor:
    """int64 [samples, window], in the order of the text; the same for the same text and seed.

    path: a text file, compressed or not, or the prefix of an indexed data set, read as one stream. Raises ConfigError
    where it is too short, or of another vocabulary.
    """
    if is_token_file(path):
        dataset = open_tokens(path, vocab_size, tokenizer, option=OPTION)
        tokens, count = dataset.tokens(0, dataset.num_tokens), dataset.num_tokens
    else:
        if tokenizer is None:
            raise ConfigError(
                f"{OPTION}: {path}: the model has no tokenizer for a text; must be the prefix of an indexed data set"
            )
        tokens = np.asarray(tokenizer.encode_batch([read_text(path, option=OPTION)])[0], dtype=np.int64)
        count = len(tokens)
    places = count // window
    if places < samples:
        raise ConfigError(
            f"{OPTION}: {path} has {count:,} tokens, room for {places} windows of {window}; must have at least "
            f"{samples * window:,} (--samples {samples} x --window {window})"
        )
    chosen = torch.randperm(places, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    rows = [np.asarray(tokens[place * window : (place + 1) * window], dtype=np.int64) for place in chosen.tolist()]
    return torch.from_numpy(np.stack(rows))
