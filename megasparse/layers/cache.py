"""Keys and values of the tokens that a model has seen, kept while it generates.

    cache = KeyValueCache(num_layers, capacity=200)
    logits = model(prompt_BT, cache=cache)         # with the fast attention kernel, as in training
    cache.advance(prompt_BT.shape[1])
    logits = model(token_B1, cache=cache)          # reads the keys that the attention patterns show to it
    cache.advance(1)

Texts of different lengths go on together, a token each, as one sample whose tokens are the new ones:

    logits = model(tokens_1S, cache=JoinedCaches(caches))
    for cache in caches:
        cache.advance(1)

All positions are kept, whatever the patterns are: under `strided` and `sparse` every key is seen again one stride
later, so nothing but `local` could forget.
Tensor names: B samples, S texts, G key-value heads of this rank, L capacity in tokens, N new tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class LayerCache:
    """Keys, turned by their positions already, and values of one layer; `length` tokens of them count."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._tensors: tuple[torch.Tensor, ...] = ()

    def store(self, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Write keys and values [B, G, N, D] behind the `length` tokens; the whole buffers, [B, G, L, D].

        What was written there before is replaced: new tokens count from the next ``advance`` on.
        """
        assert not torch.is_grad_enabled(), "a cache is for generation, without gradients"
        end = self.length + new[0].shape[2]
        assert end <= self.capacity, f"{end} tokens in a cache for {self.capacity}"
        if not self._tensors:
            self._tensors = tuple(x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in new)
        for kept, x in zip(self._tensors, new, strict=True):
            kept[:, :, self.length : end] = x
        return self._tensors


class KeyValueCache:
    """The caches of all layers. Memory is taken when the first tokens come."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Tokens that count."""
        return self.layers[0].length

    def advance(self, count: int) -> None:
        """The first `count` tokens of the last forward pass count from now on."""
        for layer in self.layers:
            layer.length += count


class JoinedLayerCaches:
    """The caches of one layer of several texts; `length` holds how many tokens of each count."""

    def __init__(self, texts: Sequence[LayerCache]) -> None:
        self.texts = tuple(texts)
        self.length = tuple(text.length for text in self.texts)


AnyLayerCache = LayerCache | JoinedLayerCaches
"""What attention may be given."""


class JoinedCaches:
    """The caches of several texts, for one new token of each: the model takes the tokens as [1, S].

    All but attention treats tokens one by one, so a token may stand beside those of other texts; attention reads the
    keys of its own. The texts advance by themselves.
    """

    def __init__(self, texts: Sequence[KeyValueCache]) -> None:
        self.layers = [JoinedLayerCaches(layers) for layers in zip(*(text.layers for text in texts), strict=True)]

    @property
    def length(self) -> tuple[int, ...]:
        """Tokens of each text that count."""
        return self.layers[0].length
