"""Templates and class lists: what files may say, and which class an image counts for."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pyarrow as pa
import pytest

from twotower.config import ZeroShotConfig
from twotower.data.pairs import Pair, PairTable
from twotower.evaluation.prompts import (
    Prompts,
    load_templates,
    read_classes,
    zeroshot_prompts,
)
from twotower.settings import ConfigError


def table(*labels: str | None, split: str = "val") -> PairTable:
    rows = [Pair(f"{i}.jpg", None, split, str(i)) for i in range(len(labels))]
    pairs = PairTable.from_pairs(rows, Path("nowhere"), "data")
    column = pa.array(labels, pa.large_string())
    return PairTable(pairs.table.append_column("class", column), pairs.root, pairs.name)


def without_classes(pairs: PairTable) -> PairTable:
    return PairTable(pairs.table.drop_columns(["class"]), pairs.root, pairs.name)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("openai80", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("simple7", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ],
)
def test_published_templates(name: str, published: list) -> None:
    found = load_templates(name)
    assert len(found) == {"openai80": 80, "simple7": 7}[name]
    prompts = Prompts(labels=("a",), words=("polar bear",), templates=tuple(found))
    assert prompts.texts() == [template("polar bear") for template in published]


def test_templates_of_a_file(tmp_path: Path) -> None:
    name = write(tmp_path / "t.txt", "\ufeffa {}.\n\n  ein Bild: {}\r\n{} and {}\n")
    assert load_templates(name) == ["a {}.", "ein Bild: {}", "{} and {}"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a {}.\na photo\n", "t.txt, line 2: a template must hold {} .*, not 'a photo'"),
        ("a { }.\n", "line 1: a template must hold {}"),
        ("\n \n", "must be openai80, simple7 or a file; .*t.txt is empty"),
    ],
)
def test_a_file_without_a_place_for_the_class_is_refused(
    tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load_templates(write(tmp_path / "t.txt", text))


def test_a_name_that_is_neither_known_nor_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="openai80, simple7 or a file; openai_80: no such file"):
        load_templates("openai_80")
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_templates(str(tmp_path / "t.txt"))


def test_classes_of_a_file(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "c.txt", "polar_bear\n\nn02123045\ttabby  cat\nape "))
    assert read_classes(path) == (
        ["polar_bear", "n02123045", "ape"],
        ["polar bear", "tabby  cat", "ape"],
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ape\n", "has one class; to choose between classes it takes two"),
        ("Polar bear\napple\npolar_bear\n", "names the class 'polar bear' more than once"),
        ("ape\nn1\t\n", "line 2: a label, a tab and words"),
        ("ape\n\tcat\n", "line 2: a label, a tab and words"),
        ("", "a file with a class a line; .* is empty"),
    ],
)
def test_malformed_class_lists(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_classes(Path(write(tmp_path / "c.txt", text)))


def test_the_classes_of_the_data_are_those_of_all_its_splits() -> None:
    source = table("polar_bear", "ape", None, " cat ", "")
    prompts = zeroshot_prompts(ZeroShotConfig(templates="simple7"), source, source.head(2))
    assert prompts is not None
    assert prompts.labels == ("ape", "cat", "polar_bear")
    assert prompts.words == ("ape", "cat", "polar bear")
    assert prompts.rows_of(source).tolist() == [2, 0, -1, 1, -1]
    assert prompts.of_class(2)[0] == "itap of a polar bear."
    assert len(prompts.texts()) == 21


def test_data_without_two_classes_have_no_classifier() -> None:
    config, some = ZeroShotConfig(), table("ape", "cat")
    assert zeroshot_prompts(config, table("ape", "ape", None), some) is None
    assert zeroshot_prompts(config, without_classes(some), without_classes(some)) is None
    assert zeroshot_prompts(config, some, table(None, "")) is None


def test_a_list_chooses_and_names_the_classes(tmp_path: Path) -> None:
    file = write(tmp_path / "c.txt", "n01\tpolar bear\nSEA_lion\napple\n")
    config = ZeroShotConfig(classes=file, templates="simple7", top_k=[5, 1, 1])
    pairs = table("n01", "sea lion", "sea_lion", "whale", None)
    prompts = zeroshot_prompts(config, pairs, pairs)
    assert prompts is not None
    assert prompts.ks == (1, 5)
    assert prompts.rows_of(pairs).tolist() == [0, 1, 1, -1, -1]
    with pytest.raises(ConfigError, match=r"shows one of the classes n01.*; it has whale"):
        prompts.rows_of(table("whale"))


def test_a_label_as_it_stands_goes_before_one_that_is_like_it() -> None:
    pairs = table("Polar", "polar", "POLAR")
    prompts = zeroshot_prompts(ZeroShotConfig(), pairs.head(2), pairs)
    assert prompts is not None
    assert prompts.rows_of(pairs).tolist() == [0, 1, 1]


def test_a_list_for_data_that_do_not_say_their_classes(tmp_path: Path) -> None:
    file = write(tmp_path / "c.txt", "ape\ncat\n")
    pairs = without_classes(table("ape"))
    with pytest.raises(ConfigError, match="data does not say what its pictures show; .*class"):
        zeroshot_prompts(ZeroShotConfig(classes=file), pairs, pairs)
