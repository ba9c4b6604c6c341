"""A store of given vectors and columns, written file by file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.embedding.layout import Manifest, Shard
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.index import AnyFloatArray, unit_rows


def clustered_rows(count: int, dim: int = 12, seed: int = 0) -> AnyFloatArray:
    """Unit rows around 40 centres, every third of them close to the row before it."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((40, dim))
    rows = centres[rng.integers(40, size=count)] + 0.4 * rng.standard_normal((count, dim))
    rows[2::3] = rows[1::3][: len(rows[2::3])] + 0.05 * rng.standard_normal((len(rows[2::3]), dim))
    return unit_rows(rows)


def write_store(
    folder: Path,
    rows: AnyFloatArray,
    columns: dict[str, object],
    shard_rows: int = 1000,
    texts: AnyFloatArray | None = None,
) -> EmbeddingStore:
    """Rows (N, D) with ids 0, 1, 2, ..., and columns of N values beside the usual ones."""
    count = len(rows)
    table = pa.table(
        {
            "image_path": [f"/pictures/{row}.jpg" for row in range(count)],
            "caption": [f"number {row}" for row in range(count)],
            "row_id": np.arange(count),
            "source_row": np.arange(count),
            "image_id": [f"id{row}" for row in range(count)],
            **columns,
        }
    )
    plan = Manifest(source_rows=count, shard_rows=shard_rows)
    shards = []
    for number in range(plan.num_shards):
        here = plan.shard_range(number)
        part = slice(here.start, here.stop)
        names = {kind: plan.path(kind, number) for kind in ("img_emb", "text_emb", "metadata")}
        for name in names.values():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / names["img_emb"], rows[part])
        np.save(folder / names["text_emb"], (rows if texts is None else texts)[part])
        pq.write_table(table.slice(here.start, len(here)), folder / names["metadata"])
        shards.append(
            Shard(
                shard=number,
                first_source_row=here.start,
                source_rows=len(here),
                rows=len(here),
                errors=0,
                files={n: {"bytes": (folder / n).stat().st_size} for n in names.values()},
            )
        )
    Manifest(
        complete=True,
        rows=count,
        source_rows=count,
        dim=rows.shape[1],
        dtype="fp32",
        images=True,
        texts=texts is not None,
        shard_rows=shard_rows,
        source="written",
        shards=tuple(shards),
    ).write(folder)
    return EmbeddingStore.open(folder)
