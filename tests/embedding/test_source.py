"""`path=` names a folder or a table of pictures, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.test_tars import write_tar
from tests.helpers import write_pictures
from twotower.config import DataConfig
from twotower.embedding.source import pairs_to_encode
from twotower.encode_config import EncodeConfig
from twotower.settings import ConfigError


def test_a_folder_gives_every_picture_in_order_and_no_caption(tmp_path: Path) -> None:
    folder = tmp_path / "it's, (mine) = {x} 写真"
    write_pictures(folder / "train", 2)
    write_pictures(folder / "val", 1)
    made = write_pictures(folder, 2)
    made[0][0].with_suffix(".txt").write_text("a caption that is not read")
    pairs = pairs_to_encode(DataConfig(), str(folder))
    names = ["0000_red.jpg", "0001_green.jpg", "train/0000_red.jpg", "train/0001_green.jpg"]
    assert pairs.table["filepath"].to_pylist() == [*names, "val/0000_red.jpg"]
    assert [pairs.captions(row) for row in range(5)] == [[]] * 5
    assert pairs.path(4).is_file()


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("captions", ["caption", "captions", ""])
def test_a_table_gives_its_paths_and_the_captions_that_it_has(
    tmp_path: Path, suffix: str, captions: str
) -> None:
    made = write_pictures(tmp_path / "pictures", 3)
    made[1] = (made[1][0], "")  # a picture without a caption is a picture
    columns = {"filepath": [f"pictures/{path.name}" for path, _ in made]}
    if captions:
        columns[captions] = [text for _, text in made]
    path = tmp_path / f"list.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table(columns), path)
    else:
        lines = [list(columns), *zip(*columns.values(), strict=True)]
        path.write_text("\n".join((",", "\t")[suffix == "tsv"].join(line) for line in lines))
    pairs = pairs_to_encode(DataConfig(), str(path))
    assert [pairs.path(row) for row in range(3)] == [path for path, _ in made]
    expected = [[text] if captions and text else [] for _, text in made]
    assert [pairs.captions(row) for row in range(3)] == expected


def test_a_list_gives_a_picture_a_line(tmp_path: Path) -> None:
    made = [path for path, _ in write_pictures(tmp_path / "pictures", 3)]
    text = f"\ufeffpictures/{made[2].name}\n\n{made[0]}\npictures/gone.jpg\r\n"
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    pairs = pairs_to_encode(DataConfig(), str(tmp_path / "list.txt"))
    gone = tmp_path / "pictures" / "gone.jpg"
    assert [pairs.path(row) for row in range(3)] == [made[2], made[0], gone]
    assert not pairs.has_captions()


@pytest.mark.parametrize("name", ["{0..1}.tar", "*.tar", "", "0.tar::1.tar"])
def test_tars_give_their_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for tar, (path, text) in enumerate(write_pictures(tmp_path / "pictures", 2)):
        members = [("a.jpg", path.read_bytes()), ("a.txt", text.encode()), ("a.alt", b"other")]
        write_tar(tmp_path / "tars" / f"{tar}.tar", members)
    place = "::".join(str(tmp_path / "tars" / one) for one in name.split("::"))
    encode = EncodeConfig(cache=str(tmp_path / "indexes"))
    pairs = pairs_to_encode(DataConfig(), place, encode)
    assert pairs.table["image_id"].to_pylist() == ["0/a", "1/a"]
    assert [len(pairs.captions(row)) for row in range(2)] == [1, 1]
    encode.caption_key, encode.image_key = "alt", "jpg"
    pairs = pairs_to_encode(DataConfig(), place, encode)
    assert pairs.captions(0) == ["other"]
    assert list(tmp_path.glob("indexes/*.parquet")) and not (tmp_path / "dataset").exists()
    encode.image_key = "png"
    with pytest.raises(ConfigError, match="has pictures under encode.image_key=png"):
        pairs_to_encode(DataConfig(), place, encode)
    with pytest.raises(ConfigError, match="encode.image_key is for tars in path=.*; with a data"):
        pairs_to_encode(DataConfig(), None, encode)


def test_other_paths_get_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.docx").write_text("x")
    (tmp_path / "notes.txt").write_text("not a path\nnor this\n")
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9.jpg")
    sentences = {
        "": "path= is empty; give a folder",
        str(tmp_path / "none"): "there is no such folder or file",
        str(tmp_path / "empty"): "has no pictures and no tars",
        str(tmp_path / "notes.docx"): "is not a folder, a .csv, .tsv or .parquet table, a .txt",
        str(tmp_path / "notes.txt"): "there is no file .*not a path, nor any of the first 2; each",
        str(tmp_path / "blank.txt"): "blank.txt has no images",
        str(tmp_path / "latin.txt"): "is not UTF-8 text",
        str(tmp_path / "none.tar"): "there is no tar .*none.tar; path must name tars or a folder",
        str(tmp_path / "*.tar"): "has no tars; path must name tars",
    }
    for path, sentence in sentences.items():
        with pytest.raises(ConfigError, match=sentence):
            pairs_to_encode(DataConfig(), path)
