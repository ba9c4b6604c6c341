from pathlib import Path

import pytest

from twotower.data.pairs import Pair, PairTable
from twotower.data.splits import draw_splits


def split_of(
    count: int, fraction: float, seed: int = 0, *, reverse: bool = False
) -> dict[str, str]:
    names = [f"{n}.jpg" for n in range(count)]
    pairs = [Pair(n, text, "", n) for n in (names[::-1] if reverse else names) for text in "xy"]
    drawn = draw_splits(PairTable.from_pairs(pairs, Path(), "p"), fraction, seed).table
    return dict(zip(drawn["image_id"].to_pylist(), drawn["split"].to_pylist(), strict=True))


@pytest.mark.parametrize(
    ("count", "fraction", "val"),
    [(100, 0.1, 10), (100, 0.0, 0), (3, 0.01, 1), (3, 0.99, 2), (1, 0.1, 0), (1000, 0.25, 250)],
)
def test_the_fraction_is_met_and_neither_split_is_empty(
    count: int, fraction: float, val: int
) -> None:
    assert list(split_of(count, fraction).values()).count("val") == val


def test_the_choice_depends_on_seed_and_image_and_not_on_the_order() -> None:
    assert split_of(200, 0.2) == split_of(200, 0.2, reverse=True)
    assert split_of(200, 0.2) != split_of(200, 0.2, seed=1)


def test_more_images_move_only_those_at_the_border() -> None:
    before, after = split_of(1000, 0.1), split_of(1010, 0.1)
    assert sum(before[name] != after[name] for name in before) <= 10
