from __future__ import annotations

import numpy as np
import pytest

from twotower.config import Metric
from twotower.retrieval.auto.card import Card, Tried, advice, markdown
from twotower.retrieval.auto.measure import Interval, smallest, wilson
from twotower.retrieval.auto.proposals import FEW_ROWS, num_cells, of_factory, propose


@pytest.mark.parametrize("largest", [1, 7, 64, 1000])
def test_finds_the_smallest_that_reaches(largest: int) -> None:
    for wanted in range(1, largest + 1, max(1, largest // 50)):
        found = smallest(lambda value, wanted=wanted: value >= wanted, largest)  # type: ignore[misc]
        assert found is not None
        assert wanted <= found <= wanted + max(1, wanted // 8) - (wanted < 8)
    assert smallest(lambda value: False, largest) is None


def test_the_interval_is_wilsons() -> None:
    # 81 of 263, from Newcombe 1998, table I: 0.2553 to 0.3662.
    found = wilson(np.repeat([1.0, 0.0], [81, 263 - 81]))
    assert found == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)
    assert wilson(np.ones(100)).low < 1 == wilson(np.ones(100)).high


def test_few_rows_get_the_exact_index_only() -> None:
    (only,) = propose(FEW_ROWS - 1, 512, 1e9, Metric.cosine)
    assert only.name == "exact"


def test_what_is_proposed_follows_rows_and_memory() -> None:
    def names(rows: int, gigabytes: float) -> list[str]:
        return [one.name for one in propose(rows, 512, gigabytes * 1e9, Metric.cosine)]

    assert names(1_000_000, 16) == [
        *("exact", "SQ8", "HNSW32", "IVF16384_HNSW32,Flat", "IVF16384_HNSW32,SQ8"),
        *("OPQ64_448,IVF16384_HNSW32,PQ64x8", "IVF16384_HNSW32,RaBitQ"),
    ]
    assert names(50_000, 16)[3] == "IVF1024_HNSW32,Flat"
    # HNSW and PQ shrink with the memory.
    assert names(1_000_000, 2.2)[2] == "HNSW19"
    assert "OPQ24_168,IVF65536_HNSW32,PQ24x8" in names(100_000_000, 3.5)
    assert [num_cells(rows) for rows in (30_000, 999_999, 3e6, 1e8, 1e9)] == [  # type: ignore[arg-type]
        *(512, 4096, 16384, 65536, 131072),
    ]


@pytest.mark.parametrize(
    ("factory", "bytes_per_vector", "knobs"),
    [
        ("SQ8", 520, ("rerank",)),
        ("HNSW32", 2312, ("ef_search",)),
        ("HNSW16_SQ8", 648, ("rerank", "ef_search")),
        ("Flat", 2056, ()),
        ("IVF100,Flat", 2056 + 2.048, ("nprobe",)),
        ("OPQ32_256,IVF100,PQ32x4,RFlat", 2072 + 2.048, ("k_factor", "nprobe")),
        ("IVF100,RaBitQ", 80 + 2.048, ("rerank", "nprobe")),
    ],
)
def test_what_a_factory_string_takes_and_how_it_is_tuned(
    factory: str, bytes_per_vector: float, knobs: tuple[str, ...]
) -> None:
    found = of_factory(factory, 100_000, 512, Metric.cosine)
    assert found.bytes_per_vector == pytest.approx(bytes_per_vector)
    assert found.knobs == knobs


def test_the_card_warns_where_pictures_hide_that_texts_miss() -> None:
    entry = Tried("HNSW32", {}, 1.0, 2312.0, tuned={"ef_search": 4096}, reaches=False)
    entry.recalls = {"text": Interval(0.7, 0.66, 0.74), "image": Interval(0.99, 0.98, 1.0)}
    card = Card("HNSW32", "it is", [entry], "captions", {"rows": 9}, 0.95, 10, "text")
    assert card.warning().startswith("text queries find 0.700 of the best 10, below the target")
    card.advice.extend(advice(card))
    text = markdown(card)
    assert "0.700 (0.660 to 0.740) | 0.990 (0.980 to 1.000)" in text
    assert "though picture queries find 0.990" in text
    entry.reaches = True  # as a wide interval may say
    assert card.warning()
    entry.recalls["image"] = Interval(0.8, 0.7, 0.9)
    assert card.warning() == ""
