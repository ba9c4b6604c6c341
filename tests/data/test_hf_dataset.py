import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from PIL import Image

from tests.data.pictures import png
from twotower.data.hf_dataset import HFDatasetConfig, load_hf_dataset
from twotower.data.images import decode_image
from twotower.data.pairs import PairTable
from twotower.settings import ConfigError

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]


def load(folder: Path, **settings: object) -> PairTable:
    return load_hf_dataset(HFDatasetConfig(folder=str(folder), **settings))


def refusal(folder: Path | str, **settings: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_hf_dataset(HFDatasetConfig(folder=str(folder), **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def colours(pairs: PairTable) -> list[object]:
    return [decode_image(pairs.path(row)).getpixel((1, 1)) for row in range(len(pairs))]


def made() -> datasets.Dataset:
    """Five pictures: from bytes with a name, from bytes alone, and from Pillow."""
    images: list[object] = [{"bytes": png(c), "path": f"{n}.png"} for n, c in enumerate(COLOURS)]
    images[1] = {"bytes": png(COLOURS[1]), "path": None}
    images[2] = Image.new("RGB", (4, 4), COLOURS[2])
    columns = {
        "image": images,
        "caption": [["a", " b "], ["c"], ["d"], ["e"], ["f"]],
        "label": [0, 1, 0, 1, -1],
        "score": [0.5, None, 2.0, 3.0, 4.0],
        "mask": [png(COLOURS[0])] * 5,
    }
    features = {
        "image": datasets.Image(),
        "caption": [datasets.Value("string")],
        "label": datasets.ClassLabel(names=["ape", "bee"]),
        "score": datasets.Value("float64"),
        "mask": datasets.Value("binary"),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def test_a_data_set_with_splits(tmp_path: Path) -> None:
    whole = made()
    splits = {"train": whole.select([3, 0, 1]), "validation": whole.select([2, 4])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d", num_shards={"train": 2})
    pairs = load(tmp_path / "d")
    assert colours(pairs) == [COLOURS[n] for n in (3, 0, 1, 2, 4)]
    assert pairs.table["captions"].to_pylist() == [["e"], ["a", "b"], ["c"], ["d"], ["f"]]
    assert pairs.table["split"].to_pylist() == ["train"] * 3 + ["val"] * 2
    assert pairs.classes() == ["bee", "ape", "bee", "ape", None]
    assert pairs.table["score"].to_pylist() == [3.0, 0.5, None, 2.0, 4.0]
    assert "mask" not in pairs.table.column_names
    assert pairs.path(1).name == "0.png" and len(set(pairs.table["image_id"].to_pylist())) == 5


def test_a_lone_data_set_is_split_and_its_classes_make_captions(tmp_path: Path) -> None:
    made().remove_columns("caption").save_to_disk(tmp_path / "d")
    pairs = load(tmp_path / "d", val_fraction=0.4)
    assert len(pairs.split("val")) == 2
    assert pairs.captions(0) == ["a photo of a ape."]
    assert len(load(tmp_path / "d", templates="simple7").captions(1)) == 7


def test_rows_that_are_one_image_and_pictures_that_are_files(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), COLOURS[0]).save(tmp_path / "red.png")
    columns = {
        "file": [str(tmp_path / "red.png"), str(tmp_path / "red.png"), None],
        "text": ["a", "b", "c"],
        "key": [7, 7, 8],
    }
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "d")
    chosen = {"image_column": "file", "caption_column": "text", "image_id_column": "key"}
    pairs = load(tmp_path / "d", **chosen)
    assert pairs.table["captions"].to_pylist() == [["a", "b"]]
    assert colours(pairs) == [COLOURS[0]]


def test_splits_whose_columns_differ(tmp_path: Path) -> None:
    whole = made()
    test = whole.select([1, 4])
    splits = {"train": whole.select([0, 3]), "test": test.remove_columns(["score", "caption"])}
    splits["test"] = splits["test"].add_column("score", ["low", "high"])
    splits["test"] = splits["test"].add_column("caption", ["one text", "another"])
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d")
    pairs = load(tmp_path / "d", val_fraction=0.5)
    assert pairs.table["captions"].to_pylist() == [["a", "b"], ["e"], ["one text"], ["another"]]
    assert pairs.table["score"].to_pylist() == ["0.5", "3.0", "low", "high"]
    assert pairs.table["split"].to_pylist()[2:] == ["test", "test"]
    assert sorted(pairs.table["split"].to_pylist()[:2]) == ["train", "val"]


def test_each_mistake_has_its_sentence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert refusal("") == "data.folder is not given; set it to a folder that save_to_disk wrote"
    assert "neither dataset_dict.json nor state.json" in refusal(tmp_path)
    folder = tmp_path / "d"
    made().save_to_disk(folder)
    assert "has no column picture; it has image, caption" in refusal(folder, image_column="picture")
    assert "the column of pictures holds double" in refusal(folder, image_column="score")
    assert "has no column text; it has image" in refusal(folder, caption_column="text")
    assert "holds double, not texts or lists of" in refusal(folder, caption_column="score")
    assert "data.image_id_column chooses" in refusal(folder, image_id_column="id")
    assert "score is empty in 1 rows" in refusal(folder, image_id_column="score")
    path = folder / "data-00000-of-00001.arrow"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "is not a whole Arrow file" in refusal(folder)
    table = pa.ipc.open_stream(whole).read_all()
    with pa.ipc.new_stream(str(path), table.schema, options=compressed()) as stream:
        stream.write_table(table)
    assert "is compressed; write it anew with save_to_disk" in refusal(folder)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_data_files": []}))
    assert refusal(folder).endswith("has no rows")
    elsewhere = [{"filename": "../../other.arrow"}]
    (folder / "state.json").write_text(json.dumps({**state, "_data_files": elsewhere}))
    assert "'../../other.arrow', which is no name beside it" in refusal(folder)
    (folder / "state.json").write_text("[]")
    assert "is not what save_to_disk writes" in refusal(folder)
    (folder / "state.json").write_text("{")
    assert "is not whole JSON" in refusal(folder)


def compressed() -> pa.ipc.IpcWriteOptions:
    return pa.ipc.IpcWriteOptions(compression="zstd")
