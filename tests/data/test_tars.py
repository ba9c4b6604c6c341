import io
import json
import logging
import tarfile
from pathlib import Path

import pytest

from tests.data.pictures import png
from twotower.data.tars import index_tar
from twotower.settings import ConfigError

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def index(path: Path, image_key: str = "jpg;png", caption_key: str = "txt;json.caption"):
    return index_tar(path, image_key, caption_key)


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        index(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_samples_and_where_their_pictures_lie(tmp_path: Path) -> None:
    long = "a" * 150 + "/b"  # beyond the 100 characters of a plain header
    one, two = png((1, 2, 3)), png((4, 5, 6))
    about = {"caption": "by json", "width": 4, "exif": {"ISO": 100}, "url": None}
    members = [
        ("./x/0.jpg", one),
        ("./x/0.txt", b"\xef\xbb\xbfa dog\n on  grass \n"),
        ("./x/0.json", json.dumps(about | {"key": "0"}).encode()),
        (f"{long}.PNG", two),
        (f"{long}.json", json.dumps(about | {"width": "wide"}).encode()),
        ("2.jpg", one),
        ("2.txt", b" "),
        ("2.cls", b"17"),
        ("readme", b"no dot"),
        (".hidden", b"no name"),
    ]
    path = write_tar(tmp_path / "0.tar", members)
    table = index(path, image_key="jpg;png")
    assert table["captions"].to_pylist() == [["a dog on grass"], ["by json"], []]
    data = path.read_bytes()
    places = zip(table["offset"].to_pylist(), table["size"].to_pylist(), strict=True)
    assert [data[o : o + s] for o, s in places] == [one, two, one]
    assert table["class"].to_pylist() == [None, None, "17"]
    assert table["json.width"].to_pylist() == ["4", "wide", None]
    assert table["json.exif"].to_pylist()[0] == '{"ISO": 100}'


def test_the_keys_choose_members(tmp_path: Path) -> None:
    members = [("0.jpg", png((1, 1, 1))), ("0.big.png", png((9, 9, 9))), ("0.de.txt", b"ein Hund")]
    members += [("0.json", json.dumps({"Titles": ["x", 3, "y"]}).encode())]
    path = write_tar(tmp_path / "0.tar", members)
    table = index(path, image_key="big.png; jpg", caption_key="de.txt")
    assert table["name"].to_pylist() == ["0.big.png"]
    assert table["captions"].to_pylist() == [["ein Hund"]]
    assert index(path, caption_key="json.titles")["captions"].to_pylist() == [["x", "y"]]
    assert index(path, caption_key="en.txt")["captions"].to_pylist() == [[]]


def test_what_is_left_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [("0.gif", b"x"), ("0.txt", b"x"), ("1.jpg", b"x"), ("1.json", b"{"), ("1.jpg", b"")]
    with caplog.at_level(logging.WARNING):
        table = index(write_tar(tmp_path / "0.tar", members))
    assert table["key"].to_pylist() == ["1", "1"]  # a second 1.jpg begins another sample
    assert "the .json of 1 samples is broken" in caplog.text
    assert "without a picture (jpg;png); they have .gif, .txt" in caplog.text


def test_text_that_is_no_utf8_neither_ends_the_indexing_nor_stays(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        for name, data in [
            ("café.jpg", png((1, 2, 3))),
            ("café.txt", "un café".encode("latin-1")),
            ("1.jpg", png((1, 2, 3))),
            (
                "1.json",
                b'{"caption": "half \\ud83d of one", "\\udc00": ["\\ud83d\\ude00", "\\ude00"]}',
            ),
            ("2.jpg", png((1, 2, 3))),
            ("2.json", b"[" * 100_000),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    table = index(path)
    assert table["key"].to_pylist() == ["caf\ufffd", "1", "2"]
    assert table["captions"].to_pylist() == [["un caf\ufffd"], ["half ? of one"], []]
    assert [json.loads(text or "null") for text in table["json.?"].to_pylist()] == [
        None,
        ["\U0001f600", "?"],
        None,
    ]


def test_a_tar_that_is_cut_or_damaged_between_members_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [(f"{key}.jpg", b"x") for key in range(4)])
    whole = path.read_bytes()
    assert len(index(path)) == 4
    path.write_bytes(whole[: 4 * 1024] + bytes(512))  # some writers put one block there
    assert len(index(path)) == 4
    path.write_bytes(whole[:2048])
    assert "(cut or damaged at byte 2048); download or write it again" in refusal(path)
    path.write_bytes(whole[:2048] + b"?" * 512 + whole[2560:])
    assert "(cut or damaged at byte 2048)" in refusal(path)


def test_each_mistake_has_its_sentence(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("0.jpg", b"x" * 4000), ("1.jpg", b"y" * 4000)])
    assert "cannot be read: No such file" in refusal(tmp_path / "none.tar")
    path.write_bytes(path.read_bytes()[:3000])
    assert "is no whole, uncompressed tar (unexpected end of data)" in refusal(path)
    zipped = write_tar(tmp_path / "z.tar", [("0.jpg", b"x")], mode="w:gz")
    assert "is no whole, uncompressed tar" in refusal(zipped)
    (tmp_path / "empty.tar").touch()
    assert "is no whole, uncompressed tar (empty file)" in refusal(tmp_path / "empty.tar")
