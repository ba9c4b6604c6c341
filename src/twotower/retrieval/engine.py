"""Where an index runs: in this process, or in shards on the nodes of a Ray cluster."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from twotower.config import IndexConfig
from twotower.engine_config import Engine
from twotower.registry import Registry
from twotower.settings import Choice, ConfigError

T = TypeVar("T")
ConfigT = TypeVar("ConfigT", bound=IndexConfig)

ON_RAY = ("exact", "faiss")  # what can be cut into shards
ALONE = ("rerank", "memory_map", "gpu")  # settings of an index in one process


class IndexRegistry(Registry[T]):
    """Kinds of index; whatever the kind, `index.engine` says where it runs."""

    def build(self, config: Choice, *args: Any, **kwargs: Any) -> T:
        """An empty index of the kind and the engine that a config names.

        Raises:
            ConfigError: the engine is not installed, or does not run this kind.
        """
        if not isinstance(config, IndexConfig) or config.engine is Engine.local:
            return super().build(config, *args, **kwargs)
        check_engine(config)
        from twotower.retrieval.ray.index import RayIndex

        index: Any = RayIndex(config, *args, **kwargs)  # a VectorIndex, which is what T is here
        return index  # type: ignore[no-any-return]


def check_engine(config: IndexConfig) -> None:
    """Refuse an index that its engine does not run.

    Raises:
        ConfigError: engine=ray, with a kind of index or a setting that has no shards.
    """
    if config.engine is Engine.local:
        return
    if config.registered_name not in ON_RAY:
        raise ConfigError(
            f"index={config.registered_name} has no shards of ours; index.engine=ray goes with "
            f"index={' or '.join(ON_RAY)}"
        )
    for name in ALONE:
        if getattr(config, name, 0):
            raise ConfigError(f"index.{name} does not go with index.engine=ray; leave it out")


def in_this_process(config: ConfigT) -> ConfigT:
    """The same kind of index, for one shard."""
    return dataclasses.replace(config, engine=Engine.local)
