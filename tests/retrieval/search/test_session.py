from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from tests.retrieval.conftest import COUNT
from twotower import console
from twotower.commands import filter as filter_command
from twotower.commands import search
from twotower.config import Config, FreeText
from twotower.embedding.encoder import Encoder
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.search import session
from twotower.retrieval.search.opening import checkpoint_of
from twotower.retrieval.search.searcher import Options
from twotower.retrieval.search.session import print_hits, prompt
from twotower.search_config import SearchConfig
from twotower.settings import ConfigError

pytestmark = pytest.mark.usefixtures("any_checkpoint")

AS_TYPED = [
    "a dog, running",
    "what's this (black)?",
    "浜辺を走る犬",
    "a=b",
    "null",
    "5",
    "{x}",
    "[red]bold[/red] :dog: [link=x]",
    "tab\there  two spaces",
    "\\[escaped]",
    "long " * 60 + "end",
    "a dog " * 1666 + "runs",
    "犬" * 10_000,
]


@pytest.mark.parametrize("query", AS_TYPED)
def test_a_query_is_printed_as_typed_and_its_picture_named_after_it(
    query: str, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    search.run(config, FreeText(query=query))
    printed = capsys.readouterr().out
    assert printed.startswith(query + "\n")
    folder = Path(config.run.logs_dir) / "run" / "search"
    (picture,) = folder.iterdir()
    assert picture.name == session.picture_name(query)
    assert printed.endswith(f"{picture}\n")


def test_the_table_shows_rank_score_path_and_caption_as_they_are(
    config: Config, store: EmbeddingStore, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(config, search=SearchConfig(k=COUNT, grid=False))
    search.run(config, FreeText(query="a red square"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["rank", "score", "path", "caption"]
    assert len(lines) == 2 + COUNT
    hits = session.open_searcher(config).search_texts(["a red square"], COUNT)[0]
    for line, hit in zip(lines[2:], hits, strict=True):
        rank, score, path = line.split()[:3]
        assert (int(rank), score, path) == (hit.rank, f"{hit.score:.4f}", str(hit.path))
    text = "\n".join(lines)
    assert "[red]no markup[/red] :dog: {x}" in text
    assert "浜辺を走る犬" in text
    assert "line break and  [31mescape" in text
    assert max(map(len, lines)) < 600
    assert not (Path(config.run.logs_dir) / "run" / "search").exists()


def test_on_a_terminal_the_table_keeps_to_its_width(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "output", Console(file=screen, force_terminal=True, width=70))
    print_hits(session.open_searcher(config).search_texts(["a"], COUNT)[0])
    plain = Text.from_ansi(screen.getvalue())
    assert all(line.cell_len <= 70 for line in plain.split())
    assert "markup[/red]" in plain.plain


def test_paths_below_the_working_directory_are_shown_from_there(
    config: Config,
    store: EmbeddingStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(store.folder.parent)
    search.run(config, FreeText(query="a"))
    assert "\n   1  " in capsys.readouterr().out
    assert session._from_here(store.folder.parent / "pictures" / "x.jpg") == "pictures/x.jpg"


def test_a_picture_as_query_finds_itself(
    config: Config, store: EmbeddingStore, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store.metadata([12])[0]["image_path"]
    search.run(config, FreeText(query_image=path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == path
    rank, score, found = lines[2].split()[:3]
    assert (rank, found) == ("1", path)
    assert float(score) == pytest.approx(1, abs=1e-3)
    assert Path(lines[-1]).name == session.picture_name(path)


def test_pictures_go_where_the_config_says(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(config, search=SearchConfig(output=str(tmp_path / "here")))
    search.run(config, FreeText(query="a dog"))
    assert (tmp_path / "here" / "a dog.png").is_file()
    assert str(tmp_path / "here" / "a dog.png") in capsys.readouterr().out


def test_every_index_gives_hits(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    search.run(config, FreeText(query="a red square"))
    exact = capsys.readouterr().out
    search.run(dataclasses.replace(config, index=FaissConfig()), FreeText(query="a red square"))
    assert capsys.readouterr().out == exact


@pytest.mark.parametrize(
    ("free", "sentence"),
    [
        (FreeText(query=""), "the query is empty"),
        (FreeText(query="  "), "the query is empty"),
        (FreeText(query="a", query_image="b"), "give query= or query_image=, not both"),
        (FreeText(query_image="no/such.jpg"), "query_image=no/such.jpg: there is no such picture"),
        (FreeText(query_image="x" * 5000), ": there is no such picture"),
        (FreeText(verb="dog"), "search takes words as query=..., for example query='dog'"),
        (FreeText(query_file="no/such.txt"), "a file with a query a line; no/such.txt: no such"),
        (FreeText(query='"a" + cat'), "at character 7, where 'cat' stands: a term is"),
        (FreeText(query='"a" + img:no/such.jpg'), "img:no/such.jpg: there is no such picture"),
    ],
)
def test_what_cannot_be_searched_gets_a_sentence(
    free: FreeText, sentence: str, config: Config
) -> None:
    with pytest.raises(ConfigError) as refused:
        search.run(config, free)
    assert sentence in str(refused.value)


def test_a_picture_that_cannot_be_read_gets_a_sentence(config: Config, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ConfigError, match="cannot read .*text.jpg"):
        search.run(config, FreeText(query_image=str(tmp_path / "text.jpg")))


def test_more_results_than_rows_are_refused_before_the_prompt_opens(config: Config) -> None:
    config = dataclasses.replace(config, search=SearchConfig(k=COUNT + 1))
    for free in (FreeText(query="a"), FreeText()):
        with pytest.raises(ConfigError, match=f"search.k is 31, but .* has {COUNT} rows"):
            search.run(config, free)


def test_the_checkpoint_that_made_the_store_is_found_or_asked_for(
    config: Config, store: EmbeddingStore, tmp_path: Path
) -> None:
    own = store.folder.parent / "best.safetensors"
    assert checkpoint_of(store, "") == checkpoint_of(store, str(own)) == own
    moved = dataclasses.replace(store.manifest, checkpoint="elsewhere/best.safetensors")
    assert checkpoint_of(EmbeddingStore(store.folder, moved), "") == own
    gone = dataclasses.replace(store.manifest, checkpoint="elsewhere/last.safetensors")
    with pytest.raises(ConfigError, match="elsewhere/last.safetensors of the store .* not there"):
        checkpoint_of(EmbeddingStore(store.folder, gone), "")
    unnamed = dataclasses.replace(store.manifest, checkpoint="")
    with pytest.raises(ConfigError, match="does not say which checkpoint made it"):
        checkpoint_of(EmbeddingStore(store.folder, unnamed), "")
    other = tmp_path / "other.safetensors"
    other.write_text("1")
    with pytest.raises(ConfigError, match="was made by the checkpoint"):
        search.run(dataclasses.replace(config, checkpoint=str(other)), FreeText(query="a"))
    with pytest.raises(ConfigError, match="no embedding store at"):
        search.run(dataclasses.replace(config, store=str(tmp_path / "none")), FreeText(query="a"))


def test_the_prompt_takes_lines_as_typed_until_the_input_ends(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    typed = b"a dog, running\n\n  \nquit\n caf\xe9 \n\xe6\xb5\x9c\xe8\xbe\xba {x}"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    search.run(config, FreeText())
    folder = Path(config.run.logs_dir) / "run" / "search"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["a dog, running.png", "quit.png", "浜辺 {x}.png"]
    printed = capsys.readouterr().out.splitlines()
    for query in ("a dog, running", "quit", "浜辺 {x}"):
        assert query in printed
    sentences = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [text.split(";")[0] for text in sentences] == [
        "the query is empty",
        "the query is empty",
        "the query is not valid UTF-8 text",
    ]


def test_ctrl_c_at_the_prompt_ends_it_and_in_a_search_reaches_the_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answered: list[str] = []

    def interrupted(words: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    prompt(answered.append)
    assert answered == []
    monkeypatch.setattr("builtins.input", lambda words: "a dog")
    with pytest.raises(KeyboardInterrupt):
        prompt(interrupted)  # type: ignore[arg-type]


def test_every_line_of_a_file_is_a_query(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "queries.txt").write_text('a red square\n2*"blue" - "red"\n')
    config = dataclasses.replace(config, search=SearchConfig(k=3, grid=False))
    search.run(config, FreeText(query_file=str(tmp_path / "queries.txt")))
    together = capsys.readouterr().out.splitlines()
    assert together[0] == "a red square"
    assert together[5] == '2*"blue" - "red"'
    search.run(config, FreeText(query='2*"blue" - "red"'))
    assert capsys.readouterr().out.splitlines() == together[5:]


def test_templates_and_threshold_of_the_config_reach_the_search(config: Config) -> None:
    section = SearchConfig(k=3, threshold=0.1, templates="a photo of a {}.")
    options = session.options_of(dataclasses.replace(config, search=section), FreeText())
    assert options == Options(k=3, threshold=0.1, templates=("a photo of a {}.",))
    assert session.options_of(config, FreeText()) == Options()
    section = SearchConfig(templates="none.txt")
    with pytest.raises(
        ConfigError,
        match="search.templates must be a text with {} in it, openai80, simple7 or a file",
    ):
        session.options_of(dataclasses.replace(config, search=section), FreeText())
    with pytest.raises(ConfigError, match="search.threshold must be a score"):
        SearchConfig(threshold=float("nan"))


def test_filter_and_near_duplicates_reach_the_search(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(config, search=SearchConfig(k=3, grid=False))
    search.run(config, FreeText(query="a", filter="row_id in [3, 9, 20, 21] and source_row > 4"))
    rows = [line.split()[2] for line in capsys.readouterr().out.splitlines()[2:]]
    assert sorted(Path(row).name[:4] for row in rows) == ["0009", "0020", "0021"]
    section = SearchConfig(deduplicate=True, duplicate_cosine=0.8)
    options = session.options_of(
        dataclasses.replace(config, search=section), FreeText(filter="row_id > 3")
    )
    assert (options.filter, options.duplicates) == ("row_id > 3", 0.8)
    for condition, sentence in (
        ("", "filter= is empty"),
        ("row_id >", "cannot read the filter at its end"),
        ("size > 3", "the filter names the column size, but the store has image_path, caption"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            search.run(config, FreeText(query="a", filter=condition))
    capsys.readouterr()
    for found_nothing in (FreeText(query="a", filter="row_id > 1000"), FreeText(query="a")):
        section = SearchConfig(k=3, threshold=-2 if found_nothing.filter else 2)
        search.run(dataclasses.replace(config, search=section), found_nothing)
        assert capsys.readouterr().out == "a\nnothing was found\n"


def test_a_mistake_in_a_filter_is_said_before_the_encoder_is_loaded(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the encoder was loaded")

    monkeypatch.setattr(Encoder, "load", loaded)
    for condition in ("size > 3", "row_id >"):
        for run, output in ((search.run, None), (filter_command.run, str(tmp_path / "list.txt"))):
            with pytest.raises(ConfigError, match="the filter"):
                run(config, FreeText(query="a", filter=condition, output=output))


def test_judgements_at_the_prompt_search_again(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(config, search=SearchConfig(k=5, grid=False))
    typed = b"a red square\n:good 2\n:bad 9\n:again\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    search.run(config, FreeText())
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[7], lines[8]) == (
        "a red square",
        "1 good, 0 bad",
        "a red square (1 good, 0 bad)",
    )
    first, again = lines[2:7], lines[10:15]
    assert len(again) == 5 and again != first
