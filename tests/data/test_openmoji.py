import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from twotower.data import openmoji
from twotower.data.images import decode_image
from twotower.data.openmoji import (
    OpenMojiConfig,
    choose_val,
    code_points,
    concept,
    distinct,
    load_openmoji,
    prepare_openmoji,
)
from twotower.data.pairs import PairTable, prepare_pairs
from twotower.settings import ConfigError

BLANK_PNG = b"a picture"


def without_drawing(pictures: Sequence[Path], folder: Path) -> None:
    (folder / "images").mkdir()
    for path in pictures:
        (folder / "images" / f"{path.stem}.png").write_bytes(BLANK_PNG)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> PairTable:
    """The data set as it is, but for the pictures, whose drawing takes a quarter of a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openmoji, "_draw", without_drawing)
        return prepare_pairs(OpenMojiConfig(folder=str(tmp_path_factory.mktemp("data") / "om")))


def test_the_counts(whole: PairTable) -> None:
    assert len(whole) >= 1600
    assert len(whole.all_captions()[0]) >= 5000
    assert len(whole.split("val")) == 175
    assert len(whole.split("train")) == len(whole) - 175


def test_no_concept_and_no_caption_is_in_both_splits(whole: PairTable) -> None:
    train, val = whole.split("train"), whole.split("val")
    assert not set(train.table["concept"].to_pylist()) & set(val.table["concept"].to_pylist())
    texts = [{c.casefold() for c in split.all_captions()[0]} for split in (train, val)]
    assert not texts[0] & texts[1]


def test_every_caption_has_one_picture_and_every_picture_a_caption(whole: PairTable) -> None:
    captions, _ = whole.all_captions()
    assert max(Counter(c.casefold() for c in captions).values()) == 1
    assert all(whole.captions(row) for row in range(len(whole)))


def test_neither_skin_tones_nor_flags(whole: PairTable) -> None:
    points = {p for code in whole.table["image_id"].to_pylist() for p in code_points(code)}
    assert not points & {*range(0x1F3FB, 0x1F400), *range(0x1F1E6, 0x1F200), 0xE007F}


def test_licence_and_attribution_stand_beside_it(whole: PairTable) -> None:
    assert "Attribution-ShareAlike 4.0" in (whole.root / "LICENSE").read_text()
    about = (whole.root / "ATTRIBUTION.md").read_text()
    assert "OpenMoji" in about and "openmoji.org" in about and "CC BY-SA 4.0" in about


def test_the_pictures_are_what_the_rasteriser_draws(tmp_path: Path) -> None:
    import resvg_py

    pictures = [path for path in openmoji._pictures() if path.stem in ("1F436", "2B1B", "1F4A7")]
    openmoji.build(pictures, tmp_path)
    pairs = load_openmoji(OpenMojiConfig(folder=str(tmp_path)))
    assert pairs.table["image_id"].to_pylist() == ["1F436", "1F4A7", "2B1B"]
    for row, path in enumerate(pictures):
        png = resvg_py.svg_to_bytes(svg_path=str(path), width=256, height=256)
        made = np.asarray(decode_image(pairs.path(row)), dtype=int)
        assert made.shape == (256, 256, 3)
        assert np.abs(made - np.asarray(decode_image(png), dtype=int)).max() <= 2
        assert made[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("1F436", "1F436"),
        ("1F468-200D-1F692", "1F9D1-1F692"),
        ("1F469-200D-1F692", "1F9D1-1F692"),
        ("1F9D1-200D-1F692", "1F9D1-1F692"),
        ("1F469-200D-1F9B0", "1F9D1"),
        ("1F3C3-200D-2642-FE0F-200D-27A1-FE0F", "1F3C3"),
        ("2764-FE0F", "2764"),
        ("2640-FE0F", "2640"),
        ("27A1-FE0F", "27A1"),
        ("0023-FE0F-20E3", "23-20E3"),
    ],
)
def test_variants_are_one_concept(code: str, expected: str) -> None:
    assert concept(code) == expected


def test_val_takes_whole_concepts_up_to_the_count() -> None:
    people = [
        f"{who}-200D-{what:X}" for what in range(0x1F680, 0x1F6A0) for who in ("1F468", "1F469")
    ]
    things = [f"{what:X}" for what in range(0x1F400, 0x1F420)]
    val = choose_val([*people, *things], 31, seed=0)
    assert len(val) == 31
    rest = {concept(code) for code in {*people, *things} - val}
    assert not rest & {concept(code) for code in val}
    assert val != choose_val([*people, *things], 31, seed=1)


def test_equal_drawings_are_one_image(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abcd"]
    for path, content in zip(paths, "xyxz", strict=True):
        path.write_text(content)
    a, b, c, d = paths
    assert distinct(paths) == {a: [a, c], b: [b], d: [d]}


def test_a_second_prepare_changes_nothing_and_says_so(
    whole: PairTable, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openmoji, "build", None)
    before = (whole.root / "manifest.csv").stat()
    with caplog.at_level(logging.INFO):
        prepare_openmoji(OpenMojiConfig(folder=str(whole.root)))
    assert "is there and is used as it is" in caplog.text
    assert (whole.root / "manifest.csv").stat() == before


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(pictures: Sequence[Path], folder: Path) -> None:
        without_drawing(pictures[:10], folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(openmoji, "_draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare_openmoji(OpenMojiConfig(folder=str(tmp_path / "openmoji")))
    assert list(tmp_path.iterdir()) == []


def test_each_mistake_has_its_sentence(tmp_path: Path) -> None:
    config = OpenMojiConfig(folder=str(tmp_path))
    with pytest.raises(ConfigError, match="run `twotower prepare data=openmoji` first"):
        load_openmoji(config)
    (tmp_path / "mine").touch()
    with pytest.raises(ConfigError, match="is no OpenMoji data set; remove it or choose another"):
        prepare_openmoji(config)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
