"""A collection of Milvus: a cluster or server by its address, or milvus-lite in a file."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twotower.config import IndexConfig
from twotower.retrieval.index import FloatArray, IdArray
from twotower.settings import ConfigError, setting

ID, VECTOR = "row_id", "vector"
PAGE = 16_384  # ids read at a time, which is as many as Milvus returns
TOKEN = "MILVUS_TOKEN"  # environment variable: `user:password` or a key, which no file should hold

# A query's hits: `distance` and `row_id`.
Hits = Sequence[Mapping[str, Any]]


@dataclass(kw_only=True)
class MilvusConfig(IndexConfig):
    """A collection of Milvus; cosine is its inner product on rows of unit norm."""

    uri: str = setting(
        "",
        "http://host:19530 of a Milvus server, or a file name.db for milvus-lite; empty is a "
        "milvus-lite that ends with this process",
    )
    collection: str = setting("", "its name; by default one that says what rows it holds")
    index_type: str = setting("FLAT", "Milvus's index: FLAT (exact), HNSW, IVF_FLAT, DISKANN ...")
    build_params: list[str] = setting([], 'of index_type, as in ["M=32","efConstruction=200"]')
    search_params: list[str] = setting([], 'of a search, as in ["ef=128"] or ["nprobe=32"]')
    columns: list[str] = setting(
        [], "columns of the store's metadata that become fields, for filters of Milvus"
    )
    batch_rows: int = setting(2000, "rows a request, of at most 64 MB", ge=1)


def import_pymilvus(uri: str) -> Any:
    """Milvus's client.

    Raises:
        ConfigError: it is not installed, or milvus-lite is not, which the uri asks for.
    """
    try:
        import pymilvus

        if not is_server(uri):
            import milvus_lite  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"index=milvus needs {error.name}, which is not installed; run: "
            "pip install 'twotower[milvus]'"
        ) from error
    return pymilvus


def is_server(uri: str) -> bool:
    """Whether a uri is one of a server, not a file of milvus-lite."""
    return uri.startswith(("http://", "https://", "tcp://", "unix:"))


@functools.cache
def own_file() -> str:
    """A milvus-lite file of this process alone."""
    folder = tempfile.TemporaryDirectory(prefix="twotower-milvus-")
    own_file.folder = folder  # type: ignore[attr-defined]  # kept until the process ends
    return str(Path(folder.name) / "milvus.db")


@functools.cache
def client_of(uri: str) -> Any:
    """The one client of this process for a uri.

    Raises:
        ConfigError: nothing answers there.
    """
    milvus = import_pymilvus(uri)
    # Both log what they also raise, milvus-lite's server with a traceback a collection.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    if not is_server(uri):
        logging.getLogger("grpc._server").setLevel(logging.CRITICAL)
        logging.getLogger("milvus_lite").setLevel(logging.WARNING)
    what = f"nothing answers at index.uri={uri}"
    if not is_server(uri):
        what = f"index.uri={uri} cannot be opened; one process at a time has a file of milvus-lite"
    with _sentence(what):
        return milvus.MilvusClient(uri, token=os.environ.get(TOKEN, ""))


@contextmanager
def _sentence(what: str) -> Iterator[None]:
    """Turn what Milvus throws into one sentence."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # MilvusException, grpc's own, and what the lite server raises
        reason = str(getattr(error, "message", "") or error).strip().splitlines()
        raise ConfigError(f"{what}: {reason[0] if reason else type(error).__name__}") from error


