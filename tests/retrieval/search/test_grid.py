from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import write_pictures
from twotower.retrieval.search import grid
from twotower.retrieval.search.grid import CELL, GAP, picture_name, write_grid
from twotower.retrieval.search.searcher import Hit
from twotower.settings import ConfigError


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("Hello World", "Hello World.png"),
        ("a dog, running", "a dog, running.png"),
        ("what's this (black)?", "what's this (black)?.png"),
        ("浜辺を走る犬", "浜辺を走る犬.png"),
        ("a=b", "a=b.png"),
        ("null", "null.png"),
        ("5", "5.png"),
        ("{x}", "{x}.png"),
        ("[red]:dog:", "[red]:dog:.png"),
        ("a/b/../c", "a_b_.._c.png"),
        ("/etc/passwd", "_etc_passwd.png"),
        (".hidden", "_hidden.png"),
        ("..", "_..png"),
        (".", "_.png"),
        ("a\tb\nc\x00d\x7fe\x85f", "a_b_c_d_e_f.png"),
        ("end.", "end..png"),
        (r"back\slash", r"back\slash.png"),
        (" spaces ", " spaces .png"),
        ("x" * 120, "x" * 120 + ".png"),
        ("x" * 121, "x" * 120 + ".png"),
        ("é" * 60 + "x", "é" * 60 + ".png"),
        ("x" + "é" * 60, "x" + "é" * 59 + ".png"),
        ("犬" * 41, "犬" * 40 + ".png"),
        ("x" * 119 + "🐶", "x" * 119 + ".png"),
    ],
)
def test_pictures_are_named_after_the_query(query: str, name: str, tmp_path: Path) -> None:
    assert picture_name(query) == name
    write_grid([], query, tmp_path / picture_name(query))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def hits_of(paths: list[Path], caption: str = "a caption") -> list[Hit]:
    return [Hit(rank, 0.5, rank, path, caption) for rank, path in enumerate(paths, start=1)]


def test_each_hit_has_its_place(tmp_path: Path) -> None:
    paths = []
    for number in range(7):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (40, 40), (number * 30, 200, 255 - number * 30)).save(path)
        paths.append(path)
    write_grid(hits_of(paths), "seven", tmp_path / "grid.png")
    pixels = np.array(Image.open(tmp_path / "grid.png"))
    assert pixels.shape[1] == GAP + 5 * (CELL + GAP)
    row_height = CELL + 3 * grid.LINE + GAP
    for number in range(7):
        left = GAP + number % 5 * (CELL + GAP) + CELL // 2
        top = grid.TITLE + number // 5 * row_height + CELL // 2
        assert pixels[top, left].tolist() == [number * 30, 200, 255 - number * 30]
    assert (pixels[grid.TITLE + row_height + CELL // 2, -CELL:] == 255).all()  # no eighth


def test_an_unreadable_picture_leaves_a_grey_place(tmp_path: Path) -> None:
    paths = [path for path, _ in write_pictures(tmp_path / "pictures", 6)]
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    paths[2].write_text("not a picture")
    paths[3].unlink()
    paths[4] = tmp_path  # a folder
    write_grid(hits_of(paths), "some are broken", tmp_path / "grid.png")
    pixels = np.array(Image.open(tmp_path / "grid.png"))
    middle = grid.TITLE + 10
    grey = [
        pixels[middle, GAP + number * (CELL + GAP) + 5].tolist() == [0xE8] * 3
        for number in range(5)
    ]
    assert grey == [False, True, True, True, True]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write .*file/grid.png"):
        write_grid([], "a", tmp_path / "file" / "grid.png")
