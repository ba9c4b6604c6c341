"""The rows do not depend on what can be read, and the fingerprint only on the source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from twotower.data.pairs import Pair, PairTable
from twotower.embedding.rows import RowGrid, fingerprint, has_captions
from twotower.encode_config import Rows

CAPTIONS = [["a", "b"], [], ["c"], ["d", "e", "f"], []]


def table(captions: list[list[str]] = CAPTIONS, root: str = "pictures") -> PairTable:
    pairs = [
        Pair(f"{row}.jpg", text, "train", str(row))
        for row, texts in enumerate(captions)
        for text in texts or [None]
    ]
    return PairTable.from_pairs(pairs, Path(root), "letters")


def test_a_row_an_image_has_the_first_caption() -> None:
    slots = RowGrid(table(), Rows.images).slots(range(1, 4))
    assert slots.source_rows.tolist() == slots.row_ids.tolist() == [1, 2, 3]
    assert slots.captions == ["", "c", "d"]


def test_a_row_a_caption_counts_through_the_source() -> None:
    grid = RowGrid(table(), Rows.pairs)
    slots = grid.slots(range(0, 5))
    assert slots.captions == ["a", "b", "", "c", "d", "e", "f", ""]
    assert slots.source_rows.tolist() == [0, 0, 1, 2, 3, 3, 3, 4]
    assert slots.row_ids.tolist() == list(range(8))
    assert grid.slots(range(3, 5)).row_ids.tolist() == [4, 5, 6, 7]


def test_metadata_keeps_the_columns_of_the_source() -> None:
    pairs = table()
    extra = pairs.table.append_column("caption", pa.array([f"own {n}" for n in range(5)]))
    grid = RowGrid(PairTable(extra, pairs.root, pairs.name), Rows.pairs)
    slots = grid.slots(range(2, 5))
    keep = np.array([False, True, True, False, True])
    found = grid.metadata(slots, keep).to_pylist()
    assert [entry["caption"] for entry in found] == ["d", "e", ""]
    assert [entry["source_caption"] for entry in found] == ["own 3", "own 3", "own 4"]
    assert found[0]["captions"] == ["d", "e", "f"]
    assert found[0]["image_path"] == str(Path("pictures/3.jpg").absolute())
    nothing = grid.metadata(slots, np.zeros(5, bool))
    assert nothing.num_rows == 0 and nothing.column_names == list(found[0])


def test_the_fingerprint_is_of_the_content() -> None:
    pairs = table()
    chunked = pa.concat_tables([pairs.table.slice(0, 2), pairs.table.slice(2)])
    same = PairTable(chunked.replace_schema_metadata({"made": "otherwise"}), pairs.root, "b")
    assert fingerprint(pairs) == fingerprint(same)
    changed = [*CAPTIONS[:3], ["d", "e", "g"], []]
    others = [table(changed), table(root="elsewhere"), table(CAPTIONS[:4])]
    marks = {fingerprint(other) for other in [pairs, *others]}
    assert len(marks) == 4


def test_captions_anywhere_count() -> None:
    assert has_captions(table())
    assert not has_captions(table([[], []]))
