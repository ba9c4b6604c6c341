"""From queries to vectors: each text, picture and vector once, then the weighted sums."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.data.templates import PLACE
from twotower.embedding.encoder import Encoder
from twotower.retrieval.index import AnyFloatArray, FloatArray, unit_rows
from twotower.retrieval.search.query import Query, Term, TermKind, load_vectors
from twotower.settings import ConfigError

CANCELLED = 1e-6  # a sum as small as this beside its terms is rounding


def query_vectors(
    queries: Sequence[Query], encoder: Encoder, templates: Sequence[str] = ()
) -> FloatArray:
    """Queries -> (Q, D) float32.

    The vector of a formula is the sum of weight * unit vector over its terms, of unit norm again; a
    vector that is the whole query is taken as it is. With templates a text's vector is the mean of
    those of its prompts, of unit norm again (Radford et al. 2021, 3.1.4).

    Raises:
        ConfigError: a picture or a vector cannot be read, a vector has another dimension than the
            encoder's, or the terms of a formula cancel each other out.
    """
    texts = _distinct(queries, TermKind.text)
    images = _distinct(queries, TermKind.image)
    words = [str(text) for text in texts]
    of_text: dict[Hashable, AnyFloatArray]
    of_text = dict(zip(words, text_vectors(words, encoder, templates), strict=True))
    of_image: dict[Hashable, AnyFloatArray]
    of_image = dict(zip(images, encoder.encode_images(list(images.values())), strict=True))

    def vector(term: Term) -> AnyFloatArray:
        if term.kind is TermKind.vector:
            return _vector(term.content, encoder.dim)
        known = of_text if term.kind is TermKind.text else of_image
        return known[_key(term.content)]

    rows = [_sum(query, [vector(term) for term in query.terms]) for query in queries]
    return np.stack(rows) if rows else np.empty((0, encoder.dim), np.float32)


def text_vectors(
    texts: Sequence[str], encoder: Encoder, templates: Sequence[str] = ()
) -> FloatArray:
    """Texts -> (N, D) float32 of unit norm; with templates the mean over each text's prompts."""
    if not templates:
        return encoder.encode_texts(texts)
    prompts = [template.replace(PLACE, text) for text in texts for template in templates]
    rows = encoder.encode_texts(prompts).reshape(len(texts), len(templates), -1)
    return unit_rows(rows.astype(np.float64).mean(axis=1))


def _sum(query: Query, vectors: Sequence[AnyFloatArray]) -> FloatArray:
    """The vector (D,) float32 of one query."""
    if len(vectors) == 1 and query.terms[0].weight == 1:
        return vectors[0].astype(np.float32)
    weights = np.array([term.weight for term in query.terms])
    unit: npt.NDArray[np.float64] = np.stack(
        [vector.astype(np.float64) / max(_norm(vector), 1e-300) for vector in vectors]
    )
    total = weights @ unit
    if _norm(total) <= CANCELLED * np.abs(weights).sum():
        raise ConfigError(f"the terms of the query {query.label} cancel each other out")
    return (total / _norm(total)).astype(np.float32)


def _norm(vector: AnyFloatArray) -> float:
    return float(np.linalg.norm(vector.astype(np.float64)))


def _vector(content: str | Path | AnyFloatArray, dim: int) -> AnyFloatArray:
    """A vector (D,), given or in a file."""
    name = str(content) if isinstance(content, str | Path) else "the vector of the query"
    vector = load_vectors(Path(content)) if isinstance(content, str | Path) else content
    vector = vector[0] if vector.ndim == 2 and len(vector) == 1 else vector
    if vector.ndim == 2:
        raise ConfigError(
            f"{name} holds {len(vector)} vectors, and a term is one; query_file={name} takes each "
            "as a query"
        )
    if vector.shape != (dim,):
        raise ConfigError(f"{name} has dimension {vector.shape[0]}, but the model's is {dim}")
    if not np.isfinite(vector).all() or not vector.any():
        raise ConfigError(f"{name} is zero, or holds NaN or infinity")
    return vector


def _distinct(queries: Sequence[Query], kind: TermKind) -> dict[Hashable, Any]:
    """What of a kind is to be encoded, each once, in the order of the first use."""
    return {
        _key(term.content): term.content
        for query in queries
        for term in query.terms
        if term.kind is kind
    }


def _key(content: Any) -> Hashable:
    """What is the same by its value: paths and words; pictures in memory are by identity."""
    return content if isinstance(content, str | bytes | Path) else id(content)
