"""Where an index runs: in this process, or in shards on the nodes of a Ray cluster."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

from twotower.settings import Choice, setting


class Engine(enum.Enum):
    """Where an index runs."""

    local = "local"
    ray = "ray"


@dataclass(kw_only=True)
class EngineConfig(Choice):
    """Shards of an index as actors of a Ray cluster (docs/scale.md)."""

    # Where and how an index is run; they change no answer and no file.
    not_of_the_answer: ClassVar[tuple[str, ...]] = (
        "replicas",
        "address",
        "shard_cpus",
        "patience",
        "spool",
    )

    engine: Engine = setting(
        Engine.local, "local: in this process; ray: in shards on the nodes of a Ray cluster"
    )
    shards: int = setting(2, "parts of the index under engine=ray, one actor or more each", ge=1)
    replicas: int = setting(1, "copies of each shard, every one on another node", ge=1)
    address: str = setting(
        "auto",
        "of a Ray cluster; auto: the one of this machine; local: one made for this process",
    )
    shard_cpus: float = setting(1.0, "cores that Ray sets aside for an actor", ge=0)
    patience: float = setting(
        60.0, "seconds that a lost shard is waited for before a search is refused", gt=0
    )
    spool: str = setting(
        "",
        "folder that all nodes see, for what a shard is loaded from again; empty is one of this "
        "machine's temporary folders",
    )
