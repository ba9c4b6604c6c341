"""Look at, check, join or tidy embedding stores: `store info|verify|merge|compact`."""

from __future__ import annotations

from pathlib import Path

from twotower.config import Config, FreeText
from twotower.console import say
from twotower.embedding.about import about_store, verify_with_checkpoint
from twotower.embedding.merge import merge_stores
from twotower.embedding.rewrite import compact_store
from twotower.embedding.store import EmbeddingStore
from twotower.runs import store_path
from twotower.settings import ConfigError


def run(config: Config, free: FreeText) -> None:
    """Do what the verb names with the store of the run, or `store=`; say what was found."""
    if free.verb == "merge":
        if not free.path:
            raise ConfigError("store merge writes a new store; say where with path=...")
        merged = merge_stores([Path(name) for name in config.stores.inputs], Path(free.path))
        say(f"merged {len(config.stores.inputs)} stores into {free.path}: {merged.rows:,} rows")
        return
    folder = store_path(config)
    if free.verb == "info":
        say(about_store(EmbeddingStore.open(folder)))
    elif free.verb == "verify":
        say(verify_with_checkpoint(EmbeddingStore.open(folder), config))
    elif free.verb == "compact":
        say(f"compacted {folder}: {compact_store(folder).rows:,} rows in the source's order")
    else:
        raise ConfigError(
            f"store does not know {free.verb or 'what to do'}; it takes info, verify, merge or "
            "compact, as in `twotower store verify store=models/x/store`"
        )
