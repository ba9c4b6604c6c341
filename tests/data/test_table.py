import logging
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from twotower.data.pairs import SCHEMA, Pair, PairTable
from twotower.settings import ConfigError

ROOT = Path("root")


def table(pairs: list[Pair]) -> PairTable:
    return PairTable.from_pairs(pairs, ROOT, "some pairs")


def test_grouping_equals_a_dictionary_in_order_of_first_appearance() -> None:
    rng = random.Random(0)
    pairs, expected = [], {}
    for number in range(2000):
        image = f"{rng.randrange(300)}.jpg"
        caption = None if rng.random() < 0.2 else f"caption {number}"
        pairs.append(Pair(f"a/{image}", caption, "val" if image < "2" else "train", image))
        expected.setdefault(image, []).extend([caption] if caption else [])
    made = table(pairs)
    assert made.table["image_id"].to_pylist() == list(expected)
    assert made.table["captions"].to_pylist() == list(expected.values())
    assert [made.path(row) for row in range(len(made))] == [ROOT / "a" / i for i in expected]
    assert made.table.schema == SCHEMA
    texts, rows = made.all_captions()
    flat = [(c, row) for row, captions in enumerate(expected.values()) for c in captions]
    assert list(zip(texts, rows.tolist(), strict=True)) == flat


def test_rows_in_several_chunks_give_the_same_and_other_columns_keep_their_first_value() -> None:
    part = pa.table(
        {
            "filepath": ["b", "a", "b"],
            "caption": ["1", "2", "3"],
            "split": ["train"] * 3,
            "image_id": ["b", "a", "b"],
            "width": [640, 480, 7],
        }
    )
    made = PairTable.from_rows(pa.concat_tables([part, part]), ROOT, "chunks")
    assert made.table["captions"].to_pylist() == [["1", "3", "1", "3"], ["2", "2"]]
    assert made.table["width"].to_pylist() == [640, 480]


def test_an_image_in_two_splits_is_refused_by_name() -> None:
    pairs = [Pair("a", "x", "train", "a"), Pair("b", "y", "val", "b"), Pair("b", "z", "train", "b")]
    with pytest.raises(ConfigError, match="some pairs: image b is in the splits val and train"):
        table(pairs)


def test_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="^some pairs has no images$"):
        table([])


def test_a_split_keeps_the_order_and_a_wrong_one_lists_what_there_is() -> None:
    made = table([Pair(n, n, "val" if n in "bd" else "train", n) for n in "dabc"])
    assert made.split("val").table["filepath"].to_pylist() == ["d", "b"]
    assert len(made.split("")) == 4
    with pytest.raises(ConfigError, match="has no split 'test'; it has train, val"):
        made.split("test")


def test_with_captions_leaves_out_the_bare_images_and_says_how_many(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = table([Pair(n, n if n < "c" else None, "", n) for n in "abcd"])
    with caplog.at_level(logging.WARNING):
        assert made.with_captions().table["filepath"].to_pylist() == ["a", "b"]
    assert "left out 2 images without captions" in caplog.text
    assert made.head(2).with_captions().table.equals(made.head(2).table)
    with pytest.raises(ConfigError, match="has pictures but no captions"):
        made.split("").take(pa.array([2, 3]).to_numpy()).with_captions()


def test_rows_are_what_the_table_was_grouped_from() -> None:
    rng = random.Random(1)
    pairs = []
    for image in range(50):
        captions = [f"{image} {k}" for k in range(rng.randrange(4))] or [None]
        pairs += [Pair(f"{image}.jpg", caption, "val", str(image)) for caption in captions]
    made = table(pairs)
    labelled = PairTable(
        made.table.append_column("class", pa.array([str(i % 3) for i in range(50)])), ROOT, "x"
    )
    rows = labelled.take(np.arange(50)).rows()
    columns = (rows[name].to_pylist() for name in Pair._fields)
    assert [Pair(*values) for values in zip(*columns, strict=True)] == pairs
    again = PairTable.from_rows(rows, ROOT, "x")
    assert again.table.equals(labelled.table)
    bare = table([Pair("a", None, "", "a"), Pair("b", None, "", "b")])
    assert PairTable.from_rows(bare.rows(), ROOT, "x").table.equals(bare.table)
    assert labelled.table.slice(10, 5).num_rows == 5
    part = PairTable(labelled.table.slice(10, 5), ROOT, "x").rows()
    assert part["image_id"].unique().to_pylist() == [str(i) for i in range(10, 15)]


def test_classes_and_captions_that_there_are() -> None:
    made = table([Pair("a", None, "", "a"), Pair("b", None, "", "b"), Pair("c", None, "", "c")])
    assert made.classes() is None and not made.has_captions()
    labelled = PairTable(made.table.append_column("class", pa.array([1, None, 2])), ROOT, "x")
    assert labelled.classes() == ["1", None, "2"]
    assert table([Pair("a", None, "", "a"), Pair("b", "x", "", "b")]).has_captions()
