import json
import logging
from pathlib import Path

import pytest

from twotower.data.flickr8k import Flickr8kConfig, load_flickr8k
from twotower.data.pairs import PairTable
from twotower.settings import ConfigError

NAMES = [f"{n}_abc.jpg" for n in range(10)]
CAPTIONS = {name: [f"{name[0]}, version {k} ." for k in range(5)] for name in NAMES}


def load(folder: Path, **settings: object) -> PairTable:
    return load_flickr8k(Flickr8kConfig(folder=str(folder), **settings))


def pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / name).touch()


def original(root: Path) -> None:
    pictures(root / "Flicker8k_Dataset")
    text = root / "Flickr8k_text"
    text.mkdir()
    lines = [f"{n}#{k}\t{c}" for n in NAMES for k, c in enumerate(CAPTIONS[n])]
    lines.append("2258277193_586949ec62.jpg.1#0\tsome people")  # stands in the published file
    (text / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")


def copy_with_header(root: Path, quote: str) -> None:
    pictures(root / "Images")
    lines = [f"{n},{quote}{c}{quote}" for n in NAMES for c in CAPTIONS[n]]
    (root / "captions.txt").write_text("image,caption\n" + "\n".join(lines) + "\n")


def captions(pairs: PairTable) -> dict[str, list[str]]:
    ids, texts = pairs.table["image_id"].to_pylist(), pairs.table["captions"].to_pylist()
    return dict(zip(ids, texts, strict=True))


@pytest.mark.parametrize("quote", ['"', ""])
def test_both_layouts_give_the_same_captions(quote: str, tmp_path: Path) -> None:
    original(tmp_path / "one")
    copy_with_header(tmp_path / "two", quote)
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert captions(one) == captions(two) == CAPTIONS
    assert one.table["split"] == two.table["split"]
    assert one.path(3) == tmp_path / "one/Flicker8k_Dataset" / NAMES[3]
    assert two.path(3) == tmp_path / "two/Images" / NAMES[3]


def test_the_published_lists_are_the_splits(tmp_path: Path) -> None:
    original(tmp_path)
    lists = {"trainImages": NAMES[:6], "devImages": NAMES[6:8], "testImages": NAMES[8:9]}
    for name, files in lists.items():
        (tmp_path / "Flickr8k_text" / f"Flickr_8k.{name}.txt").write_text("\n".join(files))
    pairs = load(tmp_path)
    splits = ["train"] * 6 + ["val"] * 2 + ["test", "unlisted"]
    assert pairs.table["split"].to_pylist() == splits


def test_karpathys_file_has_the_splits_too(tmp_path: Path) -> None:
    copy_with_header(tmp_path, "")
    splits = ["train"] * 6 + ["val"] * 2 + ["test"]
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": "a"}]}
        for name, split in zip(NAMES, splits, strict=False)
    ]
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    assert load(tmp_path).table["split"].to_pylist() == [*splits, "unlisted"]


def test_without_lists_whole_images_are_drawn(tmp_path: Path) -> None:
    copy_with_header(tmp_path, "")
    pairs = load(tmp_path, val_fraction=0.3)
    assert (len(pairs.split("train")), len(pairs.split("val"))) == (7, 3)


def test_captions_without_a_file_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original(tmp_path)
    (tmp_path / "Flicker8k_Dataset" / NAMES[0]).unlink()
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path)) == 9
    assert "left out 2 images that have no file" in caplog.text


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder)
    return str(caught.value)


def test_what_is_missing_is_named_with_where_to_get_it(tmp_path: Path) -> None:
    text = refusal(tmp_path / "none")
    assert "has no Images; download it from https://" in text and "none" in text
    pictures(tmp_path / "Images")
    assert "has no captions.txt (or Flickr8k.token.txt); download" in refusal(tmp_path)
    (tmp_path / "captions.txt").write_text(f"image,caption\n{NAMES[0]},a dog\n{NAMES[1]}\n")
    assert refusal(tmp_path).endswith(f"line 3: no picture and caption in '{NAMES[1]}'")
    (tmp_path / "captions.txt").write_text("image,caption\n")
    assert refusal(tmp_path) == f"{tmp_path}/captions.txt has no captions; download it again"
    (tmp_path / "captions.txt").write_text("image,caption\nother.jpg,a dog\n")
    assert refusal(tmp_path) == (
        f"{tmp_path}/Images has none of the 1 pictures of captions.txt, for example other.jpg; "
        "unpack them there"
    )
    (tmp_path / "captions.txt").write_bytes("image,caption\na.jpg,café\n".encode("latin-1"))
    assert refusal(tmp_path) == f"{tmp_path}/captions.txt is not UTF-8 text"
    (tmp_path / "captions.txt").write_text("")
    assert refusal(tmp_path).endswith("captions.txt is empty")
