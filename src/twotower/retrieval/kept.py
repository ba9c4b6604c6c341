"""A store's built index, kept beside the store so that the next search need not train again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path

from twotower.config import IndexConfig
from twotower.embedding.store import EmbeddingStore
from twotower.engine_config import Engine
from twotower.retrieval.build import build_index, store_fingerprint
from twotower.retrieval.exact import ExactConfig
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.index import Modality, VectorIndex
from twotower.retrieval.milvus_collection import MilvusConfig
from twotower.retrieval.milvus_store import open_collection
from twotower.retrieval.saved import MANIFEST, load_index, save_index
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
    nothing to learn and is built at once from the store's files, so it is never kept. Where nothing
    can be written, the search goes on with a warning.

    Raises:
        ConfigError: as `build_index` does.
    """
    if isinstance(config, MilvusConfig):
        return open_collection(config, store, modality)
    if isinstance(config, ExactConfig):
        return _built(config, store, seed, modality)
    folder = kept_folder(config, store, modality)
    fingerprint = _fingerprint(config, store, seed, modality)
    try:
        index = load_index(folder, fingerprint, config)
    except ConfigError as reason:
        # It is only a cache; what is wrong with the config itself is said by the building.
        if (folder / MANIFEST).exists():
            log.info("%s", str(reason).replace("build it again", "building it again"))
    else:
        log.info("using the index %s, built earlier from the same rows", folder)
        return index
    index = _built(config, store, seed, modality)
    try:
        save_index(index, folder, fingerprint)
    except (ConfigError, OSError) as error:
        log.warning("the index is not kept for the next search: %s", error)
    else:
        log.info("kept the index in %s", folder)
    return index


def kept_folder(
    config: IndexConfig, store: EmbeddingStore, modality: Modality = Modality.images
) -> Path:
    """`index/<store>-<index>` beside the store's folder, `models/<run>/index/store-HNSW32`.

    An index of captions has `-texts` behind it.
    """
    name = config.factory if isinstance(config, FaissConfig) else config.registered_name
    safe = re.sub(r"[^\w,.-]", "_", name)[:100]
    place = store.folder
    if not place.name.strip("."):  # given as `.` or `..`: what it is called says the whole path
        place = Path(os.path.abspath(place))
    if config.engine is Engine.ray:
        safe += f"-ray{config.shards}"
    of_texts = "-texts" if modality is Modality.texts else ""
    return place.parent / "index" / f"{place.name}-{safe}{of_texts}"


def _built(
    config: IndexConfig, store: EmbeddingStore, seed: int, modality: Modality
) -> VectorIndex:
    log.info("indexing %s rows of %s", f"{len(store):,}", store.folder)
    return build_index(config, store, modality=modality, seed=seed)


def _fingerprint(config: IndexConfig, store: EmbeddingStore, seed: int, modality: Modality) -> str:
    rows = store_fingerprint(store, modality)
    settings = to_plain(config)
    for name in IndexConfig.not_of_the_rows:
        settings.pop(name)
    about = [rows, config.registered_name, settings, seed]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()
