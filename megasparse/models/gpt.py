"""The GPT family: GPT-2 and Llama style decoders, told apart by the configuration.

    x = tokens + positions
    x = x + attention(norm(x))        for each block; in training each branch may be scaled, or left out of a step
    x = x + mlp(norm(x))
    logits = head(norm(x))

With `model.normalization_position: post` the blocks are those of ``post_norm``, and the head reads the output of the
last one.

Which layers are sparse is the factory's business; nothing here depends on it.
Tensor names: B samples, T tokens, C hidden size, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.layers import (
    MLP,
    AnyLayerCache,
    Attention,
    HeadInChunks,
    InputEmbedding,
    JoinedCaches,
    KeyValueCache,
    LayerFactory,
    SparseLinear,
    Vocabulary,
    scaled_branch,
    shard_spec_of,
)
from megasparse.models.post_norm import PostNormBlock


class Block(nn.Module):
    """One transformer block: attention and MLP, each normalised before and added to the residual stream."""

    def __init__(
        self, name: str, config: ModelConfig, attention: AttentionConfig, factory: LayerFactory, attention_kernel: str
    ) -> None:
        super().__init__()
        # GPT-2: 2 L projections add to the residual stream, so each is scaled down by sqrt(2 L).
        output_std = config.init_std / sqrt(2 * config.num_layers)
        self.attention_norm = factory.norm(config)
        self.attention = Attention(
            f"{name}.attention", config, attention, factory, output_std=output_std, kernel=attention_kernel
        )
        self.mlp_norm = factory.norm_of_sum(config)
        self.mlp = MLP(f"{name}.mlp", config, factory, output_std=output_std)
        self.branch_scales = (1.0, 1.0)
        """What attention and MLP are multiplied by in training; 0: left out."""

    def forward(
        self, x_BTC: torch.Tensor, documents_BT: torch.Tensor | None = None, cache: AnyLayerCache | None = None
    ) -> torch.Tensor:
        of_attention, of_mlp = self.branch_scales if self.training else (1.0, 1.0)
        normalized_BTC = self.attention_norm(x_BTC)
        attended_BTC = scaled_branch(self.attention, of_attention, normalized_BTC, documents_BT, cache)
        x_BTC, normalized_BTC = self.mlp_norm(x_BTC, attended_BTC)
        return x_BTC + scaled_branch(self.mlp, of_mlp, normalized_BTC)


class GPT(nn.Module):
    """A decoder-only language model.

    Args:
        config: shapes and kinds of the layers.
        attention: stride of the attention patterns; the patterns themselves are set by `set_attention_patterns`.
        vocab_size: entries of the tokenizer; the table is padded, see `config.padded_vocab_size`.
        factory: makes the layers, dense or sparse, whole or divided over tensor-parallel ranks.
        recompute: keep only the input of each block and recompute the block in the backward pass.
        attention_kernel: kernel of `hybrid_attention`.
        loss_kernel: kernel of `cross_entropy_`.
        reset_positions: learned positions begin anew with each document.

    Raises:
        ValueError: a sparse layer's widths are not multiples of its unit.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: AttentionConfig,
        vocab_size: int,
        factory: LayerFactory,
        *,
        recompute: bool = False,
        attention_kernel: str = "auto",
        loss_kernel: str = "auto",
        reset_positions: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.recompute = config, vocab_size, recompute
        ranks = factory.tensor_parallel
        rows, C, std = config.padded_vocab_size(vocab_size, ranks.size), config.hidden_size, config.init_std
        tokens = factory.embedding("embedding.tokens", rows, C, std, divided=True)
        positions = None
        if config.position_embedding == "learned":
            positions = factory.embedding("embedding.positions", config.seq_length, C, std)
        self.embedding = InputEmbedding(tokens, positions, reset_positions)
        is_post = config.normalization_position == "post"
        block = PostNormBlock if is_post else Block
        self.layers = nn.ModuleList(
            block(f"layers.{i}", config, attention, factory, attention_kernel) for i in range(config.num_layers)
        )
        self.tie_layers(range(config.num_layers))
        self.final_norm = nn.Identity() if is_post else factory.norm(config)
        shared = tokens.weight if config.tie_embeddings else None
        self.head = factory.column("head", C, rows, bias=False, init_std=std, weight=shared)
        if config.tie_embeddings:
            tokens.tie(self.head)
        self.vocabulary = Vocabulary(vocab_size, rows, ranks, loss_kernel)
        self.head_in_chunks = HeadInChunks(self.head, self.vocabulary)
        self.token_multiple = ranks.size if ranks.sequence_parallel else 1

    def forward(
        self,
        tokens_BT: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        *,
        cache: KeyValueCache | JoinedCaches | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Logits [B, T, V] for int64 tokens. Objectives take ``hidden_states`` and ``head_in_chunks`` instead.

        Args:
            documents_BT: number of the document of each token, never decreasing along the tokens; no token sees
                another document. None: one document.
            cache: keys and values of earlier tokens, which these ones follow, or of S texts that tokens [1, S] continue
                by one each; not with documents.
            last_only: logits of the last token, [B, 1, V]: of a long text those of all take more memory than its keys
                and values. Where tokens are divided over the ranks, a rank has not all of them.

        Raises ValueError where the positions exceed a table of learned ones.
        """
        x_BTC = self.hidden_states(tokens_BT, documents_BT, cache=cache)
        assert not last_only or self.token_multiple == 1
        return self.logits(x_BTC[:, -1:] if last_only else x_BTC)

    def hidden_states(
        self,
        tokens_BT: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        *,
        cache: KeyValueCache | JoinedCaches | None = None,
        outputs: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """What the head reads, [B, T, C] as it lies between layers; arguments as in ``forward``.

        outputs: a list that the output of each block is added to, [B, T, C] as well.
        """
        assert cache is None or documents_BT is None, "a cache holds one document"
        x_BTC = self.embedding(tokens_BT, documents_BT, first=0 if cache is None else cache.length)
        for number, computing in enumerate(self.sources):
            block, own = self.layers[computing], None if cache is None else cache.layers[number]
            x_BTC = self._run(block, x_BTC, documents_BT, own)
            if number in self.idle and self.training and torch.is_grad_enabled():
                # Visited, so that its gradients are zero in every ZeRO stage.
                x_BTC = x_BTC + scaled_branch(self.layers[number], 0.0, x_BTC)
            if outputs is not None:
                outputs.append(x_BTC)
        return self.final_norm(x_BTC)

    def logits(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """Logits of all entries, [B, T, V], from hidden states; ``head_in_chunks`` never holds them all at once."""
        return self.vocabulary.logits(self.head(x_BTC))

    def set_attention_patterns(self, patterns: Sequence[Sequence[str]]) -> None:
        """Set the pattern of every query head: one tuple of names per layer.

        Raises ValueError for a wrong number of layers or heads, or an unknown pattern.
        """
        if len(patterns) != len(self.layers):
            raise ValueError(f"attention patterns: got {len(patterns)} layers, the model has {len(self.layers)}")
        for block, heads in zip(self.layers, patterns, strict=True):
            block.attention.set_patterns(heads)

    def set_branch_scales(self, scales: Sequence[tuple[float, float]]) -> None:
        """Set what attention and MLP of each block are multiplied by in training; 0: left out. One pair per layer."""
        for block, of_block in zip(self.layers, scales, strict=True):
            block.branch_scales = of_block

    def tie_layers(self, sources: Sequence[int]) -> None:
        """Let layer i be computed by block sources[i]. Blocks that then compute no layer have gradients of zero."""
        assert len(sources) == len(self.layers)
        self.sources, self.idle = list(sources), set(range(len(sources))) - set(sources)

    def sparse_layers(self) -> dict[str, SparseLinear]:
        """The sparse linear layers by name, in the order of the forward pass."""
        return {name: module for name, module in self.named_modules() if isinstance(module, SparseLinear)}

    def num_parameters(self) -> int:
        """Parameters over all ranks, inactive ones included; shared and replicated ones count once, and those of blocks
        that compute no layer do not."""
        unused = {parameter for number in self.idle for parameter in self.layers[number].parameters()}
        return sum(prod(shard_spec_of(parameter).shape) for parameter in self.parameters() if parameter not in unused)

    def _run(
        self, block: nn.Module, x_BTC: torch.Tensor, documents_BT: torch.Tensor | None, cache: AnyLayerCache | None
    ) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            # There is no dropout, so no random state needs to be kept.
            return checkpoint(block, x_BTC, documents_BT, use_reentrant=False, preserve_rng_state=False)
        return block(x_BTC, documents_BT, cache=cache)
