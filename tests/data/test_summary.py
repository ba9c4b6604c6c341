from pathlib import Path

from twotower.data.pairs import Pair, PairTable
from twotower.data.summary import summary


def test_counts_of_images_and_captions_by_split() -> None:
    pairs = [
        Pair(f"{n}", f"{k}", "val" if n % 3 else "train", f"{n}") for n in range(6) for k in "xy"
    ]
    table = PairTable.from_pairs([*pairs, Pair("z", None, "test", "z")], Path("there"), "mine")
    assert summary(table).splitlines() == [
        "mine: 7 images, 12 captions",
        "  train: 2 images, 4 captions",
        "  val: 4 images, 8 captions",
        "  test: 1 images, 0 captions",
        "  in there",
    ]
