import io
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from twotower.data.images import UnreadableImage, decode_image
from twotower.data.manifest import ManifestConfig, load_manifest, write_manifest
from twotower.data.places import file_of, piece_name, piece_names, read_bytes, read_place, state_of


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_piece_of_a_file_is_read_like_a_file(tmp_path: Path) -> None:
    red, blue = picture("red"), picture("blue")
    pack = tmp_path / "odd #1+2 name/pack.tar"
    pack.parent.mkdir()
    pack.write_bytes(b"head" + red + blue)
    name = piece_name("pack.tar", 4 + len(red), len(blue), "a/b/blue.png")
    place = pack.parent / name
    assert place.name == "blue.png" and file_of(place) == pack
    assert read_bytes(place) == read_bytes(str(place)) == blue
    assert read_place(place) == (blue, pack.stat().st_mtime_ns)
    assert decode_image(place).getpixel((0, 0)) == (0, 0, 255)
    assert state_of(place) == (len(blue), pack.stat().st_mtime_ns)
    assert state_of(pack) == (4 + len(red) + len(blue), pack.stat().st_mtime_ns)
    beyond = pack.parent / piece_name("pack.tar", 4 + len(red), len(blue) + 1, "")
    with pytest.raises(UnreadableImage, match=r"^pack.tar ends within the picture$"):
        decode_image(beyond)
    with pytest.raises(OSError, match="ends within the picture"):
        read_bytes(pack.parent / piece_name("pack.tar", 4, 10**18, ""))
    assert piece_name("pack.tar", 0, 1, "a/..") == piece_name("pack.tar", 0, 1, "picture")
    with pytest.raises(UnreadableImage, match="no such file"):
        decode_image(tmp_path / name)


def test_many_names_at_once() -> None:
    columns = [pa.chunked_array([[1, 20], [3]]), pa.chunked_array([[4, 5, 6]])]
    names = pa.chunked_array([["a.png", "b", "ü.jpg"]])
    assert piece_names("x/0.tar", *columns, names).to_pylist() == [
        piece_name("x/0.tar", *row)
        for row in zip(*(column.to_pylist() for column in (*columns, names)), strict=True)
    ]


def test_a_manifest_may_name_pieces(tmp_path: Path) -> None:
    (tmp_path / "pack.bin").write_bytes(picture("red"))
    name = piece_name("pack.bin", 0, len(picture("red")), "red.png")
    write_manifest(tmp_path / "m.csv", ("filepath", "caption"), [(name, "red")])
    pairs = load_manifest(ManifestConfig(manifest=str(tmp_path / "m.csv")))
    assert decode_image(pairs.path(0)).getpixel((0, 0)) == (255, 0, 0)
