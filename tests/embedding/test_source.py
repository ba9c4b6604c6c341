"""`path=` names a folder or a table of pictures, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import write_pictures
from twotower.config import DataConfig
from twotower.embedding.source import pairs_to_encode
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
@pytest.mark.parametrize("captions", [True, False])
def test_a_table_gives_its_paths_and_the_captions_that_it_has(
    tmp_path: Path, suffix: str, captions: bool
) -> None:
    made = write_pictures(tmp_path / "pictures", 3)
    columns = {"filepath": [f"pictures/{path.name}" for path, _ in made]}
    if captions:
        columns["caption"] = [text for _, text in made]
    path = tmp_path / f"list.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table(columns), path)
    else:
        lines = [list(columns), *zip(*columns.values(), strict=True)]
        path.write_text("\n".join((",", "\t")[suffix == "tsv"].join(line) for line in lines))
    pairs = pairs_to_encode(DataConfig(), str(path))
    assert [pairs.path(row) for row in range(3)] == [path for path, _ in made]
    expected = [[text] if captions else [] for _, text in made]
    assert [pairs.captions(row) for row in range(3)] == expected


def test_other_paths_get_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.docx").write_text("x")
    sentences = {
        "": "path= is empty; give a folder",
        str(tmp_path / "none"): "there is no such folder or file",
        str(tmp_path / "empty"): "has no pictures",
        str(tmp_path / "notes.docx"): "is neither a folder of pictures nor a .csv",
    }
    for path, sentence in sentences.items():
        with pytest.raises(ConfigError, match=sentence):
            pairs_to_encode(DataConfig(), path)
