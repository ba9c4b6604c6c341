import itertools
from pathlib import Path

import numpy as np
import pytest

from twotower.data.images import decode_image
from twotower.data.synthetic import (
    COLOURS,
    POSITIONS,
    RADII,
    SHAPES,
    Scene,
    SyntheticConfig,
    draw,
    load_synthetic,
)
from twotower.settings import ConfigError


def config(folder: Path, **settings: int) -> SyntheticConfig:
    return SyntheticConfig(folder=str(folder), **settings)


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_same_numbers_make_the_same_bytes_and_others_their_own_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        load_synthetic(config(tmp_path / name, count=10))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    load_synthetic(config(tmp_path / "one", count=10, seed=1))
    assert len(list((tmp_path / "one").iterdir())) == 2


def test_what_is_there_is_read_again_and_not_made_again(tmp_path: Path) -> None:
    first = load_synthetic(config(tmp_path, count=10))
    first.path(0).write_bytes(b"mine")
    assert load_synthetic(config(tmp_path, count=10)).table.equals(first.table)
    assert first.path(0).read_bytes() == b"mine"


def test_counts_sizes_and_splits(tmp_path: Path) -> None:
    pairs = load_synthetic(config(tmp_path, count=40, size=20, captions_per_image=5))
    assert (len(pairs.split("train")), len(pairs.split("val"))) == (30, 10)
    assert all(len(set(pairs.captions(row))) == 5 for row in range(40))
    assert decode_image(pairs.path(7)).size == (20, 20)
    assert len({pairs.captions(row)[0] for row in range(40)}) == 40


def test_captions_say_what_is_on_the_picture(tmp_path: Path) -> None:
    pairs = load_synthetic(config(tmp_path, count=60, size=48))
    for row in range(len(pairs)):
        caption = pairs.captions(row)[0]
        colour = next(word for word in COLOURS if f" {word} " in caption)
        position = next(p for p in POSITIONS if caption.endswith(f"in the {p}"))
        pixels = np.asarray(decode_image(pairs.path(row)), dtype=float)
        ys, xs = np.nonzero(np.abs(pixels - COLOURS[colour]).sum(2) < 40)
        centre = ((xs.mean() + 0.5) / 48, (ys.mean() + 0.5) / 48)
        assert np.allclose(centre, POSITIONS[position], atol=0.06), caption
        assert any(shape in caption for shape in SHAPES)


def test_every_scene_can_be_drawn_within_the_picture() -> None:
    for words in itertools.product(RADII, COLOURS, SHAPES, POSITIONS):
        pixels = np.asarray(draw(Scene(*words), 8, seed="0"), dtype=int)
        assert np.ptp(pixels.reshape(-1, 3), axis=0).max() > 20, words


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made: "):
        load_synthetic(config(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError, match="data.captions_per_image must be at most 5, not 6"):
        config(tmp_path, captions_per_image=6)
