import csv
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from twotower.data.manifest import ManifestConfig, load_manifest, write_manifest
from twotower.data.pairs import PairTable
from twotower.settings import ConfigError

ROWS = [
    ("a.jpg", "a dog, running", "train"),
    ("b.jpg", 'a "quoted" cat', "val"),
    ("a.jpg", "ein Hund läuft", "train"),
    ("c.jpg", "two\nlines", "train"),
]
HEADER = ("filepath", "caption", "split")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def load(path: Path, **settings: object) -> PairTable:
    return load_manifest(ManifestConfig(manifest=str(path), **settings))


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    touch(path.parent, "a.jpg", "b.jpg")
    return path


def refusal(path: Path, **settings: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(folder: Path, suffix: str) -> Path:
    path = folder / f"pairs{suffix}"
    touch(folder, "a.jpg", "b.jpg", "c.jpg")
    if suffix == ".csv":
        write_manifest(path, HEADER, ROWS)
        return path
    table = pa.table(dict(zip(HEADER, zip(*ROWS, strict=True), strict=True)))
    if suffix == ".parquet":
        pq.write_table(table, path)
        return path
    options = pa_csv.WriteOptions(delimiter="\t" if ".tsv" in suffix else ",")
    with pa.output_stream(path) as sink:  # compresses .gz
        pa_csv.write_csv(table, sink, options)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".csv.gz", ".tsv.gz"])
def test_every_format_gives_the_same_images(suffix: str, tmp_path: Path) -> None:
    pairs = load(written(tmp_path, suffix))
    assert pairs.table.select(["filepath", "captions", "split", "image_id"]).to_pylist() == [
        {"filepath": f, "captions": c, "split": s, "image_id": f}
        for f, c, s in [
            ("a.jpg", ["a dog, running", "ein Hund läuft"], "train"),
            ("b.jpg", ['a "quoted" cat'], "val"),
            ("c.jpg", ["two\nlines"], "train"),
        ]
    ]
    assert pairs.path(0) == tmp_path / "a.jpg"


def test_what_pandas_and_spreadsheets_write(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf,filepath,caption,split\r\n0,a.jpg, a dog ,train\r\n1,b.jpg,a cat,val\r\n"
    pairs = load(write(tmp_path / "m.csv", text))
    assert pairs.table["captions"].to_pylist() == [["a dog"], ["a cat"]]
    assert pairs.table.column_names == ["filepath", "captions", "split", "image_id"]


def test_other_columns_stay_and_columns_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    touch(tmp_path, "a.jpg", "b.jpg")
    pq.write_table(
        pa.table(
            {
                "file": ["a.jpg", "a.jpg", "b.jpg"],
                "text": pa.array(["x", "y", "z"]).dictionary_encode(),
                "id": [7, 7, 9],
                "set": ["train", "train", "val"],
                "url": ["u1", "u2", "u3"],
                "caption": ["not", "this", "one"],
            }
        ),
        path,
    )
    columns = {
        "filepath_column": "file",
        "caption_column": "text",
        "image_id_column": "id",
        "split_column": "set",
    }
    assert load(path, **columns).table.to_pylist() == [
        {"filepath": "a.jpg", "captions": ["x", "y"], "split": "train", "image_id": "7"}
        | {"url": "u1"},
        {"filepath": "b.jpg", "captions": ["z"], "split": "val", "image_id": "9", "url": "u3"},
    ]


def test_one_image_may_have_several_files_by_its_id(tmp_path: Path) -> None:
    text = "filepath,caption,image_id\na.jpg,x,1\nb.jpg,y,1\n"
    pairs = load(write(tmp_path / "m.csv", text))
    assert pairs.table["captions"].to_pylist() == [["x", "y"]]


def test_without_a_split_column_whole_images_are_drawn(tmp_path: Path) -> None:
    names = [f"{n}.jpg" for n in range(40)]
    touch(tmp_path, *names)
    path = tmp_path / "m.csv"
    write_manifest(
        path, ("filepath", "caption"), [(n, f"{n} {k}") for k in range(5) for n in names]
    )
    pairs = load(path, val_fraction=0.25)
    assert len(pairs.split("val")) == 10 and len(pairs.split("train")) == 30
    assert {len(c) for c in pairs.table["captions"].to_pylist()} == {5}
    again = load(path, val_fraction=0.25, split_seed=1)
    assert again.table["split"] != pairs.table["split"]


def test_the_split_column_can_be_ignored(tmp_path: Path) -> None:
    path = written(tmp_path, ".csv")
    assert set(load(path, split_column="", val_fraction=0.0).table["split"].to_pylist()) == {
        "train"
    }


def test_rows_without_a_caption_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "filepath,caption,split\na.jpg,,train\na.jpg,x,train\nb.jpg, ,val\nb.jpg,NaN,val\n"
    with caplog.at_level(logging.WARNING):
        pairs = load(write(tmp_path / "m.csv", text))
    assert pairs.table["captions"].to_pylist() == [["x"]]
    assert "left out 3 rows without a caption, and so 1 images" in caplog.text
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"filepath": ["a.jpg", "b.jpg"], "caption": [None, "null"]}), path)
    assert load(path).table["captions"].to_pylist() == [["null"]]


def test_pictures_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "filepath\na.jpg\nb.jpg\n")
    assert load(path, caption_column="").table["captions"].to_pylist() == [[], []]


