"""The proposed split keeps groups together; the cleaned manifest opens as what stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.quality.pictures import photograph, write
from twotower.data.manifest import ManifestConfig, load_manifest
from twotower.data.pairs import Pair, PairTable
from twotower.quality.cleaned import PROPOSED, propose_split, write_cleaned

IDS = [f"image {number:03d}" for number in range(200)]
GROUP = np.arange(200) // 4 * 4


def test_groups_stay_together_and_the_fraction_is_met() -> None:
    split = propose_split(IDS, GROUP, 0.1, 1)
    assert (split == "val").sum() == 20
    for first in range(0, 200, 4):
        assert len(set(split[first : first + 4])) == 1
    assert (propose_split(IDS, GROUP, 0.0, 1) == "train").all()


def test_split_depends_on_the_seed_and_not_on_the_order() -> None:
    split = propose_split(IDS, GROUP, 0.1, 1)
    assert (split != propose_split(IDS, GROUP, 0.1, 2)).any()
    order = np.random.default_rng(0).permutation(200)
    shuffled = propose_split([IDS[row] for row in order], GROUP[order], 0.1, 1)
    np.testing.assert_array_equal(shuffled, split[order])


def test_a_group_too_large_for_validation_trains() -> None:
    group = np.array([0] * 5 + [5, 6, 7, 8, 9])
    for seed in range(5):
        split = propose_split(IDS[:10], group, 0.3, seed)
        assert (split[:5] == "train").all()
        assert (split == "val").sum() == 3


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_manifest_opens_as_what_stays(tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "pictures"
    captions = {"a.jpg": ["one, two", 'three "four"'], "b.jpg": ["lost"], "c.jpg": ["zwölf"]}
    for number, name in enumerate(captions):
        write(folder / name, photograph(number, 32, 32))
    rows = [
        Pair(n, c, "val" if n == "c.jpg" else "train", n) for n in captions for c in captions[n]
    ]
    pairs = PairTable.from_pairs(rows, folder, "pictures")
    path = tmp_path / "elsewhere" / f"cleaned{ending}"
    proposed = np.array(["val", "train", "train"], object)
    write_cleaned(path, pairs, np.array([True, False, True]), proposed)
    opened = load_manifest(ManifestConfig(manifest=str(path)))
    assert opened.table["image_id"].to_pylist() == ["a.jpg", "c.jpg"]
    assert [opened.path(row) for row in (0, 1)] == [folder / "a.jpg", folder / "c.jpg"]
    assert opened.table["captions"].to_pylist() == [captions["a.jpg"], captions["c.jpg"]]
    assert opened.table["split"].to_pylist() == ["train", "val"]
    other = load_manifest(ManifestConfig(manifest=str(path), split_column=PROPOSED))
    assert other.table["split"].to_pylist() == ["val", "train"]
