"""Which image of a group stays, and what the others are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.quality.pictures import LIMITS, cropped, encoded, photograph, resized, write
from twotower.quality.groups import Copy, components, find_copies
from twotower.quality.scan import has_picture, inspect_files


def look(paths: list[Path]) -> pa.Table:
    return inspect_files([str(path) for path in paths], LIMITS)


def kinds(found: pa.Table, splits: list[str]) -> dict[int, tuple[str, int]]:
    copies = find_copies(found, has_picture(found), splits, 0.9).copies
    assert copies == sorted(copies)
    return {copy.row: (copy.kind, copy.of) for copy in copies}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """0 a picture, 1 the same file, 2 the same smaller, 3 another, 4 a crop of it, 5 a third."""
    one, two, three = (photograph(seed) for seed in range(3))
    images = [one, one, resized(one), two, cropped(two), three]
    return [write(tmp_path / f"{n}.jpg", image) for n, image in enumerate(images)]


def test_largest_of_a_split_stays(files: list[Path]) -> None:
    assert kinds(look(files), ["train"] * 6) == {
        1: ("duplicate", 0),
        2: ("near_duplicate", 0),
        4: ("near_duplicate", 3),
    }
    small_first = [files[2], files[0], files[4], files[3]]
    assert kinds(look(small_first), ["train"] * 4) == {
        0: ("near_duplicate", 1),
        2: ("near_duplicate", 3),
    }


def test_what_is_held_out_stays_and_training_loses_it(files: list[Path]) -> None:
    splits = ["train", "val", "train", "train", "val", "train"]
    assert kinds(look(files), splits) == {
        0: ("leak", 1),
        2: ("near_leak", 1),
        3: ("near_leak", 4),
    }


def test_test_comes_before_validation_and_names_of_ones_own_before_train(
    files: list[Path],
) -> None:
    assert kinds(look(files[:2]), ["val", "test"]) == {0: ("leak", 1)}
    assert kinds(look(files[:2]), ["train", "unlisted"]) == {0: ("leak", 1)}
    assert kinds(look(files[:2]), ["unlisted", "val"]) == {0: ("leak", 1)}


def test_same_pixels_in_other_bytes_are_an_exact_duplicate(tmp_path: Path) -> None:
    image = photograph(1)
    one = write(tmp_path / "a.jpg", image)
    other = write(tmp_path / "b.jpg", image, comment="by me")
    found = look([one, other])
    (copy,) = find_copies(found, has_picture(found), ["train"] * 2, 0.9).copies
    assert (copy.kind, copy.similarity) == ("duplicate", 1.0)


def test_blank_and_faulty_pictures_are_no_near_duplicates(tmp_path: Path) -> None:
    white = [write(tmp_path / f"{n}.jpg", Image.new("RGB", (60 + n, 60), "white")) for n in (0, 1)]
    same = write(tmp_path / "2.jpg", Image.new("RGB", (60, 60), "white"))
    for number in (3, 4):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(photograph(1))[:500])
    found = look([*white, same, tmp_path / "3.jpg", tmp_path / "4.jpg"])
    assert kinds(found, ["train"] * 5) == {2: ("duplicate", 0)}


def test_only_usable_rows_take_part(files: list[Path]) -> None:
    found = look(files)
    usable = np.array([False, True, True, False, True, True])
    grouped = find_copies(found, usable, ["train"] * 6, 0.9)
    (copy,) = grouped.copies
    assert copy[:3] == Copy(2, 1, "near_duplicate", 0)[:3]
    assert grouped.group.tolist() == [0, 1, 1, 3, 4, 5]


def test_components_equal_those_of_a_walk() -> None:
    rng = np.random.default_rng(0)
    links = np.sort(rng.integers(0, 300, (160, 2)), 1)
    neighbours: dict[int, set[int]] = {n: {n} for n in range(300)}
    for a, b in links.tolist():
        neighbours[a].add(b)
        neighbours[b].add(a)
    expected = []
    for start in range(300):
        seen, open_ends = {start}, [start]
        while open_ends:
            new = neighbours[open_ends.pop()] - seen
            seen |= new
            open_ends += new
        expected.append(min(seen))
    assert components(links, 300).tolist() == expected
    chain = np.stack([np.arange(999), np.arange(1, 1000)], 1)
    assert not components(chain[::-1], 1000).any()
    assert components(np.empty((0, 2), np.int64), 3).tolist() == [0, 1, 2]
