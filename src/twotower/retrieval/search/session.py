"""What `twotower search` does: one query, or a prompt that stays open."""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import os
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from twotower.config import Config, FreeText
from twotower.console import print_table, say
from twotower.data.templates import text_or_templates
from twotower.retrieval.search.conversation import Conversation
from twotower.retrieval.search.grid import picture_name, write_grid
from twotower.retrieval.search.opening import open_searcher
from twotower.retrieval.search.query import Query, parse_query, read_queries
from twotower.retrieval.search.searcher import Hit, Options
from twotower.runs import logs_path
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

PROMPT = "search for: "
BATCH = 32  # texts or pictures that are encoded at a time where there are several
CUT = 300  # characters of a path or caption in the table


def search_store(config: Config, free: FreeText) -> None:
    """Answer the queries that were given, or ask for queries until the input ends.

    Raises:
        ConfigError: a query, the store, its checkpoint or k is not fit for a search.
    """
    queries = given_queries(free)
    options = options_of(config, free)
    several = len(queries) > 1 or options.templates
    searcher = open_searcher(config, BATCH if several else 1, options.filter)
    searcher.check(options)
    for query, hits in zip(queries, searcher.search(queries, options), strict=True):
        show(hits, query.label, config)
    if not queries:

        def answer(hits: Sequence[Hit], label: str) -> None:
            show(hits, label, config)

        prompt(Conversation(searcher, options, config.feedback, answer).answer)


def given_queries(free: FreeText) -> list[Query]:
    """The queries of a command's free text; none if it gives none.

    Raises:
        ConfigError: it gives more than one kind, a query is malformed, or a file is not there.
    """
    if free.verb is not None:
        raise ConfigError(f"search takes words as query=..., for example query={free.verb!r}")
    given = {name: getattr(free, name) for name in ("query", "query_image", "query_file")}
    names = [f"{name}=" for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ConfigError(f"give {' or '.join(names)}, not both")
    if free.query is not None:
        queries = [parse_query(free.query)]
    elif free.query_image is not None:
        if not os.path.isfile(free.query_image):
            raise ConfigError(f"query_image={free.query_image}: there is no such picture")
        queries = [Query.of_image(free.query_image)]
    else:
        queries = read_queries(Path(free.query_file)) if free.query_file is not None else []
    for query in queries:
        query.check_files()
    return queries


def options_of(config: Config, free: FreeText) -> Options:
    """What the search section and `filter=` ask of an answer.

    Raises:
        ConfigError: the templates are missing or malformed, or the filter is empty.
    """
    section = config.search
    named = section.templates
    templates = tuple(text_or_templates(named, "search.templates")) if named else ()
    if free.filter is not None and not free.filter.strip():
        raise ConfigError('filter= is empty; give a condition, for example filter="width>=512"')
    return Options(
        k=section.k,
        threshold=section.threshold,
        templates=templates,
        filter=free.filter or "",
        duplicates=section.duplicate_cosine if section.deduplicate else None,
    )


def prompt(answer: Callable[[str], None]) -> None:
    """Read queries line by line, as typed, until the input ends (Ctrl-D) or Ctrl-C.

    A query that is refused gets its sentence, and the prompt stays open.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no UTF-8 get a sentence from `answer`, not a traceback from here.
        sys.stdin.reconfigure(errors="surrogateescape")
    words = PROMPT if sys.stdin.isatty() else ""
    if words:
        say("a query, or :help for what else can be typed")
    if words and importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # gives input() its history and editing
    while True:
        try:
            text = input(words)
        except (EOFError, KeyboardInterrupt):
            if words:
                say()
            return
        try:
            answer(text)
        except ConfigError as error:
            log.warning("%s", error)


def show(hits: Sequence[Hit], query: str, config: Config) -> None:
    """Print the query as typed and the table of its hits; write their picture, say where."""
    say(query)
    if not hits:
        say("nothing was found")
        return
    print_hits(hits)
    if not config.search.grid:
        return
    folder = Path(config.search.output or logs_path(config) / "search")
    path = folder / picture_name(query)
    write_grid(hits, query, path)
    say(str(path))


def print_hits(hits: Sequence[Hit]) -> None:
    """Rank, score, path and caption on stdout; as wide as it takes where no terminal limits it."""
    several = any(hit.collection for hit in hits)
    names = ("rank", "score", "path", "caption", *(["collection"] if several else []))
    table = Table(*names, box=None, pad_edge=False)
    table.columns[0].justify = table.columns[1].justify = "right"
    table.columns[2].overflow = "fold"
    for hit in hits:
        texts = (_from_here(hit.path), hit.caption, *([hit.collection] if several else []))
        # Text, not str: what stands in a caption is no markup.
        cells = [Text(one_line(text)) for text in texts]
        table.add_row(str(hit.rank), f"{hit.score:.4f}", *cells)
    print_table(table)


def _from_here(path: Path) -> str:
    """A path as short as it can be said from the working directory, if it is below that."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def one_line(text: str) -> str:
    """Text from files as a table shows it: no control characters, which steer terminals."""
    plain = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    return plain if len(plain) <= CUT else plain[: CUT - 1] + "…"
