"""From a config to what is searched: stores, parts of them, their indexes, and the encoder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
import torch

from twotower.config import Config, IndexConfig
from twotower.distributed import resolve_device
from twotower.embedding.encoder import Encoder
from twotower.embedding.fingerprint import check_space
from twotower.embedding.layout import MANIFEST
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.build import sample_positions
from twotower.retrieval.index import INDEXES, IdArray, Modality
from twotower.retrieval.kept import open_index
from twotower.retrieval.search.collection import Collection
from twotower.retrieval.search.filter_grammar import parse_filter
from twotower.retrieval.search.searcher import Searcher
from twotower.runs import store_path
from twotower.settings import ConfigError
from twotower.wandb_files import CHECKPOINTS, local_file

log = logging.getLogger(__name__)

MOST_PARTS = 1000  # collections that index.partition_by may make
SHOWN = 10  # names in a refusal


def open_searcher(config: Config, batch_size: int = 1, filter_text: str = "") -> Searcher:
    """The collections of a config, and the encoder that made them.

    Args:
        filter_text: a filter that will be asked for; what is wrong with it is said before anything
            large is loaded.

    Raises:
        ConfigError: one of them is missing, the checkpoint is not the one that made the stores, or
            the filter cannot be read.
    """
    if config.distributed.num_threads:
        torch.set_num_threads(config.distributed.num_threads)
    partition_by = config.index.partition_by
    stores = open_stores(store_path(config), [] if partition_by else config.index.collections)
    if filter_text:
        for store in stores.values():
            parse_filter(filter_text, store.schema())
    first, *others = stores.values()
    checkpoint = checkpoint_of(first, config.checkpoint)
    for store in others:
        store.check_checkpoint(checkpoint)
    # Batches are padded to their size, so a single query is no batch.
    encoder = Encoder.load(checkpoint, resolve_device(config.distributed), batch_size=batch_size)
    for store in stores.values():
        check_space(store.manifest, store.folder, encoder.description(), f"checkpoint {checkpoint}")
    return Searcher(encoder, *open_collections(config, stores))


def open_collections(config: Config, stores: Mapping[str, EmbeddingStore]) -> list[Collection]:
    """A collection a store, or with index.partition_by one a value of that column.

    Raises:
        ConfigError: there is no such column, or index.collections names a value that is not there.
    """
    modality = Modality[f"{config.search.modality.name}s"]
    if config.index.folder and (len(stores) > 1 or config.index.partition_by):
        raise ConfigError(
            "index.folder names the index of one whole store; leave it out where several stores or "
            "parts of one are searched"
        )
    if not config.index.partition_by:
        return [
            Collection(
                store,
                open_index(config.index, store, config.seed, modality),
                name=name,
                modality=modality,
            )
            for name, store in stores.items()
        ]
    chosen = list(dict.fromkeys(config.index.collections))
    parts = {name: partitions(store, config.index.partition_by) for name, store in stores.items()}
    values = sorted({value for found in parts.values() for value in found})
    for name in chosen:
        if name not in values:
            raise ConfigError(
                f"index.collections names {name}, but the column {config.index.partition_by} has "
                f"{_some(values)}"
            )
    if not chosen and len(values) > MOST_PARTS:
        raise ConfigError(
            f"the column {config.index.partition_by} has {len(values)} values, and "
            f"index.partition_by makes at most {MOST_PARTS} collections; choose some with "
            "index.collections=[...], or use filter="
        )
    return [
        build_part(
            config.index,
            store,
            ids,
            name=f"{name}/{value}" if len(stores) > 1 else value,
            modality=modality,
            seed=config.seed,
        )
        for name, store in stores.items()
        for value, ids in parts[name].items()
        if value in chosen or not chosen
    ]


def open_stores(folder: Path, names: Sequence[str]) -> dict[str, EmbeddingStore]:
    """One store, the stores in a folder of them, or those that are named, by their names.

    A name is that of a store in the folder, or the path of one.

    Raises:
        ConfigError: there is none, or one that is named is not there.
    """
    inside = dict(_stores_in(folder))
    if not names:
        places = inside or {"": folder}
        return {name: EmbeddingStore.open(place) for name, place in places.items()}
    for name in names:
        if name not in inside and not Path(name).is_dir():
            where = f"{folder} has {_some(list(inside))}" if inside else "no folder has this name"
            raise ConfigError(f"index.collections names {name}, but {where}")
    return {name: EmbeddingStore.open(inside.get(name, Path(name))) for name in names}


def _stores_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """The stores in a folder that is none itself."""
    if not folder.is_dir() or (folder / MANIFEST).exists():
        return
    for place in sorted(folder.iterdir()):
        if (place / MANIFEST).is_file():
            yield place.name, place


def partitions(store: EmbeddingStore, column: str) -> dict[str, IdArray]:
    """The ids of the rows with each value of a column, ascending; in the order of the values.

    Rows without a value are in no part.

    Raises:
        ConfigError: there is no such column, or its values are no names.
    """
    schema = store.schema()
    if column not in schema.names:
        raise ConfigError(
            f"index.partition_by names the column {column}, but the store {store.folder} has "
            f"{', '.join(schema.names)}"
        )
    if pt.is_nested(schema.field(column).type):
        raise ConfigError(
            f"index.partition_by={column} holds {schema.field(column).type}; it takes a column of "
            "one text or number a row"
        )
    tables = [
        store.table(place, ["row_id", column])
        for place in range(max(1, len(store.manifest.shards)))
    ]
    values = pa.concat_tables(tables, promote_options="permissive")
    known = values.filter(values[column].is_valid())
    if lost := values.num_rows - known.num_rows:
        log.warning("%d rows have no %s and so are in no collection", lost, column)
    kind = known[column].type
    plain = known[column].cast(kind.value_type) if pt.is_dictionary(kind) else known[column]
    coded = plain.combine_chunks().dictionary_encode()
    code, ids = coded.indices.to_numpy(), known["row_id"].to_numpy()
    order = np.lexsort((ids, code))
    parts = np.split(ids[order], np.flatnonzero(np.diff(code[order])) + 1)
    names = [str(value) for value in coded.dictionary.to_pylist()]
    return dict(sorted(zip(names, parts, strict=True))) if names else {}


def build_part(
    config: IndexConfig,
    store: EmbeddingStore,
    row_ids: IdArray,
    *,
    name: str,
    modality: Modality = Modality.images,
    seed: int = 1,
) -> Collection:
    """A collection of some rows of a store, with an index of its own.

    Raises:
        ConfigError: the store lacks the modality, or the index cannot take so few rows.
    """
    index = INDEXES.build(config, store.manifest.dim)
    collection = Collection(store, index, name=name, modality=modality, row_ids=row_ids)
    rows = collection.vectors(row_ids)
    normalized = store.manifest.normalized
    if index.train_rows:
        index.train(
            rows[sample_positions(len(rows), index.train_rows, seed)], normalized=normalized
        )
    index.add(rows, row_ids, normalized=normalized)
    return collection


def checkpoint_of(store: EmbeddingStore, asked: str) -> Path:
    """The checkpoint that made a store: the one asked for, the one it names, or one beside it.

    Raises:
        ConfigError: it is not there, or another one made the store.
    """
    if not asked and not store.manifest.checkpoint:
        raise ConfigError(
            f"the store {store.folder} does not say which checkpoint made it; give checkpoint=..."
        )
    named = local_file(asked or store.manifest.checkpoint, CHECKPOINTS)
    places = [named] if asked else [named, store.folder.parent / named.name]
    for place in places:
        if place.is_file():
            store.check_checkpoint(place)
            return place
    raise ConfigError(
        f"the checkpoint {places[0]} of the store {store.folder} is not there; give checkpoint=..."
    )


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
