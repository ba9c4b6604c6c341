"""Search: an index module registers a function `config, dim -> VectorIndex` beside its config."""

from twotower.retrieval import auto, exact, faiss_index, milvus_index
from twotower.retrieval.index import INDEXES, SearchResult, VectorIndex

__all__ = [
    "INDEXES",
    "SearchResult",
    "VectorIndex",
    "auto",
    "exact",
    "faiss_index",
    "milvus_index",
]
