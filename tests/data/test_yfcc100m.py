import bz2
import csv
import sqlite3
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.data.pictures import png
from tests.data.served import Answer, served
from twotower.data.images import decode_image
from twotower.data.yfcc100m import Texts, Yfcc100mConfig, load_yfcc100m, prepare_yfcc100m
from twotower.data.yfcc100m_list import clean, select
from twotower.settings import ConfigError

IDS = [2_000_000_000 + n for n in range(12)]
HASHES = {photo: f"{photo % 7:03x}{photo:029x}" for photo in IDS}
COLUMNS = 23
TITLES = {IDS[0]: "IMG_1234", IDS[1]: "", IDS[2]: "A+%22small%22+dog%2C+%3Cb%3Erunning%3C%2Fb%3E"}


def line(photo: int, columns: int, marker: str = "0") -> list[str]:
    """A line of metadata in one of the three releases."""
    fields = [""] * COLUMNS
    title = TITLES.get(photo, f"Title+{photo % 100}")
    fields[0], fields[6], fields[7] = str(photo), title, f"What+is+on+{photo % 100}%0Aand+more"
    fields[14], fields[22] = f"http://farm1.staticflickr.com/{photo}_x.jpg", marker
    number = [str(photo % 1000)] if columns == 25 else []
    hashed = [HASHES.get(photo, "0" * 32)] if columns > COLUMNS else []
    return [*number, fields[0], *hashed, *fields[1:]]


def write_lists(root: Path, columns: int = 25, name: str = "yfcc100m_dataset.bz2") -> None:
    root.mkdir(parents=True, exist_ok=True)
    subset = "".join(f"{n}\t{photo}\t{HASHES[photo]}\n" for n, photo in enumerate(IDS))
    (root / "yfcc100m_subset_data.tsv").write_text(subset)
    others = [line(17, columns), line(99, columns)]
    lines = [others[0], *(line(photo, columns) for photo in reversed(IDS)), others[1]]
    lines.append(line(IDS[0], columns, marker="1"))  # a video
    text = "".join("\t".join(fields) + "\n" for fields in lines).encode()
    (root / name).write_bytes(bz2.compress(text) if name.endswith(".bz2") else text)


def config(root: Path, url: str = "", **settings: object) -> Yfcc100mConfig:
    polite = {"connections": 2, "per_second": 0.0, "pause": 0.0, "tries": 1}
    url = f"{url}/{{hash_1}}/{{hash_2}}/{{hash}}.jpg"
    return Yfcc100mConfig(**{"folder": str(root), "url": url, **polite, **settings})


def path_of(photo: int) -> str:
    digits = HASHES[photo]
    return f"/{digits[:3]}/{digits[3:6]}/{digits}.jpg"


