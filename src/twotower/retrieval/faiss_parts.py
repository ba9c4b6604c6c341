"""What is inside a FAISS index: its parts, what they learn, and how they are read from a file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twotower.retrieval.index import IdArray
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

ROWS_A_CENTROID = 39  # as many FAISS wants for each centroid of a k-means
INSIDE = ("index", "base_index", "refine_index", "quantizer", "storage")


def parts(index: Any) -> Iterator[Any]:
    """A FAISS index and those inside it, the outermost first."""
    import faiss

    index = faiss.downcast_index(index)
    yield index
    for name in INSIDE:
        inner = getattr(index, name, None)
        if inner is not None:
            yield from parts(inner)


def searched_with(index: Any) -> dict[str, float]:
    """The values of a search that an index has now, by the names that FAISS sets them by."""
    import faiss

    found: dict[str, float] = {}
    for part in parts(index):
        if hasattr(part, "nprobe"):
            found.setdefault("nprobe", part.nprobe)
        if hasattr(part, "hnsw"):
            found.setdefault("efSearch", part.hnsw.efSearch)
        if hasattr(part, "refine_index"):
            found.setdefault("k_factor_rf", part.k_factor)
    space = faiss.ParameterSpace()
    for name, value in list(found.items()):
        try:
            space.set_index_parameter(index, name, value)
        except RuntimeError:  # too deep inside for FAISS to reach
            del found[name]
    return found


def keeps_ids(index: Any) -> bool:
    """Whether it takes ids of our own; the others know none but 0, 1, 2, ..."""
    import faiss

    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return isinstance(index, faiss.IndexIDMap | faiss.IndexIVF)


def without_ids(index: Any) -> tuple[Any, IdArray | None]:
    """The index inside that numbers its rows 0, 1, 2, ..., and our ids in that order.

    Of an index that keeps our ids by itself the index, and None.
    """
    import faiss

    if not isinstance(index, faiss.IndexIDMap):
        return index, None
    return faiss.downcast_index(index.index), faiss.vector_to_array(index.id_map)


def stored_ids(index: Any) -> list[IdArray]:
    """The ids that an index holds which `keeps_ids`, in pieces of any order."""
    import faiss

    if isinstance(index, faiss.IndexIDMap):
        return [faiss.vector_to_array(index.id_map)]
    lists = next(part.invlists for part in parts(index) if hasattr(part, "invlists"))
    return [
        faiss.rev_swig_ptr(lists.get_ids(cell), lists.list_size(cell)).copy()
        for cell in range(lists.nlist)
        if lists.list_size(cell)
    ]


def prepare_training(index: Any, factory: str, count: int) -> None:
    """Say once if an index learns from few rows, and keep FAISS from saying it hundreds of times.

    An OPQ rotation is learnt for codes of as many bits as the index has; FAISS by itself takes 8.

    Args:
        count: rows that it will be trained on.
    """
    inside = list(parts(index))
    codes = [part.pq for part in inside if hasattr(part, "pq")]
    cells = [part for part in inside if hasattr(part, "nlist") and hasattr(part, "cp")]
    for clustering in [*(pq.cp for pq in codes), *(part.cp for part in cells)]:
        clustering.min_points_per_centroid = 1
    for part in inside:
        if hasattr(part, "chain"):
            _prepare_rotations(part, codes[0].nbits if codes else 8)
    centroids = max([pq.ksub for pq in codes] + [part.nlist for part in cells], default=0)
    if count < ROWS_A_CENTROID * centroids:
        log.warning(
            "index.factory %r learns %s centroids from %s rows; FAISS advises %s or more",
            *(factory, f"{centroids:,}", f"{count:,}", f"{ROWS_A_CENTROID * centroids:,}"),
        )


def _prepare_rotations(index: Any, bits: int) -> None:
    import faiss

    for place in range(index.chain.size()):
        transform = faiss.downcast_VectorTransform(index.chain.at(place))
        if isinstance(transform, faiss.OPQMatrix):
            codes: Any = faiss.ProductQuantizer(transform.d_out, transform.M, bits)
            codes.cp.min_points_per_centroid = 1
            codes.this.disown()  # the transform keeps no reference that Python knows of
            transform.pq = codes


def read_index(file: Path, *, memory_map: bool) -> Any:
    """A FAISS index from its file, copied into memory or mapped.

    Raises:
        RuntimeError: FAISS cannot read the file.
    """
    import faiss

    return faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC if memory_map else 0)


def check_mapping(index: Any) -> None:
    """Refuse index.memory_map=true where FAISS would read everything into memory all the same.

    Raises:
        ConfigError: the index holds FastScan codes.
    """
    for part in parts(index):
        if "FastScan" in type(part).__name__:
            raise ConfigError(
                "index.memory_map=true: FAISS cannot map FastScan codes, which it reads into "
                "memory; leave index.memory_map out, or `fs` in the factory string (PQ64x4fs -> "
                "PQ64x4)"
            )


def to_gpu(index: Any) -> Any:
    """A copy of an index on the first GPU.

    Raises:
        ConfigError: the kind of index does not run there.
    """
    import faiss

    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    except RuntimeError as error:
        raise ConfigError(
            f"index.gpu=true: {type(index).__name__} does not run on a GPU; FAISS has Flat, "
            "IVF,Flat, IVF,SQ and IVF,PQ there"
        ) from error


def check_gpu() -> None:
    """Refuse index.gpu=true where FAISS has no GPU.

    Raises:
        ConfigError: it is a build for processors only, or no CUDA device is there.
    """
    import faiss

    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        raise ConfigError(
            "index.gpu=true needs FAISS for GPUs and a CUDA device, and this FAISS sees none; "
            "run: pip uninstall faiss-cpu && pip install 'twotower[gpu]', or leave it out"
        )
