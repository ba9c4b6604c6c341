"""A scan over processes equals one in this process; a second scan reads changed files only."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.quality.pictures import LIMITS, encoded, photograph, write
from twotower.data.pairs import Pair, PairTable
from twotower.data.places import piece_name
from twotower.quality import scan as scan_module
from twotower.quality.picture import Limits
from twotower.quality.scan import inspect_files, scan, thumbs_of


def table(folder: Path, names: list[str]) -> PairTable:
    return PairTable.from_pairs((Pair(n, None, "train", n) for n in names), folder, "pictures")


@pytest.fixture
def pairs(tmp_path: Path) -> PairTable:
    names = [f"{number}.jpg" for number in range(7)]
    for number, name in enumerate(names):
        write(tmp_path / name, photograph(number, 48, 40))
    (tmp_path / "3.jpg").write_bytes(b"no picture")
    (tmp_path / "5.jpg").unlink()
    return table(tmp_path, names)


class Deadly(int):
    """A limit that ends the process which compares it with a picture of 13 x 7 pixels."""

    def __lt__(self, pixels: int) -> bool:
        if pixels == 13 * 7:
            os._exit(1)
        return int(self) < pixels


def test_processes_give_what_one_gives(
    pairs: PairTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a file ends the process that decodes it."""
    monkeypatch.setattr(scan_module, "CHUNK", 2)
    write(tmp_path / "deadly.jpg", photograph(9, 13, 7))
    names = [*pairs.table["filepath"].to_pylist(), "deadly.jpg"]
    limits = replace(LIMITS, max_pixels=Deadly(LIMITS.max_pixels))
    alone = scan(pairs, LIMITS, 1, tmp_path / "one.parquet")
    several = scan(table(tmp_path, names), limits, 2, tmp_path / "several.parquet")
    assert several.slice(0, 7).equals(alone)
    last = several.slice(7).to_pylist()[0]
    assert (last["fault"], last["reason"]) == ("unreadable", "it ends the decoder's process")


def test_second_scan_reads_only_what_changed(
    pairs: PairTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(paths: list[str], limits: Limits) -> pa.Table:
        read.extend(Path(path).name for path in paths)
        return inspect_files(paths, limits)

    monkeypatch.setattr(scan_module, "inspect_files", counted)
    kept = tmp_path / "out" / "scan.parquet"
    first = scan(pairs, LIMITS, 1, kept)
    assert len(read) == 7
    read.clear()
    assert scan(pairs, LIMITS, 1, kept).equals(first)
    assert read == ["5.jpg"]  # it is not there, and might have come
    (tmp_path / "3.jpg").write_bytes(encoded(photograph(3, 48, 40)))
    write(tmp_path / "new.jpg", photograph(8, 48, 40))
    read.clear()
    second = scan(table(tmp_path, ["new.jpg", "3.jpg", "0.jpg"]), LIMITS, 1, kept)
    assert read == ["new.jpg", "3.jpg"]
    assert [Path(path).name for path in second["path"].to_pylist()] == ["new.jpg", "3.jpg", "0.jpg"]
    assert second["fault"].to_pylist() == [""] * 3
    assert second.slice(2).equals(first.slice(0, 1))
    read.clear()
    scan(pairs, replace(LIMITS, min_side=64), 1, kept)
    assert len(read) == 7


def test_a_scan_that_was_stopped_goes_on(
    pairs: PairTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "CHUNK", 2)
    kept, read = tmp_path / "out" / "scan.parquet", []

    def stopped(paths: list[str], limits: Limits) -> pa.Table:
        if len(read) == 4:
            raise KeyboardInterrupt
        read.extend(paths)
        return inspect_files(paths, limits)

    monkeypatch.setattr(scan_module, "inspect_files", stopped)
    with pytest.raises(KeyboardInterrupt):
        scan(pairs, LIMITS, 1, kept)
    read.clear()
    monkeypatch.setattr(scan_module, "CHUNK", 64)
    assert scan(pairs, LIMITS, 1, kept).equals(scan(pairs, LIMITS, 1, tmp_path / "other.parquet"))
    assert [Path(path).name for path in read[:3]] == ["4.jpg", "5.jpg", "6.jpg"]


def test_pictures_in_a_larger_file(pairs: PairTable, tmp_path: Path) -> None:
    """A piece of a file is what the same bytes are in a file of their own; read once."""
    data = [(tmp_path / f"{number}.jpg").read_bytes() for number in (0, 1)]
    (tmp_path / "all.tar").write_bytes(b"head" + data[0] + data[1])
    names = [
        piece_name("all.tar", 4, len(data[0]), "0.jpg"),
        piece_name("all.tar", 4 + len(data[0]), len(data[1]), "1.jpg"),
        piece_name("all.tar", 4 + len(data[0]), len(data[1]) + 1, "2.jpg"),
    ]
    kept = tmp_path / "scan.parquet"
    found = scan(table(tmp_path, names), LIMITS, 1, kept)
    alone = scan(table(tmp_path, ["0.jpg", "1.jpg"]), LIMITS, 1, tmp_path / "alone.parquet")
    for column in ("size", "fault", "pixels_hash", "thumb"):
        assert found[column].to_pylist()[:2] == alone[column].to_pylist()
    assert found["reason"].to_pylist()[2] == "all.tar ends within the picture"
    assert scan(table(tmp_path, names), LIMITS, 1, kept).equals(found)


def test_damaged_earlier_scan_is_passed_over(pairs: PairTable, tmp_path: Path) -> None:
    kept = tmp_path / "scan.parquet"
    kept.write_bytes(b"PAR1 and no more")
    found = scan(pairs, LIMITS, 1, kept)
    assert pq.read_table(kept).num_rows == len(found) == 7


def test_thumbs_are_the_rows_thumbs(pairs: PairTable, tmp_path: Path) -> None:
    found = scan(pairs, LIMITS, 1, tmp_path / "scan.parquet").take([6, 0, 1, 2])
    expected = found["thumb"].to_pylist()
    assert [row.tobytes() for row in thumbs_of(found)] == expected
    assert [row.tobytes() for row in thumbs_of(found.slice(1, 2))] == expected[1:3]
    assert thumbs_of(found.slice(0, 0)).shape[0] == 0
    assert len(thumbs_of(pa.concat_tables([found, found]))) == 8
