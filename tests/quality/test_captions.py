"""Captions that are cut, missing or blank, counted to the token."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import HashTokenizer
from twotower.data.folder import FolderConfig, load_folder
from twotower.data.manifest import ManifestConfig
from twotower.data.pairs import Pair, PairTable
from twotower.models.openai_tokenizer import OpenAITokenizer
from twotower.quality.captions import LeftOut, blank_rows, examine_captions, find_left_out


def table(captions: dict[str, list[str]]) -> PairTable:
    rows = (Pair(f, c, "train", f) for f, cs in captions.items() for c in cs or [None])
    return PairTable.from_pairs(rows, Path(), "captions")


def test_a_caption_is_cut_from_one_token_too_many_on() -> None:
    words = ["word"] * 9
    pairs = table(
        {"a": [" ".join(words[:8]), " ".join(words)], "b": [], "c": ["x"], "d": ["y " * 9]}
    )
    facts = examine_captions(pairs, HashTokenizer(context_length=8), LeftOut())
    assert facts.cut.tolist() == [1, 0, 0, 1]
    assert (facts.captions, facts.too_long, facts.length) == (4, 2, 8)
    assert facts.without.tolist() == [1]
    assert facts.longest == 44


def test_openais_start_and_end_count() -> None:
    pairs = table({"fits": ["a " * 75], "cut": ["a " * 76]})
    assert examine_captions(pairs, OpenAITokenizer(), LeftOut()).cut.tolist() == [0, 1]


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_blank_rows_of_a_manifest(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"m{ending}"
    comma = {".csv": ",", ".tsv": "\t"}[ending]
    rows = ["filepath,title", "a.jpg,words", "b.jpg,", "c.jpg,  ", "d.jpg,nan", "e.jpg,None"]
    path.write_text("\n".join(row.replace(",", comma) for row in rows) + "\n")
    config = ManifestConfig(manifest=str(path), caption_column="title")
    assert blank_rows(config, 2) == LeftOut(3, ("row 2: b.jpg", "row 3: c.jpg"))
    assert blank_rows(ManifestConfig(manifest=str(path), caption_column=""), 2) == LeftOut()


def test_blank_rows_where_a_row_has_a_list_of_captions(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    lists = pa.array([["one", "two"], [], None], pa.list_(pa.string()))
    pq.write_table(pa.table({"filepath": ["a", "b", "c"], "captions": lists}), path)
    assert blank_rows(ManifestConfig(manifest=str(path)), 9) == LeftOut(2, ("row 2: b", "row 3: c"))
    assert blank_rows(ManifestConfig(manifest=str(path), caption_column="title"), 9) == LeftOut()


def test_pictures_whose_text_is_missing(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "val/c", "other/d"):
        path = tmp_path / f"{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        if name in ("train/a", "val/c"):
            path.with_suffix(".txt").write_text("words")
    config = FolderConfig(folder=str(tmp_path))
    assert find_left_out(config, load_folder(config), 9) == LeftOut(1, ("train/b.jpg",))


def test_no_captions_at_all() -> None:
    facts = examine_captions(table({"a": [], "b": []}), HashTokenizer(), LeftOut())
    assert (facts.captions, facts.longest, facts.cut.tolist()) == (0, 0, [0, 0])
