"""Words or a picture in, the nearest pictures of a store out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twotower.embedding.encoder import Encoder
from twotower.embedding.pictures import Picture
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.index import NO_ID, AnyFloatArray, VectorIndex
from twotower.retrieval.query import Query, as_queries
from twotower.retrieval.query_vectors import query_vectors
from twotower.search_config import ALL_SCORES
from twotower.settings import ConfigError


@dataclass(frozen=True)
class Hit:
    """One row found: its rank from 1, its score (by default the cosine), picture and caption."""

    rank: int
    score: float
    row_id: int
    path: Path
    caption: str


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked of an answer, whatever the query.

    Attributes:
        k: results a query, at most.
        threshold: results with at least this score only.
        templates: prompts with `{}`, whose mean stands for a text; none takes the text as it is.
    """

    k: int = 25
    threshold: float = ALL_SCORES
    templates: tuple[str, ...] = ()


class Searcher:
    """Searches a store through an index with the encoder that made the store's embeddings."""

    def __init__(self, encoder: Encoder, store: EmbeddingStore, index: VectorIndex) -> None:
        self.encoder = encoder
        self.store = store
        self.index = index

    def search(self, queries: Sequence[Query | str], options: Options) -> list[list[Hit]]:
        """The best rows of each query, as typed or made, best first.

        Raises:
            ConfigError: a query cannot be read, or k is beyond the rows of the store.
        """
        self.check_k(options.k)
        asked = as_queries(queries)
        return self.search_vectors(query_vectors(asked, self.encoder, options.templates), options)

    def search_texts(self, texts: Sequence[str], k: int) -> list[list[Hit]]:
        """The best k rows of each text, taken as words whatever it looks like.

        Raises:
            ConfigError: a text is blank or not valid Unicode, or k is beyond the rows of the store.
        """
        return self.search([Query.of_text(text) for text in texts], Options(k=k))

    def search_images(self, images: Sequence[Picture], k: int) -> list[list[Hit]]:
        """The best k rows of each picture, best first.

        Raises:
            ConfigError: a picture cannot be read, or k is beyond the rows of the store.
        """
        return self.search([Query.of_image(image) for image in images], Options(k=k))

    def search_vectors(self, queries: AnyFloatArray, options: Options) -> list[list[Hit]]:
        """The best rows of each query vector (Q, D), best first.

        An approximate index may find fewer than k.

        Raises:
            ConfigError: k is beyond the rows of the store, or the vectors cannot be searched.
        """
        self.check_k(options.k)
        scores, ids = self.index.search(queries, options.k)
        found = []
        for row_scores, row_ids in zip(scores, ids, strict=True):
            known = (row_ids != NO_ID) & (row_scores >= options.threshold)
            rows = self.store.metadata(row_ids[known])
            hits = [
                Hit(rank, float(score), int(row_id), Path(row["image_path"]), row["caption"] or "")
                for rank, (score, row_id, row) in enumerate(
                    zip(row_scores[known], row_ids[known], rows, strict=True), start=1
                )
            ]
            found.append(hits)
        return found

    def check_k(self, k: int) -> None:
        """Refuse more results than there are rows.

        Raises:
            ConfigError: k is beyond the rows of the store.
        """
        if k > len(self.index):
            raise ConfigError(
                f"search.k is {k}, but the store {self.store.folder} has {len(self.index)} rows; "
                f"use search.k={len(self.index)} or less"
            )