def refusal(settings: Yfcc100mConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare_yfcc100m(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pictures_are_downloaded_and_split(tmp_path: Path) -> None:
    root = tmp_path / "yfcc"
    write_lists(root)
    write_lists(root, name="yfcc100m_dataset")  # unpacked beside what was downloaded
    answers = {path_of(photo): [Answer(200, png((photo % 100, 0, 0)))] for photo in IDS}
    answers[path_of(IDS[5])] = [Answer(404)]
    answers[path_of(IDS[6])] = [Answer(500)]
    with served(answers) as server:
        prepare_yfcc100m(config(root, server.url, limit=4))
        assert len(load_yfcc100m(config(root))) == 4
        prepare_yfcc100m(config(root, server.url, val_fraction=0.4))
        assert len(load_yfcc100m(config(root))) == 10
        server.asked.clear()
        answers[path_of(IDS[6])] = [Answer(200, png((6, 0, 0)))]
        prepare_yfcc100m(config(root, server.url, val_fraction=0.4))
        assert server.asked == {path_of(IDS[6]): 1}
    pairs = load_yfcc100m(config(root))
    assert len(pairs) == 11
    assert pq.read_metadata(root / "selected.parquet").num_rows == 12
    assert len(pairs.split("train")) + len(pairs.split("val")) == 11
    assert len(pairs.split("val")) == sum(1 for _ in (root / "dev.tsv").open()) - 1 - sum(
        len(captions) - 1 for captions in pairs.split("val").table["captions"].to_pylist()
    )
    captions = dict(
        zip(pairs.table["image_id"].to_pylist(), pairs.table["captions"].to_pylist(), strict=True)
    )
    assert captions[str(IDS[0])] == ["What is on 0 and more"]
    assert captions[str(IDS[1])] == ["What is on 1 and more"]
    assert captions[str(IDS[2])] == ['A "small" dog, running', "What is on 2 and more"]
    assert pairs.table["url"].to_pylist()[0].startswith("http://farm1")
    row = pairs.table["image_id"].to_pylist().index(str(IDS[4]))
    assert decode_image(pairs.path(row)).getpixel((0, 0)) == (4, 0, 0)
    assert pairs.path(row) == root / f"data/{HASHES[IDS[4]][:3]}/{IDS[4]}.jpg"
    with (root / "train.tsv").open(newline="") as file:
        assert next(csv.reader(file, delimiter="\t"))[:2] == ["filepath", "caption"]


def write_database(path: Path) -> None:
    names = [f"c{n}" for n in range(COLUMNS)]
    for place, name in ((0, "photoid"), (6, "title"), (7, "description"), (14, "downloadurl")):
        names[place] = name
    names[22] = "marker"
    rows = [line(photo, COLUMNS) for photo in IDS] + [line(17, COLUMNS)]
    with closing(sqlite3.connect(path)) as database:
        types = ", ".join(f"{n} {'INTEGER' if n in ('photoid', 'marker') else ''}" for n in names)
        database.execute(f"CREATE TABLE yfcc100m_dataset ({types})")
        marks = ", ".join("?" * COLUMNS)
        database.executemany(f"INSERT INTO yfcc100m_dataset VALUES ({marks})", rows)
        database.commit()


@pytest.mark.parametrize("kind", ["23", "24", "25", "sql"])
def test_every_release_of_the_metadata_gives_the_same(kind: str, tmp_path: Path) -> None:
    metadata = tmp_path / ("m.sql" if kind == "sql" else "m")
    write_lists(tmp_path, 23 if kind == "sql" else int(kind), "m")
    if kind == "sql":
        write_database(metadata)
    output = tmp_path / "selected.parquet"
    assert select(tmp_path / "yfcc100m_subset_data.tsv", [metadata], output) == 12
    rows = sorted(pq.read_table(output).to_pylist(), key=lambda row: row["photo_id"])
    assert [row["photo_id"] for row in rows] == IDS
    assert [row["hash"] for row in rows] == [HASHES[photo] for photo in IDS]
    assert rows[3]["title"] == "Title+3" and rows[3]["description"].startswith("What+is+on+3")
    assert rows[3]["url"] == f"http://farm1.staticflickr.com/{IDS[3]}_x.jpg"


def test_one_text_as_the_caption_and_the_url_of_the_metadata(tmp_path: Path) -> None:
    write_lists(tmp_path, 23, "new_metadata.csv")
    with served({f"/{IDS[2]}": [Answer(200, png((1, 1, 1)))]}) as server:
        chosen = config(tmp_path, url="", texts=Texts.title)
        chosen.url = server.url + "/{photo_id}"
        prepare_yfcc100m(chosen)
    assert load_yfcc100m(chosen).captions(0) == ['A "small" dog, running']


def test_pictures_without_a_caption_are_no_data_set(tmp_path: Path) -> None:
    write_lists(tmp_path)
    answers = {path_of(IDS[1]): [Answer(200, png((1, 1, 1)))]}  # its title is empty
    with served(answers) as server:
        chosen = config(tmp_path, server.url, texts=Texts.title)
        assert refusal(chosen) == f"{tmp_path} has no picture with a caption"
    assert not (tmp_path / "train.tsv").exists()


def test_a_file_without_addresses_beside_one_with_them(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").touch()
    for name, url in (("train", "http://x/1"), ("dev", "")):
        lines = f"filepath\tcaption\tsplit\timage_id\turl\n1.jpg\tx\t{name}\t{name}\t{url}\n"
        (tmp_path / f"{name}.tsv").write_text(lines)
    table = load_yfcc100m(config(tmp_path)).table
    assert table["url"].to_pylist() == ["http://x/1", None]


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("DSC_0042", ""),
        ("2012-05-03+12.jpg", ""),
        ("P1010203", ""),
        ("Image+7", ""),
        ("Route+66", "Route 66"),
        ("%26lt%3Bi%26gt%3Bpink+%26amp%3B+blue", "pink & blue"),
        ("na%C3%AFve%09caf%C3%A9", "naïve café"),
    ],
)
def test_texts_become_captions(text: str, caption: str) -> None:
    assert clean(text) == caption


def test_each_mistake_has_its_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run `twotower prepare data=yfcc100m` first"):
        load_yfcc100m(config(tmp_path))
    assert "has no yfcc100m_subset_data.tsv; download https://" in refusal(config(tmp_path))
    subset = tmp_path / "yfcc100m_subset_data.tsv"
    subset.write_text("x\ty\n")
    assert "has no metadata (yfcc100m_dataset," in refusal(config(tmp_path))
    (tmp_path / "yfcc100m_dataset").write_text("a\tb\n")
    assert "is no list of line number, photo id and hash" in refusal(config(tmp_path))
    subset.write_text(f"0\t{IDS[0]}\t../../x\n")
    assert refusal(config(tmp_path)).endswith("photo id and hash: ../../x")
    subset.write_text(f"0\t{IDS[0]}\t{HASHES[IDS[0]]}\n")
    assert "has 2 columns; YFCC100M's metadata have 23 to 25" in refusal(config(tmp_path))
    (tmp_path / "yfcc100m_dataset").write_text("\t".join(line(5, 23)) + "\n")
    assert "has none of the 1 photographs of" in refusal(config(tmp_path))
    (tmp_path / "yfcc100m_dataset").rename(tmp_path / "yfcc100m_dataset.sql")
    assert "is no database of YFCC100M's metadata" in refusal(config(tmp_path))
    with pytest.raises(ConfigError, match=r"data.url must hold one of {hash}"):
        Yfcc100mConfig(url="http://x/y.jpg")
