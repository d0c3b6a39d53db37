"""Builds the training and validation datasets of a run from prefixes of indexed data.

train, valid = build_datasets(train_sources=[("data/web", 0.9), ("data/code", 0.1)], valid_sources=None,
                              valid_fraction=0.01, seq_length=1024, vocab_size=50257, seed=0)
"""

from __future__ import annotations

from collections.abc import Sequence
from os import fspath
from typing import Any

from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.data.dataset import ConcatenatedDataset, PackedDataset, split_documents
from megasparse.data.facts import DataFacts, EndOfDocument, recorded_end_of_document, recorded_tokenizer
from megasparse.data.index_format import DatasetError
from megasparse.data.indexed import IndexedDataset
from megasparse.data.sampler import BlendedDataset, ShuffledDataset, derive_seed
from megasparse.data.supervised_dataset import SupervisedDataset
from megasparse.data.tokenizer import Tokenizer, load_tokenizer

Source = tuple[str, float]

ANOTHER_FORMAT = "both are one tokenizer in two formats, which nothing here can tell"
"""Equal ids for some texts do not show it: converted files differ in how they treat rare characters and spaces."""


def build_datasets(
    *,
    train_sources: Sequence[Source],
    valid_sources: Sequence[Source] | None,
    valid_fraction: float,
    seq_length: int,
    vocab_size: int,
    seed: int,
    documents: bool = False,
) -> tuple[ShuffledDataset | BlendedDataset, ConcatenatedDataset | None]:
    """Returns (train, valid): train takes any global sample number, valid has a length and a fixed order.

    With `valid_sources`, these are the validation set, whole and one after the other (weights play no part), and the
    training sources are used whole. Without, `valid_fraction` is cut off the end of each training source, and valid
    joins these parts; it is None where the fraction is 0. `documents`: samples tell the document of each token, see
    `PackedDataset`. Sources with a loss mask become `SupervisedDataset`; all must have one, or none, and `documents`
    must be set. ValueError or `DatasetError` for what cannot be used.
    """
    settings: dict[str, Any] = {"seq_length": seq_length, "vocab_size": vocab_size, "documents": documents}
    opened = {prefix: IndexedDataset(prefix) for prefix, _ in (*train_sources, *(valid_sources or ()))}
    _check_loss_masks(list(opened.values()), documents)
    train_parts: list[PackedDataset | SupervisedDataset] = []
    valid_parts = [_samples(opened[prefix], settings) for prefix, _ in valid_sources or ()]
    for prefix, _ in train_sources:
        indexed = opened[prefix]
        if valid_sources is not None:
            train_parts.append(_samples(indexed, settings))
            continue
        train_range, valid_range = split_documents(indexed, (1.0 - valid_fraction, valid_fraction))
        for name, piece, parts in (("training", train_range, train_parts), ("validation", valid_range, valid_parts)):
            if len(piece):
                parts.append(_packed(indexed, piece, name, settings))

    shuffled = [ShuffledDataset(part, derive_seed(seed, number)) for number, part in enumerate(train_parts)]
    weights = [weight for _, weight in train_sources]
    # The blend also checks the weights, so it is built even where a single source needs no mixing.
    blend = BlendedDataset(shuffled, weights, derive_seed(seed, len(shuffled)))
    train = blend if len(shuffled) > 1 else shuffled[0]
    valid = ConcatenatedDataset(valid_parts) if valid_parts else None
    return train, valid


def _check_loss_masks(datasets: Sequence[IndexedDataset], documents: bool) -> None:
    supervised = [indexed for indexed in datasets if indexed.loss_mask is not None]
    plain = [indexed for indexed in datasets if indexed.loss_mask is None]
    if supervised and plain:
        raise DatasetError(
            f"{supervised[0].prefix} has a loss mask and {plain[0].prefix} none; all data of a run must have one "
            "(--supervised of tools/preprocess_data.py), or none"
        )
    if supervised and not documents:
        raise ConfigError(
            f"data.document_masking: false with supervised data, {supervised[0].prefix}; must be true: the examples of "
            "a sample must not see each other"
        )


def _samples(
    indexed: IndexedDataset, settings: dict[str, Any], start: int = 0, stop: int | None = None
) -> PackedDataset | SupervisedDataset:
    if indexed.loss_mask is None:
        return PackedDataset(indexed, start=start, stop=stop, **settings)
    own = {name: value for name, value in settings.items() if name != "documents"}
    return SupervisedDataset(indexed, start=start, stop=stop, **own)


