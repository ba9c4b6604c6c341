"""What `twotower index` does: indexes built ahead of a search, saved, and told of."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from twotower.config import Config, FreeText
from twotower.console import say
from twotower.embedding.store import EmbeddingStore
from twotower.index_config import Indexed
from twotower.retrieval.auto.card import CARD, Card, table
from twotower.retrieval.build import store_fingerprint
from twotower.retrieval.clip_retrieval import NAMES, write_for_clip_retrieval
from twotower.retrieval.index import INDEXES, Modality
from twotower.retrieval.kept import index_fingerprint, keep_index, kept_folder, make_index
from twotower.retrieval.saved import read_manifest
from twotower.retrieval.search.opening import open_stores
from twotower.runs import store_path
from twotower.settings import ConfigError, to_plain

log = logging.getLogger(__name__)

FOR_CLIP_RETRIEVAL = (*NAMES.values(), "metadata")
MODALITIES = {
    Indexed.image: (Modality.images,),
    Indexed.text: (Modality.texts,),
    Indexed.both: (Modality.images, Modality.texts),
}


def index_store(config: Config, free: FreeText) -> None:
    """Build and save the indexes of the stores, or with the verb `show` describe a saved one.

    Raises:
        ConfigError: the store is missing or lacks a modality, or the index cannot take its rows.
    """
    if free.verb == "show":
        say(describe(Path(free.path) if free.path is not None else _folder_of(config)))
        return
    if free.verb is not None:
        raise ConfigError(
            f"index does not know {free.verb}; it builds (`twotower index store=... index=...`) or "
            "shows what is saved (`twotower index show path=...`)"
        )
    if config.index.partition_by:
        raise ConfigError(
            "index.partition_by makes a small index a value when a search begins; leave it out here"
        )
    if config.distributed.num_threads:
        torch.set_num_threads(config.distributed.num_threads)
    stores = open_stores(store_path(config), config.index.collections)
    if config.index.folder and len(stores) > 1:
        raise ConfigError(
            f"index.folder names the index of one store, but there are {len(stores)}; leave it out"
        )
    for store in stores.values():
        for modality in MODALITIES[config.indexing.modality]:
            say(describe(save_of_store(config, store, modality)))


def save_of_store(config: Config, store: EmbeddingStore, modality: Modality) -> Path:
    """Build the index of a store's pictures or captions and save it, if it is not there yet.

    Returns:
        Its folder.

    Raises:
        ConfigError: as `build_index` and `save_index` do.
    """
    folder = kept_folder(config.index, store, modality)
    fingerprint = index_fingerprint(config.index, store, config.seed, modality)
    if not config.indexing.overwrite and _is_there(folder, fingerprint, config):
        say(f"{folder} is there already; build it again with indexing.overwrite=true\n")
        return folder
    started = time.monotonic()
    made = make_index(config.index, store, config.seed, modality)
    seconds = time.monotonic() - started
    rows = len(made.searched)
    rate = rows / max(seconds, 1e-9)
    log.info("indexed %s rows in %.1f s, %s rows/s", f"{rows:,}", seconds, f"{rate:,.0f}")
    if made.card is not None:
        tell(made.card)
    data = keep_index(
        *(made, folder, config.index, store, config.seed, modality),
        build_seconds=round(seconds, 3),
    )
    if config.indexing.clip_retrieval:
        beside = folder
        if modality is Modality.texts and config.indexing.modality is Indexed.both:
            beside = kept_folder(config.index, store)  # one folder holds both
        write_for_clip_retrieval(made.searched, store, modality, data, beside)
    return folder


def tell(card: Card) -> None:
    """Print what was tried and chosen; warn if text queries find too little."""
    for line in table(card):
        say(line)
    say(f"\n{card.chosen}: {card.reason}")
    warning = card.warning()
    for sentence in card.advice:
        if sentence != warning:
            say(sentence)
    say()
    if warning:
        log.warning("%s", warning)


def _is_there(folder: Path, fingerprint: str, config: Config) -> bool:
    """Whether the index that would be built is saved already, and asked for in the same words."""
    try:
        there = read_manifest(folder)
    except ConfigError:
        return False
    asked = {"kind": config.index.registered_name, **to_plain(config.index)}
    return bool(there["fingerprint"] == fingerprint and there["about"].get("asked") == asked)


def _folder_of(config: Config) -> Path:
    """Where the index of the config lies.

    Raises:
        ConfigError: there are several stores, or none.
    """
    if config.index.folder:
        return Path(config.index.folder)
    stores = list(open_stores(store_path(config), config.index.collections).values())
    if len(stores) > 1:
        raise ConfigError(f"there are {len(stores)} stores; say which index with path=...")
    chosen = MODALITIES[config.indexing.modality][0]
    return kept_folder(config.index, stores[0], chosen)


def describe(folder: Path) -> str:
    """The facts of a saved index, a line each.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    there = read_manifest(folder)
    about = there.get("about", {})
    data = folder / there["file"]
    if not data.is_file():
        raise ConfigError(f"the index {folder} is damaged; build it again")
    size, rows = data.stat().st_size, there["rows"]
    facts = {
        "index": str(folder),
        "kind": " ".join(filter(None, [there["kind"], there["config"].get("factory")])),
        "rows": f"{rows:,} of dimension {there['dim']}",
        "size": f"{size / 1e6:,.1f} MB, {size / max(rows, 1):,.0f} bytes a vector",
        "settings": _settings(there["kind"], there["config"]),
        "built": f"in {about['build_seconds']:,.1f} s" if "build_seconds" in about else "",
        "also holds": ", ".join(name for name in FOR_CLIP_RETRIEVAL if (folder / name).exists()),
        "card": str(folder / f"{CARD}.md") if (folder / f"{CARD}.md").is_file() else "",
        "fingerprint": there["fingerprint"],
        "store": _store_of(about),
    }
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items() if fact)


def _settings(kind: str, settings: dict[str, object]) -> str:
    """What differs from the defaults."""
    usual = to_plain(INDEXES.config_class(kind)())
    differing = [
        f"index.{name}={value}"
        for name, value in settings.items()
        if value != usual.get(name) and name not in ("collections", "folder")
    ]
    return " ".join(differing) or "the defaults"


def _store_of(about: dict[str, str]) -> str:
    """The store of an index, and whether it still has the rows that are in the index."""
    if "store" not in about:
        return ""
    what = f"the {about['modality']} of {about['store']}"
    try:
        store = EmbeddingStore.open(Path(about["store"]))
        same = store_fingerprint(store, Modality[about["modality"]]) == about["rows_fingerprint"]
    except ConfigError:
        return f"{what}, which cannot be opened now"
    return f"{what}, which {'has the same rows' if same else 'HAS OTHER ROWS NOW: build it again'}"
