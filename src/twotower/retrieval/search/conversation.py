"""What can be typed at the prompt: queries, and judgements of their hits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from twotower.console import say
from twotower.retrieval.search.feedback import Feedback
from twotower.retrieval.search.query import parse_query
from twotower.retrieval.search.searcher import Hit, Options, Searcher
from twotower.search_config import FeedbackConfig
from twotower.settings import ConfigError

HELP = """\
words, or a formula: 2*"dog" + img:pool.jpg - "leash"
:good 1 3-5        these results of the last answer are good
:bad 2             these are bad
:again             search again with the query that follows from that
:save pairs.csv    add the good ones to a file of training pairs, with the query as their caption
:save pairs.csv a dog by a pool        or with this one
:help              this"""

_RANKS = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


class Conversation:
    """The query that was asked last and what was said of its hits.

    A line that begins with one of the words of `HELP` is a command, any other one a query.
    """

    def __init__(
        self,
        searcher: Searcher,
        options: Options,
        config: FeedbackConfig,
        show: Callable[[Sequence[Hit], str], None],
    ) -> None:
        self._searcher = searcher
        self._options = options
        self._config = config
        self._show = show
        self._feedback: Feedback | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            ":good": lambda rest: self._mark(rest, good=True),
            ":bad": lambda rest: self._mark(rest, good=False),
            ":again": self._again,
            ":save": self._save,
            ":help": lambda rest: say(HELP),
        }

    def answer(self, typed: str) -> None:
        """Do what one line says.

        Raises:
            ConfigError: it is no query, or a command that cannot be done.
        """
        word, _, rest = typed.strip().partition(" ")
        if word in self._commands:
            self._commands[word](rest.strip())
            return
        query = parse_query(typed)
        query.check_files()
        feedback = Feedback(self._searcher, query, self._options, self._config)
        self._show(feedback.search(), typed)
        self._feedback = feedback

    @property
    def _current(self) -> Feedback:
        if self._feedback is None:
            raise ConfigError("nothing has been searched for yet, so there is nothing to judge")
        return self._feedback

    def _mark(self, rest: str, *, good: bool) -> None:
        self._current.mark(list(_ranks(rest)), good=good)
        say(self._count())

    def _count(self) -> str:
        return f"{len(self._current.good)} good, {len(self._current.bad)} bad"

    def _again(self, rest: str) -> None:
        if rest:
            raise ConfigError(f":again stands alone, without {rest!r}")
        label = f"{self._current.query.label} ({self._count()})"
        self._show(self._current.search(), label)

    def _save(self, rest: str) -> None:
        name, _, caption = rest.partition(" ")
        if not name:
            raise ConfigError(":save needs the name of a file, as in :save pairs.csv")
        count = self._current.save(Path(name), caption.strip())
        say(f"{name}: {count} training pairs")


def _ranks(text: str) -> Iterator[int]:
    """The numbers of `1 3-5, 7`.

    Raises:
        ConfigError: there are none, or something else stands there.
    """
    words = text.replace(",", " ").split()
    if not words:
        raise ConfigError("say which results, as in :good 1 3-5")
    for word in words:
        found = _RANKS.fullmatch(word)
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise ConfigError(f"{word!r} is no rank of a result; write :good 1 3-5, for example")
        first, last = int(found[1]), int(found[2] or found[1])
        if last - first >= 10_000:
            raise ConfigError(f"{word} are too many results")
        yield from range(first, last + 1)