def _packed(
    indexed: IndexedDataset, piece: range, name: str, settings: dict[str, Any]
) -> PackedDataset | SupervisedDataset:
    try:
        return _samples(indexed, settings, piece.start, piece.stop)
    except DatasetError as error:
        raise DatasetError(f"the {name} split of {fspath(indexed.prefix)}: {error}") from error


def open_tokenizer(config: RunConfig, recorded: EndOfDocument | None = None) -> Tokenizer | None:
    """The run's tokenizer, where one is named, ending documents as the run's data does. ValueError for no tokenizer,
    and for one that the data was not made with, as far as the data tells.

    recorded: what a run or a model folder says of itself, as `end_of_document` gave it; it needs no data.
    """
    if config.data.tokenizer is None:
        return None
    chosen = recorded or _beside_the_data(config)
    piece = None if chosen is None else chosen.piece
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.tokenizer_path, end_of_document=piece)
    if chosen is not None and tokenizer.end_of_document_id != chosen.id:
        named = config.data.tokenizer_path or config.data.tokenizer
        raise ConfigError(
            f"data.tokenizer: {named} ends documents with id {tokenizer.end_of_document_id}, the data with {chosen}; "
            "must be the tokenizer that the data was made with"
        )
    if recorded is None:
        _check_made_with(config, DataFacts.of(tokenizer))
    return tokenizer


def end_of_document(config: RunConfig, recorded: EndOfDocument | None = None) -> EndOfDocument | None:
    """The token that ends documents: as recorded, else as the data of the run says, else the tokenizer's own.

    None where there is no tokenizer and the data does not tell. To be kept with a run and with an export.
    """
    tokenizer = open_tokenizer(config, recorded)
    if tokenizer is None:
        return recorded or _beside_the_data(config)
    return EndOfDocument.of(tokenizer)


def _beside_the_data(config: RunConfig) -> EndOfDocument | None:
    """DatasetError also where parts of the data were made with different tokenizers."""
    end = recorded_end_of_document(_prefixes(config))
    recorded_tokenizer(_prefixes(config))
    return end


def _prefixes(config: RunConfig) -> list[str]:
    return [source.path for source in (*(config.data.train or ()), *(config.data.valid or ()))]


def _check_made_with(config: RunConfig, own: DataFacts) -> None:
    """Raise ConfigError where the data says that another tokenizer has made it: its ids would mean other texts."""
    found = recorded_tokenizer(_prefixes(config))
    if found is None or found[1].identity == own.identity:
        return
    prefix, made = found
    kind, _, file = made.tokenizer.partition(":")
    words = f"data.tokenizer={kind}" + (f" data.tokenizer_path=<that {file}>" if file else "")
    other_format = own.vocab_size == made.vocab_size and own.tokenizer.partition(":")[0] != kind
    raise ConfigError(
        f"data.tokenizer: {own.described} is not the tokenizer of {prefix}, which was made with {made.described}; must "
        f"be that one{f', also where {ANOTHER_FORMAT}' if other_format else ''} ({words}), or null "
        f"(data.tokenizer=null model.vocab_size={made.vocab_size})"
    )


def vocabulary_size(config: RunConfig, tokenizer: Tokenizer | None) -> int:
    """Entries that tokens may have. Raises ConfigError where model and tokenizer contradict each other."""
    wanted = config.model.vocab_size
    if tokenizer is None:
        assert wanted is not None, "check_run asks for one of the two"
        return wanted
    if wanted is not None and wanted < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {wanted} is below the {tokenizer.vocab_size} entries of data.tokenizer_path; "
            f"must be unset, or at least {tokenizer.vocab_size}"
        )
    return wanted or tokenizer.vocab_size


def build_data(config: RunConfig, vocab_size: int):
    """Training and validation sets: (anything indexed by global sample number, sequence or None)."""
    if config.data.train is None:
        raise ConfigError("data.train: unset; a list of {path: <prefix of .bin and .idx>, weight: <share>}")
    valid = config.data.valid
    return build_datasets(
        train_sources=[(source.path, source.weight) for source in config.data.train],
        valid_sources=None if valid is None else [(source.path, source.weight) for source in valid],
        valid_fraction=config.data.valid_fraction,
        seq_length=config.model.seq_length,
        vocab_size=vocab_size,
        seed=config.run.seed,
        documents=config.data.document_masking,
    )