class MilvusCollection:
    """One collection, which need not be there; what Milvus throws becomes a sentence."""

    def __init__(self, config: MilvusConfig, uri: str, name: str) -> None:
        self._config = config
        self.uri = uri
        self.name = name
        self._client = client_of(uri)

    def exists(self) -> bool:
        """Whether it is there."""
        with self._sentence("cannot be looked for"):
            return bool(self._client.has_collection(self.name))

    def create(self, dim: int, fields: Mapping[str, str], description: str) -> None:
        """Make it, with fields of the metadata by their Milvus types.

        Raises:
            ConfigError: one of its name is there, or Milvus does not make it.
        """
        if self.exists():
            raise ConfigError(
                f"the Milvus collection {self.name} is there already; choose another "
                "index.collection, or drop it"
            )
        kinds = import_pymilvus(self.uri).DataType
        schema = self._client.create_schema(auto_id=False, description=description)
        schema.add_field(ID, kinds.INT64, is_primary=True)
        schema.add_field(VECTOR, kinds.FLOAT_VECTOR, dim=dim)
        for name, kind in fields.items():
            longest = {"max_length": 65_535} if kind == "VARCHAR" else {}
            schema.add_field(name, kinds[kind], nullable=True, **longest)
        index = self._index_params()
        with self._sentence("cannot be made"):
            self._client.create_collection(
                self.name,
                schema=schema,
                index_params=index,
                consistency_level="Strong",
                properties={"twotower": description},  # milvus-lite forgets the other
            )

    def open(self) -> None:
        """Have Milvus load it, after making the index that a killed `create` may have left out."""
        index = self._index_params()
        with self._sentence("cannot be opened"):
            if not self._client.list_indexes(self.name, field_name=VECTOR):
                self._client.create_index(self.name, index)
            self._client.load_collection(self.name)

    def description(self) -> str:
        """What it was made with."""
        with self._sentence("cannot be described"):
            about = self._client.describe_collection(self.name)
        return str(about["description"] or about["properties"].get("twotower", ""))

    def count(self) -> int:
        """How many rows it has."""
        with self._sentence("cannot be counted"):
            found = self._client.query(
                self.name, filter="", output_fields=["count(*)"], consistency_level="Strong"
            )
        return int(found[0]["count(*)"])

    def ids(self) -> IdArray:
        """The ids of its rows, ascending."""
        parts = [np.empty(0, np.int64)]
        with self._sentence("cannot be read"):
            if not is_server(self.uri):  # it has no pages
                rows = self._client.query(self.name, filter=f"{ID} >= 0", output_fields=[ID])
                return np.sort(np.array([row[ID] for row in rows], np.int64))
            pages = self._client.query_iterator(
                self.name, batch_size=PAGE, output_fields=[ID], consistency_level="Strong"
            )
            while page := pages.next():
                parts.append(np.array([row[ID] for row in page], np.int64))
            pages.close()
        return np.sort(np.concatenate(parts))

    def insert(
        self, rows: FloatArray, ids: IdArray, fields: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Write rows (N, dim) under their ids, in place of those that are there."""
        for start in range(0, len(ids), self._config.batch_rows):
            part = slice(start, start + self._config.batch_rows)
            data = [
                {ID: int(number), VECTOR: row, **(fields[start + place] if fields else {})}
                for place, (number, row) in enumerate(zip(ids[part], rows[part], strict=True))
            ]
            with self._sentence("cannot take more rows"):
                self._client.upsert(self.name, data)

    def delete(self, ids: IdArray) -> None:
        """Delete rows by their ids."""
        for start in range(0, len(ids), self._config.batch_rows):
            part = ids[start : start + self._config.batch_rows].tolist()
            with self._sentence("cannot delete"):
                self._client.delete(self.name, ids=part)

    def search(self, queries: FloatArray, limit: int, where: str) -> Sequence[Hits]:
        """The best rows of each query (Q, dim) by inner product, where `where` holds."""
        params = {"metric_type": "IP", "params": _numbers(self._config, "search")}
        with self._sentence("cannot be searched"):
            found: Sequence[Hits] = self._client.search(
                self.name,
                data=list(queries),
                limit=limit,
                filter=where,
                anns_field=VECTOR,
                output_fields=[ID],
                search_params=params,
                consistency_level="Strong",
            )
        return found

    def flush(self) -> None:
        """See that what was written is kept."""
        with self._sentence("cannot be written"):
            self._client.flush(self.name)

    def drop(self) -> None:
        """Remove it."""
        with self._sentence("cannot be dropped"):
            self._client.drop_collection(self.name)

    def _index_params(self) -> Any:
        index = self._client.prepare_index_params()
        kind, params = self._config.index_type, _numbers(self._config, "build")
        index.add_index(VECTOR, index_type=kind, metric_type="IP", params=params)
        return index

    def _sentence(self, what: str) -> Any:
        return _sentence(f"the Milvus collection {self.name} at {self.uri} {what}")


def _numbers(config: MilvusConfig, which: str) -> dict[str, float]:
    """`build_params` or `search_params` as Milvus takes them.

    Raises:
        ConfigError: one is no `name=number`.
    """
    found = {}
    for text in getattr(config, f"{which}_params"):
        name, _, value = text.partition("=")
        try:
            found[name] = float(value) if "." in value else int(value)
        except ValueError as error:
            raise ConfigError(
                f"index.{which}_params takes name=number, as in nprobe=32, not {text}"
            ) from error
    return found
