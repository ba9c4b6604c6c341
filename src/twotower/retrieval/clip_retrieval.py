"""A saved FAISS index as the back of clip-retrieval opens it (github.com/rom1504/clip-retrieval).

`load_clip_index` of its clip_back.py (2.45) reads `image.index` and `text.index` with
`faiss.read_index` and all files of `metadata/` in the order of their names; row i of these is what
the index calls i. Its search is `search_and_reconstruct`.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.checkpoint.atomic import link_or_copy, replacing
from twotower.embedding.layout import METADATA
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.faiss_index import FaissIndex
from twotower.retrieval.faiss_parts import without_ids
from twotower.retrieval.index import IdArray, Modality, VectorIndex
from twotower.retrieval.rerank import RerankedIndex

log = logging.getLogger(__name__)

NAMES = {Modality.images: "image.index", Modality.texts: "text.index"}
BATCH_ROWS = 65_536


def write_for_clip_retrieval(
    index: VectorIndex, store: EmbeddingStore, modality: Modality, data: Path, folder: Path
) -> list[str]:
    """Write `image.index` or `text.index`, and `metadata/`, into a folder.

    An index that keeps ids by itself (IVF) is linked and not copied, and the metadata get an empty
    row for every id that is free; the others are written without our ids, and the metadata hold the
    rows in the order of the index. Where that is the order of the store, its files are linked.

    Args:
        data: the file of the saved index.

    Returns:
        What was written; nothing, with a line in the log, if clip-retrieval cannot search it.

    Raises:
        ConfigError: the folder cannot be written.
    """
    if isinstance(index, RerankedIndex):
        index = index.inner
    if not isinstance(index, FaissIndex):
        return []
    bare, ids = without_ids(index.faiss_index)
    if not _can_reconstruct(bare):
        log.warning(
            "%s is not written for clip-retrieval, whose search needs vectors back from the codes, "
            "and FAISS cannot give them of %r",
            *(NAMES[modality], index.config.factory),
        )
        return []
    target = folder / NAMES[modality]
    with replacing(target) as temporary:
        if ids is None:
            link_or_copy(data, temporary)
        else:
            index.write_bare(temporary)
    _write_metadata(store, folder / "metadata", ids)
    return [NAMES[modality], "metadata/"]


def remove_for_clip_retrieval(modality: Modality, folder: Path) -> None:
    """Take away what was written of an earlier index, and the metadata where nothing needs them."""
    (folder / NAMES[modality]).unlink(missing_ok=True)
    if not any((folder / name).exists() for name in NAMES.values()):
        shutil.rmtree(folder / "metadata", ignore_errors=True)


def _can_reconstruct(bare: object) -> bool:
    try:
        bare.search_and_reconstruct(np.ones((1, bare.d), np.float32), 1)  # type: ignore[attr-defined]
    except RuntimeError:
        return False
    return True


def _write_metadata(store: EmbeddingStore, folder: Path, ids: IdArray | None) -> None:
    """The metadata by position: of the rows with these ids, or by id itself where there are none.

    Files that are not of this index are removed.
    """
    here = store.row_ids()
    wanted = np.arange(int(here.max()) + 1) if ids is None else ids
    written = set()
    if np.array_equal(wanted, here):
        for place, shard in enumerate(store.manifest.shards):
            name = f"metadata_{place:04d}.parquet"
            with replacing(folder / name) as temporary:
                if store.manifest.has_dead_rows:
                    pq.write_table(store.table(place), temporary)
                else:
                    link_or_copy(store.folder / shard.file(METADATA), temporary)
            written.add(name)
    else:
        name = "metadata_0000.parquet"
        with replacing(folder / name) as temporary:
            _write_in_order(store, wanted, temporary)
        written.add(name)
    for old in folder.glob("*.parquet"):
        if old.name not in written:
            old.unlink()


def _write_in_order(store: EmbeddingStore, wanted: IdArray, file: Path) -> None:
    """The metadata of these ids, some at a time; an empty row where the store has none."""
    schema = store.schema()
    known = np.isin(wanted, store.row_ids())
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(wanted), BATCH_ROWS):
            part = slice(start, start + BATCH_ROWS)
            found = iter(store.metadata(wanted[part][known[part]]))
            rows = [next(found) if there else {} for there in known[part]]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
