"""Search: an index module registers a function `config, dim -> VectorIndex` beside its config."""

from twotower.retrieval import exact, faiss_index
from twotower.retrieval.auto import choice as auto_index
from twotower.retrieval.index import INDEXES, SearchResult, VectorIndex
from twotower.retrieval.milvus import index as milvus_index

__all__ = [
    "INDEXES",
    "SearchResult",
    "VectorIndex",
    "auto_index",
    "exact",
    "faiss_index",
    "milvus_index",
]
