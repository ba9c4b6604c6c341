"""What is copied or listed is what a plain product finds above the threshold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from tests.helpers import tiny_bundle
from tests.retrieval.conftest import COUNT
from twotower.commands import filter as command
from twotower.config import Config, FreeText
from twotower.data.manifest import ManifestConfig, load_manifest
from twotower.embedding.encoder import Encoder
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.search.picking import copy_pictures, write_list
from twotower.retrieval.search.searcher import Hit
from twotower.search_config import FilterConfig
from twotower.settings import ConfigError

pytestmark = pytest.mark.usefixtures("any_checkpoint")

QUERY = '2*"red" - "number"'


def ranked(store: EmbeddingStore) -> tuple[np.ndarray, np.ndarray]:
    """Row ids by score, and the scores, of the query."""
    red, number = Encoder(tiny_bundle()).encode_texts(["red", "number"]).astype(np.float64)
    query = (2 * red - number) / np.linalg.norm(2 * red - number)
    scores = np.concatenate(store.image_shards()).astype(np.float64) @ query
    order = np.argsort(-scores, kind="stable")
    return store.row_ids()[order], scores[order]


def test_the_best_above_a_threshold_are_copied(
    config: Config, store: EmbeddingStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids, scores = ranked(store)
    threshold = float((scores[11] + scores[12]) / 2)
    config = dataclasses.replace(config, filtering=FilterConfig(threshold=threshold))
    output = tmp_path / "picked"
    command.run(config, FreeText(query=QUERY, output=str(output)))
    rows = store.metadata(ids[:12])
    assert sorted(path.name for path in output.iterdir()) == sorted(
        Path(row["image_path"]).name for row in rows
    )
    for row in rows:
        path = Path(row["image_path"])
        assert (output / path.name).read_bytes() == path.read_bytes()
    assert capsys.readouterr().out == f"copied 12 of 12 pictures into {output}\n"
    with pytest.raises(ConfigError, match="picked is not empty; give output= a new folder"):
        command.run(config, FreeText(query=QUERY, output=str(output)))


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".jsonl", ".parquet"])
def test_or_listed(suffix: str, config: Config, store: EmbeddingStore, tmp_path: Path) -> None:
    ids, scores = ranked(store)
    config = dataclasses.replace(config, filtering=FilterConfig(num_results=7))
    output = tmp_path / f"list{suffix}"
    command.run(config, FreeText(query=QUERY, output=str(output), filter="row_id != 13"))
    kept = ids != 13
    paths = [row["image_path"] for row in store.metadata(ids[kept][:7])]
    if suffix == ".txt":
        assert output.read_text().splitlines() == paths
        return
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    elif suffix == ".parquet":
        rows = pq.read_table(output).to_pylist()
    else:
        options = pa_csv.ParseOptions(
            delimiter="," if suffix == ".csv" else "\t", newlines_in_values=True
        )
        rows = pa_csv.read_csv(output, parse_options=options).to_pylist()
    assert [(row["filepath"], row["row_id"]) for row in rows] == list(
        zip(paths, ids[kept][:7].tolist(), strict=True)
    )
    np.testing.assert_allclose([row["score"] for row in rows], scores[kept][:7], atol=1e-5)


def test_a_list_is_a_manifest_to_train_on(
    config: Config, store: EmbeddingStore, tmp_path: Path
) -> None:
    output = tmp_path / "list.csv"
    command.run(config, FreeText(query="a dog", output=str(output)))
    pairs = load_manifest(ManifestConfig(manifest=str(output)))
    assert len(pairs) == COUNT  # num_results is a limit: the store has fewer than 100


def test_two_of_one_name_are_both_copied_and_what_is_gone_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hits = []
    for rank, place in enumerate(("a/x.jpg", "b/x.jpg", "c/x.jpg"), start=1):
        path = tmp_path / place
        path.parent.mkdir()
        path.write_bytes(place.encode())
        hits.append(Hit(rank, 0.5, rank, path, ""))
    hits[2].path.unlink()
    assert copy_pictures(hits, tmp_path / "out") == 2
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert found == {"x.jpg": b"a/x.jpg", "2_x.jpg": b"b/x.jpg"}
    assert "c/x.jpg is not copied: No such file" in caplog.text
    write_list([], tmp_path / "none.csv")
    assert (tmp_path / "none.csv").read_text().startswith('"filepath"')


def test_several_queries_are_refused(config: Config, tmp_path: Path) -> None:
    (tmp_path / "queries.txt").write_text("a dog\na cat\n")
    free = FreeText(query_file=str(tmp_path / "queries.txt"), output=str(tmp_path / "x.txt"))
    with pytest.raises(ConfigError, match=r"filter takes one query, and .*queries.txt has 2; run"):
        command.run(config, free)
    (tmp_path / "queries.txt").write_text("a dog\n")
    command.run(config, free)
    assert (tmp_path / "x.txt").is_file()


@pytest.mark.parametrize(
    ("free", "sentence"),
    [
        (FreeText(query="a"), "filter needs output=<folder to copy pictures into>, or a list"),
        (FreeText(output="x"), 'filter needs a query, for example query="a dog'),
        (FreeText(output="x", query='"a" + b'), "at character 7, where 'b' stands"),
        (FreeText(output="x", query_image="none.jpg"), "there is no such picture"),
        (FreeText(output="x.csv", query="a", filter="size>3"), "the column size, but the store"),
    ],
)
def test_what_cannot_be_picked_gets_a_sentence(
    free: FreeText, sentence: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        command.run(config, free)
    assert sentence in str(refused.value)
    assert list(tmp_path.glob("x*")) == []
