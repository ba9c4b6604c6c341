"""Reading what users type, from left to right; a mistake is told with its place."""

from __future__ import annotations

import re
from typing import NoReturn

from twotower.settings import ConfigError

SHOWN = 30  # characters of the text around a mistake

_BLANKS = re.compile(r"\s*")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"|' r"'((?:[^'\\]|\\.)*)'", re.DOTALL)
_ESCAPE = re.compile(r"\\([\"'\\])")


class Reader:
    """A text and how far it has been read."""

    def __init__(self, text: str, what: str) -> None:
        self.text = text
        self.what = what
        self.place = 0

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Read what fits the pattern here, behind any blanks; None, and nothing read, if none."""
        blanks = _BLANKS.match(self.text, self.place)
        found = pattern.match(self.text, blanks.end() if blanks else self.place)
        if found is not None:
            self.place = found.end()
        return found

    def at_end(self) -> bool:
        """Whether nothing but blanks is left."""
        return not self.text[self.place :].strip()

    def quoted(self, marks: str = '"') -> str | None:
        """A text in quotes, without them; a backslash stands before a quote or itself inside.

        Raises:
            ConfigError: it has no second quote.
        """
        mark = self.peek()
        if not mark or mark not in marks:
            return None
        found = self.match(_QUOTED)
        if found is None:
            self.fail("this quote is never closed")
        return _ESCAPE.sub(r"\1", found[1] if found[1] is not None else found[2])

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        return self.text[self.place :].lstrip()[:1]

    def fail(self, problem: str) -> NoReturn:
        """Refuse the text here.

        Raises:
            ConfigError: always; it names the place and shows what stands there.
        """
        rest = self.text[self.place :]
        place = self.place + len(rest) - len(rest.lstrip())
        here = self.text[place : place + SHOWN]
        where = f"at character {place + 1}, where {here!r} stands" if here else "at its end"
        raise ConfigError(f"cannot read the {self.what} {where}: {problem}")
