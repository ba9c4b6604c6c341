"""Relevance feedback: hits that a person calls good or bad move the query."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from twotower.checkpoint.atomic import replacing
from twotower.data.manifest import write_manifest
from twotower.retrieval.index import AnyFloatArray, FloatArray, unit_rows
from twotower.retrieval.search.query import Query, parse_query
from twotower.retrieval.search.query_vectors import query_vectors
from twotower.retrieval.search.searcher import Hit, Options, Searcher
from twotower.search_config import FeedbackConfig
from twotower.settings import ConfigError

HEADER = ("filepath", "caption")

Key = tuple[str, int]


def rocchio(
    query: AnyFloatArray, good: AnyFloatArray, bad: AnyFloatArray, config: FeedbackConfig
) -> FloatArray:
    """The query (D,) that follows from judged rows, good (G, D) and bad (B, D); of unit norm.

    a * query + b * mean(good) - c * mean(bad), of vectors of unit norm; without any of a kind its
    mean is left out (Rocchio, Relevance feedback in information retrieval, 1971).

    Raises:
        ConfigError: the parts cancel each other out.
    """
    total: npt.NDArray[np.float64] = config.query_weight * _unit(query[None])[0]
    if len(good):
        total = total + config.good_weight * _unit(good).mean(axis=0)
    if len(bad):
        total = total - config.bad_weight * _unit(bad).mean(axis=0)
    norm = np.linalg.norm(total)
    if norm <= 1e-6:
        raise ConfigError("the query and the judgements cancel each other out; mark fewer hits bad")
    return (total / norm).astype(np.float32)


def _unit(rows: AnyFloatArray) -> npt.NDArray[np.float64]:
    return unit_rows(rows).astype(np.float64)


class Feedback:
    """One query and what was said of its hits.

    Attributes:
        hits: the last answer, to whose ranks `mark` refers.
    """

    def __init__(
        self,
        searcher: Searcher,
        query: Query | str,
        options: Options,
        config: FeedbackConfig | None = None,
    ) -> None:
        self.searcher = searcher
        self.query = parse_query(query) if isinstance(query, str) else query
        self.options = options
        self.config = config or FeedbackConfig()
        self.hits: list[Hit] = []
        asked = query_vectors([self.query], searcher.encoder, options.templates)
        self._asked: FloatArray = asked[0]
        self._judged: dict[Key, tuple[Hit, bool]] = {}

    @property
    def good(self) -> list[Hit]:
        """The hits that were called good, in the order of the judgements."""
        return [hit for hit, good in self._judged.values() if good]

    @property
    def bad(self) -> list[Hit]:
        """The hits that were called bad."""
        return [hit for hit, good in self._judged.values() if not good]

    def vector(self) -> FloatArray:
        """The query (D,) as it is after the judgements; as it was asked without any.

        Raises:
            ConfigError: as `rocchio`.
        """
        if not self._judged:
            return self._asked
        good, bad = (self.searcher.vectors(hits) for hits in (self.good, self.bad))
        return rocchio(self._asked, good, bad, self.config)

    def search(self) -> list[Hit]:
        """The best rows of the query as it is now; they become `hits`.

        Raises:
            ConfigError: as `Searcher.search_vectors`.
        """
        (self.hits,) = self.searcher.search_vectors(self.vector()[None], self.options)
        return self.hits

    def mark(self, ranks: Iterable[int], *, good: bool) -> None:
        """Call hits of the last answer good or bad; the last word on a hit counts.

        Raises:
            ConfigError: there is no such rank; nothing is marked then.
        """
        wanted = list(ranks)
        for rank in wanted:
            if not 1 <= rank <= len(self.hits):
                raise ConfigError(
                    f"there is no result {rank}; the last answer has {len(self.hits)}"
                )
        for rank in wanted:
            hit = self.hits[rank - 1]
            key = (hit.collection, hit.row_id)
            self._judged.pop(key, None)
            self._judged[key] = (hit, good)

    def save(self, path: Path, caption: str = "") -> int:
        """Add the good hits to a manifest of training pairs; how many pairs it has then.

        Each is a picture with the query's words, or with `caption`. What was called bad goes to a
        file beside it, `pairs.bad.csv` of `pairs.csv`, for those who train with hard negatives.

        Raises:
            ConfigError: nothing was marked, the query is no text and there is no caption, or a file
                cannot be written.
        """
        words = caption or self.query.text
        if not words:
            raise ConfigError(
                f"the query {self.query.label} is not words alone, so it is no caption; give one"
            )
        if not self._judged:
            raise ConfigError("nothing is marked good or bad, so there is nothing to save")
        if path.suffix != ".csv":
            raise ConfigError(f"training pairs are saved as .csv, not as {path.name}")
        if self.bad:
            _add(path.with_suffix(".bad.csv"), [_pair(hit, words) for hit in self.bad])
        return _add(path, [_pair(hit, words) for hit in self.good])


def _pair(hit: Hit, words: str) -> tuple[str, str]:
    return os.path.abspath(hit.path), words


def _add(path: Path, pairs: Sequence[tuple[str, str]]) -> int:
    """Add pairs to a manifest, each once; how many it has then."""
    known: dict[tuple[str, ...], None] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = [tuple(row) for row in csv.reader(file)] or [()]
        if header != HEADER:
            raise ConfigError(f"{path} holds something else; give another name for the pairs")
        known = dict.fromkeys(rows)
    known.update(dict.fromkeys(pairs))
    if known:
        with replacing(path) as temporary:
            write_manifest(temporary, HEADER, known)
    return len(known)