def test_absolute_paths_and_another_root(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    write(pictures / "m.csv", "")
    path = tmp_path / "m.csv"
    path.write_text(f"filepath,caption\na.jpg,x\n{pictures / 'b.jpg'},y\n")
    pairs = load(path, root=str(pictures))
    assert [pairs.path(row) for row in (0, 1)] == [pictures / "a.jpg", pictures / "b.jpg"]


def test_a_caption_of_ten_thousand_characters_stays_whole(tmp_path: Path) -> None:
    caption = "long " * 2000
    path = write(tmp_path / "m.csv", f"filepath,caption\na.jpg,{caption}\n")
    assert load(path).captions(0) == [caption.strip()]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty; its first line must name the columns"),
        ("filepath,caption\n", "has no rows"),
        (
            "filepath,text\na.jpg,x\n",
            "has no column caption; it has filepath, text (data.caption_column chooses another)",
        ),
        ("image,caption\na.jpg,x\n", "has no column filepath; it has image, caption"),
        ("filepath,caption,caption\na.jpg,x,y\n", "has the column caption more than once"),
        ("filepath,caption\na.jpg,x\nb.jpg,y,z\n", "Row #3: Expected 2 columns, got 3: b.jpg,y,z"),
        (b"filepath,caption\na.jpg,x\nb.jpg,\xff\n", "Row #3: CSV conversion error"),
        ("filepath,caption\na.jpg,\nb.jpg, \n", "no captions in 2 rows"),
        ("filepath,caption\na.jpg,x\n,y\n", "column filepath is empty in 1 rows, first in row 2"),
        ("filepath,caption,split\na.jpg,x,\n", "column split is empty in 1 rows, first in row 1"),
        ("filepath,caption,split\na.jpg,x,train\na.jpg,y,val\n", "in the splits train and val"),
        ("filepath,caption\nno.jpg,x\n", "data.root must be the folder that its paths start from"),
    ],
)
def test_each_mistake_has_its_sentence(text: str | bytes, words: str, tmp_path: Path) -> None:
    assert words in refusal(write(tmp_path / "m.csv", text))


def test_mistakes_of_the_settings(tmp_path: Path) -> None:
    assert refusal(Path("")).startswith("there is no manifest at .")
    with pytest.raises(ConfigError, match="data.manifest is not given; set it to a .csv"):
        load_manifest(ManifestConfig())
    assert "there is no manifest at" in refusal(tmp_path / "none.csv")
    assert "must end in .csv, .tsv" in refusal(write(tmp_path / "m.txt", "x"))
    path = written(tmp_path, ".csv")
    assert "has no column subset; it has" in refusal(path, split_column="subset")
    assert "has no column key; it has" in refusal(path, image_id_column="key")
    assert "cannot be read" in refusal(write(tmp_path / "m.parquet", "no parquet"))
    table = pa.table({"filepath": ["a.jpg"], "caption": [{"en": "x"}]})
    pq.write_table(table, tmp_path / "structs.parquet")
    assert "the column caption holds struct<" in refusal(tmp_path / "structs.parquet")


def test_what_is_written_is_read_by_any_csv_reader(tmp_path: Path) -> None:
    path = written(tmp_path, ".csv")
    with path.open(newline="") as file:
        assert [tuple(row) for row in csv.reader(file)] == [HEADER, *ROWS]


def test_classes_are_text_whatever_column_they_are_in(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    rows = [f"{name}.jpg,a,{label},x\n" for name, label in (("a", "01"), ("b", " 2 "), ("c", ""))]
    path = tmp_path / "m.csv"
    path.write_text("".join(["filepath,caption,label,class\n", *rows]))
    chosen = ManifestConfig(manifest=str(path), class_column="label")
    assert load_manifest(chosen).classes() == ["01", "2", None]
    assert load_manifest(ManifestConfig(manifest=str(path))).classes() == ["x", "x", "x"]
    assert load_manifest(ManifestConfig(manifest=str(path), class_column="")).classes() is None
    with pytest.raises(ConfigError, match="has no column kind; .*data.class_column chooses"):
        load_manifest(ManifestConfig(manifest=str(path), class_column="kind"))


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.string())])
@pytest.mark.parametrize("column", ["caption", "captions", "raw"])
def test_a_row_may_have_a_list_of_captions(
    column: str, kind: pa.DataType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lists = pa.array([["x", " y "], [], None, ["z", ""]], kind)
    files = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    touch(tmp_path, *files)
    table = pa.table({"filepath": files, column: lists, "url": ["u1", "u2", "u3", "u4"]})
    path = tmp_path / "m.parquet"
    pq.write_table(table, path, row_group_size=2)
    chosen = {"caption_column": column} if column == "raw" else {}
    with caplog.at_level(logging.WARNING):
        pairs = load(path, **chosen)
    assert pairs.table.select(["filepath", "captions", "url"]).to_pylist() == [
        {"filepath": "a.jpg", "captions": ["x", "y"], "url": "u1"},
        {"filepath": "d.jpg", "captions": ["z"], "url": "u4"},
    ]
    assert "left out 3 rows without a caption, and so 2 images" in caplog.text


def test_what_the_table_of_a_source_writes_is_a_manifest(tmp_path: Path) -> None:
    pairs = load(written(tmp_path, ".csv"))
    pq.write_table(pairs.table, tmp_path / "m.parquet")
    assert load(tmp_path / "m.parquet").table == pairs.table
