"""A store's built index, kept beside the store so that the next search need not train again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from twotower.config import IndexConfig
from twotower.embedding.store import EmbeddingStore
from twotower.engine_config import Engine, EngineConfig
from twotower.retrieval.auto.card import Card, remove_card, write_card
from twotower.retrieval.auto.choice import choose
from twotower.retrieval.auto.config import AutoConfig
from twotower.retrieval.build import build_index, shards_of, store_fingerprint
from twotower.retrieval.clip_retrieval import remove_for_clip_retrieval
from twotower.retrieval.engine import check_engine
from twotower.retrieval.exact import ExactConfig, ExactIndex
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.index import Modality, VectorIndex
from twotower.retrieval.milvus.collection import MilvusConfig
from twotower.retrieval.milvus.store import open_collection
from twotower.retrieval.rerank import RerankedIndex
from twotower.retrieval.saved import (
    MANIFEST,
    load_index,
    read_manifest,
    save_index,
    saved_config,
)
from twotower.settings import ConfigError, to_plain

log = logging.getLogger(__name__)


def open_index(
    config: IndexConfig,
    store: EmbeddingStore,
    seed: int = 1,
    modality: Modality = Modality.images,
) -> VectorIndex:
    """The kept index of a store's pictures or captions if it fits, else a new one, which is kept.

    It fits if it was made from these rows with these settings and this seed. The exact index has
    nothing to learn and is built at once from the store's files, so a search keeps it only where
    `index=auto` has chosen it by measuring; but it takes the one that `twotower index` saved. Where
    nothing can be written, the search goes on with a warning. With `index.folder` the index is the
    one that is saved there.

    Raises:
        ConfigError: as `build_index` and `check_engine` do; or the folder that is named holds no
            index of this store.
    """
    check_engine(config)
    if config.folder:
        return open_named(config, store, modality)
    if isinstance(config, MilvusConfig):
        return open_collection(config, store, modality)
    saved = saved_index(config, store, seed, modality)
    if saved is not None:
        return saved
    log.info("indexing %s rows of %s", f"{len(store):,}", store.folder)
    made = make_index(config, store, seed, modality)
    index = made.searched
    measured = made.card is not None and bool(made.card.tuned_on)
    if isinstance(config, ExactConfig) or (isinstance(index, ExactIndex) and not measured):
        return index
    folder = kept_folder(config, store, modality)
    try:
        keep_index(made, folder, config, store, seed, modality)
    except (ConfigError, OSError) as error:
        log.warning("the index is not kept for the next search: %s", error)
    else:
        log.info("kept the index in %s", folder)
        if isinstance(config, FaissConfig) and config.memory_map:
            return _with_rows(load_index(folder, config=config), store, modality)
    return index


class Made(NamedTuple):
    """A new index, and the card of one that was chosen by measuring."""

    searched: VectorIndex
    card: Card | None = None


def make_index(config: IndexConfig, store: EmbeddingStore, seed: int, modality: Modality) -> Made:
    """The index of a config, or with `index=auto` the one that measuring has chosen.

    Raises:
        ConfigError: as `build_index`, `choose` and `check_engine` do.
    """
    check_engine(config)
    if isinstance(config, AutoConfig):
        return Made(*choose(config, store, seed, modality))
    if isinstance(config, MilvusConfig):
        return Made(open_collection(config, store, modality))
    return Made(build_index(config, store, modality=modality, seed=seed))


def keep_index(
    made: Made,
    folder: Path,
    config: IndexConfig,
    store: EmbeddingStore,
    seed: int,
    modality: Modality,
    **about: Any,
) -> Path:
    """Save an index, and its card, where `saved_index` finds it.

    What else an earlier one has left there is removed first: its card, and its files for
    clip-retrieval.

    Returns:
        The file of the index itself.

    Raises:
        ConfigError: the folder cannot be written.
    """
    fingerprint = index_fingerprint(config, store, seed, modality)
    rows = {
        "store": os.path.abspath(store.folder),
        "modality": modality.name,
        "rows_fingerprint": store_fingerprint(store, modality),
        "seed": seed,
        "asked": {"kind": config.registered_name, **to_plain(config)},
    }
    try:
        remove_card(folder)
        # Captions may lie beside the pictures.
        for place in {folder, kept_folder(config, store)}:
            remove_for_clip_retrieval(modality, place)
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror or error}") from error
    data = save_index(made.searched, folder, fingerprint, {**rows, **about})
    if made.card is not None:
        made.card.fingerprint = fingerprint
        write_card(made.card, folder)
    return data


def saved_index(
    config: IndexConfig,
    store: EmbeddingStore,
    seed: int = 1,
    modality: Modality = Modality.images,
) -> VectorIndex | None:
    """The kept index if it fits; None, and a line in the log that says why, if not."""
    folder = kept_folder(config, store, modality)
    fingerprint = index_fingerprint(config, store, seed, modality)
    try:
        index = _with_rows(load_index(folder, fingerprint, config), store, modality)
    except ConfigError as reason:
        # It is only a cache; what is wrong with the config itself is said by the building.
        if (folder / MANIFEST).exists():
            log.info("%s", str(reason).replace("build it again", "building it again"))
        return None
    log.info("using the index %s, built earlier from the same rows", folder)
    return index


def open_named(config: IndexConfig, store: EmbeddingStore, modality: Modality) -> VectorIndex:
    """The index that is saved in `index.folder`, of whatever kind, if it is of the store's rows.

    Raises:
        ConfigError: there is none, or it was built from other rows.
    """
    folder = kept_folder(config, store, modality)
    manifest = read_manifest(folder)
    rows = manifest.get("about", {}).get("rows_fingerprint")
    if rows != store_fingerprint(store, modality):
        raise ConfigError(
            f"the index {folder} was not built from the {modality.name} of the store "
            f"{store.folder}; build it with `twotower index` and the same store= and index.folder="
        )
    saved = saved_config(manifest)
    if isinstance(saved, FaissConfig) and isinstance(config, FaissConfig):
        saved = saved.searched_as(config)
    where = {name: getattr(config, name) for name in EngineConfig.not_of_the_answer}
    saved = dataclasses.replace(saved, **where)
    index = load_index(folder, config=saved)
    log.info("using the index %s: %s", folder, index_name(saved))
    return _with_rows(index, store, modality)


def _with_rows(index: VectorIndex, store: EmbeddingStore, modality: Modality) -> VectorIndex:
    """A loaded index with the rows of its store, if it scores by them."""
    if isinstance(index, RerankedIndex):
        shards, normalized = shards_of(store, modality), store.manifest.normalized
        index.attach(shards, store.row_ids(), normalized=normalized)
    return index


def kept_folder(
    config: IndexConfig, store: EmbeddingStore, modality: Modality = Modality.images
) -> Path:
    """`index.folder`, or `index/<store>-<index>` beside the store, as in `index/store-HNSW32`.

    An index of captions has `-texts` behind it.
    """
    of_texts = "-texts" if modality is Modality.texts else ""
    if config.folder:
        named = Path(config.folder)
        return named.with_name(named.name + of_texts) if of_texts else named
    safe = re.sub(r"[^\w,.-]", "_", index_name(config))[:100]
    place = store.folder
    if not place.name.strip("."):  # given as `.` or `..`: what it is called says the whole path
        place = Path(os.path.abspath(place))
    if config.engine is Engine.ray:
        safe += f"-ray{config.shards}"
    return place.parent / "index" / f"{place.name}-{safe}{of_texts}"


def index_name(config: IndexConfig) -> str:
    """What tells an index from others of the same rows: the factory string, or the kind."""
    return config.factory if isinstance(config, FaissConfig) else config.registered_name


def index_fingerprint(
    config: IndexConfig, store: EmbeddingStore, seed: int, modality: Modality
) -> str:
    """Names the rows and the settings that an index is built from."""
    settings = to_plain(config)
    for name in config.not_of_the_rows:
        settings.pop(name)
    about = [store_fingerprint(store, modality), config.registered_name, settings, seed]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()
