"""Words or a picture in, the nearest pictures of a store out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from twotower.embedding.encoder import Encoder
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.index import NO_ID, AnyFloatArray, VectorIndex
from twotower.settings import ConfigError


@dataclass(frozen=True)
class Hit:
    """One row found: its rank from 1, its score (by default the cosine), picture and caption."""

    rank: int
    score: float
    row_id: int
    path: Path
    caption: str


class Searcher:
    """Searches a store through an index with the encoder that made the store's embeddings."""

    def __init__(self, encoder: Encoder, store: EmbeddingStore, index: VectorIndex) -> None:
        self.encoder = encoder
        self.store = store
        self.index = index

    def search_texts(self, texts: Sequence[str], k: int) -> list[list[Hit]]:
        """The best k rows of each text, best first.

        Raises:
            ConfigError: a text is blank or not valid Unicode, or k is beyond the rows of the store.
        """
        self.check_k(k)
        for text in texts:
            check_text(text)
        return self.search_vectors(self.encoder.encode_texts(texts), k)

    def search_images(
        self, images: Sequence[Path | str | bytes | Image.Image], k: int
    ) -> list[list[Hit]]:
        """The best k rows of each picture, best first.

        Raises:
            ConfigError: a picture cannot be read, or k is beyond the rows of the store.
        """
        self.check_k(k)
        return self.search_vectors(self.encoder.encode_images(images), k)

    def search_vectors(self, queries: AnyFloatArray, k: int) -> list[list[Hit]]:
        """The best k rows of each query vector (Q, D), best first.

        An approximate index may find fewer than k.

        Raises:
            ConfigError: k is beyond the rows of the store, or the vectors cannot be searched.
        """
        self.check_k(k)
        scores, ids = self.index.search(queries, k)
        found = []
        for row_scores, row_ids in zip(scores, ids, strict=True):
            known = row_ids != NO_ID
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


def check_text(text: str) -> None:
    """Refuse a query that says nothing.

    Raises:
        ConfigError: it is blank, or its bytes are no valid UTF-8.
    """
    if not text.strip():
        raise ConfigError('the query is empty; give words, for example query="a dog on the beach"')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("the query is not valid UTF-8 text") from error
