from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from tests.data.served import Answer, served
from twotower.retrieval.search.vocabulary import Vocabulary, load_vocabulary
from twotower.settings import ConfigError

LINES = "tabby_cat\n\n n021\tgolden retriever \r\nfox, red\ntabby_cat\n浜辺\n"
TREE = """{"animal": {"dog": ["poodle", "golden_retriever"], "cat": [], "fox": null},
 "place": ["beach", {"town": {"old": ""}}], "dog": "beach"}"""


def load(path: Path, text: str, limit: int = 10_000) -> Vocabulary:
    path.write_text(text, encoding="utf-8")
    return load_vocabulary(str(path), path.parent / "cache", limit)


def test_a_word_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = load(tmp_path / "words.txt", LINES)
    assert found.labels == ("tabby_cat", "n021", "fox, red", "浜辺")
    assert found.words == ("tabby cat", "golden retriever", "fox, red", "浜辺")
    assert "left out 1 repeated entries" in caplog.text


def test_the_leaves_of_a_tree_by_their_paths(tmp_path: Path) -> None:
    found = load(tmp_path / "tree.json", TREE)
    assert dict(zip(found.labels, found.words, strict=True)) == {
        "animal/dog/poodle": "poodle",
        "animal/dog/golden_retriever": "golden retriever",
        "animal/cat": "cat",
        "animal/fox": "fox",
        "place/beach": "beach",
        "place/town/old": "old",
        "dog/beach": "beach",
    }
    assert load(tmp_path / "list.json", '["dog", "cat"]').labels == ("dog", "cat")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no entries"),
        ("{}", "has no entries"),
        ("dog\tx\n\tcat\n", "line 2: a label, a tab and words"),
        ('{"a": 3}', "holds 3 under a; a tree is made of objects, lists and words"),
        ('["dog"', "is not JSON"),
        ("[" * 150 + '"x"' + "]" * 150, "is deeper than 100 levels"),
        ("[" * 4000 + '"x"' + "]" * 4000, "words.txt is "),
        ("dog\n" * 3000, "has more than 0.01 MB; raise classify.max_megabytes"),
    ],
)
def test_what_is_no_vocabulary_gets_a_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path / "words.txt", text)
    assert sentence in str(refused.value)


def test_files_that_are_missing_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a file or an http.s. URL; no.txt: No such file"):
        load_vocabulary("no.txt", tmp_path, 100)
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_vocabulary(str(tmp_path / "x"), tmp_path, 100)


def test_a_url_is_fetched_once_and_again_if_asked(tmp_path: Path) -> None:
    with served({"/v": [Answer(200, b"dog\ncat"), Answer(200, b"fox")]}) as server:
        url = f"{server.url}/v"
        assert load_vocabulary(url, tmp_path, 100).labels == ("dog", "cat")
        assert load_vocabulary(url, tmp_path, 100).labels == ("dog", "cat")
        assert server.asked["/v"] == 1
        assert load_vocabulary(url, tmp_path, 100, refresh=True).labels == ("fox",)
        assert load_vocabulary(url, tmp_path, 100).labels == ("fox",)


def test_a_url_leads_to_http_alone(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("dog")

    def moved(to: str) -> list[Answer]:
        return [Answer(302, headers=(("Location", to),))]

    answers = {
        "/v": [Answer(200, b"dog\ncat")],
        "/on": moved("/v"),
        "/file": moved(secret.as_uri()),
        "/ftp": moved("ftp://127.0.0.1/v"),
        "/twice": moved("/file"),
        "/round": moved("/round"),
    }
    with served(answers) as server:
        assert load_vocabulary(f"{server.url}/on", tmp_path, 100).labels == ("dog", "cat")
        for path in ("/file", "/ftp", "/twice"):
            with pytest.raises(ConfigError, match="it leads to an address that is not http"):
                load_vocabulary(server.url + path, tmp_path / "kept", 100)
        with pytest.raises(ConfigError, match="cannot be fetched"):
            load_vocabulary(f"{server.url}/round", tmp_path / "kept", 100)
    assert not (tmp_path / "kept").exists()


def test_an_answer_of_unknown_length_is_limited_too(tmp_path: Path) -> None:
    chunked = (("Transfer-Encoding", "chunked"),)
    packed = (*chunked, ("Content-Encoding", "gzip"))
    answers = {
        "/few": [Answer(200, b"dog\n" * 300, chunked)],
        "/many": [Answer(200, b"dog\n" * 300_000, chunked)],
        "/packed": [Answer(200, gzip.compress(b"dog\n" * 300_000), packed)],
    }
    with served(answers) as server:
        assert load_vocabulary(f"{server.url}/few", tmp_path, 2000).labels == ("dog",)
        for path in ("/many", "/packed"):
            with pytest.raises(ConfigError, match=f"{path} has more than 0.002 MB"):
                load_vocabulary(server.url + path, tmp_path / "kept", 2000)
    assert not (tmp_path / "kept").exists()


def test_a_url_that_is_not_there_or_too_large_leaves_nothing(tmp_path: Path) -> None:
    with served({"/large": [Answer(200, b"dog\n" * 100_000)]}) as server:
        with pytest.raises(ConfigError, match="/none cannot be fetched .HTTP 404.; download it"):
            load_vocabulary(f"{server.url}/none", tmp_path / "kept", 100)
        with pytest.raises(ConfigError, match="/large has more than 0.0001 MB"):
            load_vocabulary(f"{server.url}/large", tmp_path / "kept", 100)
    with pytest.raises(ConfigError, match="cannot be fetched .ConnectionError.; download it"):
        load_vocabulary(server.url, tmp_path / "kept", 100)
    assert not (tmp_path / "kept").exists()
