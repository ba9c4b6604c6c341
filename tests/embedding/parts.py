"""What the tests of this package share, importable by the ranks that they start."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from tests.helpers import tiny_bundle, write_pictures
from twotower.config import DistributedConfig
from twotower.data.pairs import Pair, PairTable
from twotower.embedding import encoder
from twotower.embedding.store import EmbeddingStore
from twotower.embedding.work import ExportJob, ExportResult, run_export
from twotower.models.dual_encoder import ModelBundle

COUNT, SHARD_ROWS, BATCH = 101, 16, 5
# A truncated file, an empty one, text, a missing one; the first and the last row, a batch of five.
UNREADABLE = (0, 7, 8, 9, 15, 16, 32, 33, 34, 35, 36, 100)

ONE_THREAD = DistributedConfig(num_threads=1)


def bundle_of(checkpoint: Path) -> ModelBundle:
    """The bundle of a checkpoint whose text is a seed."""
    return tiny_bundle(seed=int(checkpoint.read_text()))


def spoil(path: Path, way: int) -> None:
    """Make a picture unreadable in one of four ways."""
    whole = path.read_bytes()
    if way == 3:
        path.unlink()
    else:
        path.write_bytes((whole[: len(whole) // 2], b"", b"not a picture")[way])


def make_source(folder: Path) -> PairTable:
    """101 pictures, twelve of them unreadable, with zero to three captions each and a url."""
    pairs = []
    for row, (path, caption) in enumerate(write_pictures(folder, COUNT)):
        captions = [f"{caption} told {time} times" for time in range(row % 4)]
        split = "train" if row % 3 else "val"
        for text in captions or [None]:
            pairs.append(Pair(path.name, text, split, f"id{row}"))
        if row in UNREADABLE:
            spoil(path, row % 4)
    table = PairTable.from_pairs(pairs, folder, "squares")
    urls = pa.array([f"https://example.org/{row}" for row in range(COUNT)])
    return PairTable(table.table.append_column("url", urls), folder, "squares")


def run_jobs(jobs: list[ExportJob]) -> list[ExportResult | None]:
    """What a rank does, with the loader of `bundle_of`."""
    encoder.load_bundle = bundle_of
    return [run_export(job) for job in jobs]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def plain(store: EmbeddingStore, *without: str) -> list[dict[str, object]]:
    """Every row of a store: its vectors and its metadata."""
    ids = store.row_ids()
    rows = store.metadata(ids)
    for row, image, text in zip(rows, store.image_rows(ids), store.text_rows(ids), strict=True):
        row.update(image=image.tobytes(), text=text.tobytes())
        for name in without:
            del row[name]
    return rows
