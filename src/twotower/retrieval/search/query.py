"""What is searched for: one grammar for the command line, for Python and for a server.

A query is a formula if it begins, behind a sign and a weight where there are any, with a double
quote, `img:` or `vec:`. Everything else is text, exactly as typed: `a dog + a cat` is five words.

    formula   [sign] term, then any number of: sign term        sign    + or -
    term      [weight *] "text" | img:path | vec:path            weight  2, 0.5, .5
    path      up to the next blank, or in double quotes

`text:` before anything makes it text, whatever it begins with.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twotower.data.places import file_of
from twotower.data.templates import numbered_lines
from twotower.retrieval.index import AnyFloatArray
from twotower.retrieval.search.reading import Reader
from twotower.settings import ConfigError

AS_TEXT = "text:"
TERM = 'a term is "words", img:<file> or vec:<file>, as in 2*"dog" + img:pool.jpg - "leash"'
HINT = f"; put {AS_TEXT} before the query if all of it is text"

_WEIGHT = re.compile(r"(\d+\.?\d*|\.\d+)\s*\*")
_FORMULA = re.compile(rf'\s*[+-]?\s*(?:{_WEIGHT.pattern}\s*)?(?:"|img:|vec:)')
_SIGN = re.compile(r"[+-]")
_KIND = re.compile(r"(img|vec):")
_PATH = re.compile(r"\S+")


class TermKind(enum.Enum):
    """What a term is made of."""

    text = "text"
    image = "img"
    vector = "vec"


@dataclass(frozen=True)
class Term:
    """One part of a query.

    Attributes:
        kind: what `content` is.
        content: words; a picture as `Encoder.encode_images` takes it; or a vector (D,) or the path
            of its `.npy` file.
        weight: by which its unit vector is multiplied; negative for what is not wanted.
    """

    kind: TermKind
    content: Any
    weight: float = 1.0


@dataclass(frozen=True)
class Query:
    """A weighted sum of texts, pictures and vectors; `label` is the query as it was typed."""

    terms: tuple[Term, ...]
    label: str

    @classmethod
    def of_text(cls, text: str) -> Query:
        """A query of words alone, whatever they look like.

        Raises:
            ConfigError: they are blank, or their bytes are no valid UTF-8.
        """
        check_text(text)
        return cls((Term(TermKind.text, text),), text)

    @classmethod
    def of_image(cls, picture: Any, label: str = "") -> Query:
        """A query of one picture: a path, bytes, a PIL picture or uint8 (H, W, 3)."""
        name = label or (str(picture) if isinstance(picture, str | Path) else "a picture")
        return cls((Term(TermKind.image, picture),), name)

    @classmethod
    def of_vector(cls, vector: AnyFloatArray, label: str = "a vector") -> Query:
        """A query of one vector (D,)."""
        return cls((Term(TermKind.vector, vector),), label)

    @property
    def text(self) -> str | None:
        """The words of a query that is nothing but words; None of others."""
        sole = self.terms[0]
        only = len(self.terms) == 1 and sole.kind is TermKind.text and sole.weight > 0
        return str(sole.content) if only else None

    def check_files(self) -> None:
        """Refuse files that are not there, before anything is loaded to read them.

        Raises:
            ConfigError: the first of them.
        """
        for term in self.terms:
            if term.kind is TermKind.text or not isinstance(term.content, str | Path):
                continue
            if not _is_file(term.content):
                what = "picture" if term.kind is TermKind.image else "file of a vector"
                raise ConfigError(
                    f"{term.kind.value}:{term.content}: there is no such {what}; a path with "
                    f'blanks stands in quotes, as in {term.kind.value}:"my {term.kind.value}"'
                )


def parse_query(text: str, *, files: bool = True) -> Query:
    """What a user typed as a query.

    Args:
        files: whether it may name files (`img:`, `vec:`); not where others than the owner of the
            machine may ask.

    Raises:
        ConfigError: it is blank, not valid UTF-8, or a malformed formula, which is told with the
            place of the mistake.
    """
    check_text(text)
    if text.lstrip().startswith(AS_TEXT):
        words = text.lstrip().removeprefix(AS_TEXT)
        return Query(Query.of_text(words).terms, text)
    if not _FORMULA.match(text):
        return Query.of_text(text)
    reader = Reader(text, "query")
    terms: list[Term] = []
    while not terms or not reader.at_end():
        sign = reader.match(_SIGN)
        if terms and sign is None:
            reader.fail(f"+ or - is missing here{HINT}")
        terms.append(_read_term(reader, -1.0 if sign and sign[0] == "-" else 1.0, files))
    return Query(tuple(terms), text)


def _read_term(reader: Reader, sign: float, files: bool) -> Term:
    weight = reader.match(_WEIGHT)
    factor = float(weight[1]) if weight else 1.0
    if not math.isfinite(factor):
        reader.fail("the weight before this is too large a number")
    words = reader.quoted()
    if words is not None:
        if not words.strip():
            reader.fail('there are no words between the quotes before this; give some, as in "dog"')
        return Term(TermKind.text, words, sign * factor)
    kind = reader.match(_KIND)
    if kind is None:
        reader.fail(TERM + HINT)
    if not files:
        reader.place = kind.start()
        reader.fail("files are not taken here")
    path = reader.quoted()
    if path is None:
        # Behind a blank stands the next term, not the path.
        found = _PATH.match(reader.text, reader.place)
        path = found[0] if found else ""
        reader.place += len(path)
    if not path:
        reader.fail(f"{kind[0]} needs the path of a file right behind it{HINT}")
    return Term(TermKind(kind[1]), path, sign * factor)


def read_queries(path: Path) -> list[Query]:
    """The queries of a file: one a line, or of a `.npy` file one a row (N, D).

    Blank lines are left out.

    Raises:
        ConfigError: the file is missing, empty or no text, or a line is no query.
    """
    if path.suffix == ".npy":
        rows = load_vectors(path)
        return [Query.of_vector(row, f"{path.name}[{i}]") for i, row in enumerate(rows)]
    queries = []
    for number, line in numbered_lines(path, "query_file= must be a file with a query a line"):
        try:
            queries.append(parse_query(line))
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
    return queries


def load_vectors(path: Path) -> AnyFloatArray:
    """The vectors (N, D) of a `.npy` file that holds N of them, or one (D,).

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path} cannot be read as a .npy file of vectors") from error
    if not isinstance(rows, np.ndarray) or rows.ndim not in (1, 2) or not rows.size:
        raise ConfigError(f"{path} must hold one vector (D,) or several (N, D)")
    if not np.issubdtype(rows.dtype, np.floating):
        raise ConfigError(f"{path} must hold floating-point numbers, not {rows.dtype}")
    return np.atleast_2d(rows)


def as_queries(queries: Sequence[Query | str]) -> list[Query]:
    """Queries of which some are still as typed.

    Raises:
        ConfigError: as `parse_query`.
    """
    return [parse_query(query) if isinstance(query, str) else query for query in queries]


def check_text(text: str) -> None:
    """Refuse a query that says nothing.

    Raises:
        ConfigError: it is blank, or its bytes are no valid UTF-8.
    """
    if not text.strip():
        raise ConfigError('the query is empty; give words, for example query="a dog on the beach"')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("the query is not valid UTF-8 text") from error


def _is_file(path: str | Path) -> bool:
    try:
        return file_of(path).is_file()
    except (OSError, ValueError):  # too long a name, or a zero byte in it
        return False
