"""Filters on a store's metadata as Milvus's boolean expressions, from the same grammar.

What Milvus would answer otherwise than pyarrow does is refused rather than translated: `contains`
ignores case there and not here, and dates, lists and nested columns are no fields of ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.types as pt

from twotower.retrieval.search.filter_grammar import FilterParser
from twotower.settings import ConfigError

_FIELD = re.compile(r"[A-Za-z_]\w{0,254}", re.ASCII)
_TAKEN = ("row_id", "vector")


def translate(text: str, schema: pa.Schema, fields: Sequence[str]) -> str:
    """A filter as Milvus evaluates it, over the columns that are fields of the collection.

    Raises:
        ConfigError: the filter is malformed, or asks for what Milvus has not or does otherwise.
    """
    parser = _MilvusParser(text, schema)
    expression = parser.whole()
    missing = sorted(parser.used - {*fields, "row_id"})
    if missing:
        raise ConfigError(
            f"the filter {text} names {missing[0]}, which is no field of the Milvus collection; "
            f"load it with index.columns=[{','.join([*fields, *missing])}]"
        )
    return str(expression)


def field_kind(name: str, kind: pa.DataType) -> str:
    """The name of Milvus's type for a column of the metadata.

    Raises:
        ConfigError: it has none, or the name cannot be one of Milvus.
    """
    if not _FIELD.fullmatch(name) or name in _TAKEN:
        raise ConfigError(f"index.columns names {name}, which cannot be the name of a Milvus field")
    plain = kind.value_type if pt.is_dictionary(kind) else kind
    kinds = (
        (pt.is_boolean, "BOOL"),
        (pt.is_integer, "INT64"),
        (pt.is_floating, "DOUBLE"),
        (pt.is_string, "VARCHAR"),
        (pt.is_large_string, "VARCHAR"),
    )
    for fits, milvus in kinds:
        if fits(plain):
            return milvus
    raise ConfigError(
        f"index.columns names {name}, which holds {kind}; a Milvus field takes numbers, texts, "
        "true and false"
    )


class _Term:
    """A part of a Milvus expression, put together by Python's operators as pyarrow's are."""

    def __init__(self, text: str, constant: bool = False) -> None:
        self.text = text
        self.constant = constant

    def __str__(self) -> str:
        return self.text

    def _with(self, sign: str, other: _Term) -> _Term:
        if self.constant == other.constant:
            raise ConfigError(
                f"Milvus compares a column with a constant, not {self.text} {sign} {other.text}"
            )
        return _Term(f"({self.text} {sign} {other.text})")

    def __or__(self, other: _Term) -> _Term:
        return _Term(f"({self.text} or {other.text})")

    def __and__(self, other: _Term) -> _Term:
        return _Term(f"({self.text} and {other.text})")

    def __invert__(self) -> _Term:
        return _Term(f"(not {self.text})")

    def __eq__(self, other: object) -> Any:
        return self._with("==", other) if isinstance(other, _Term) else NotImplemented

    def __ne__(self, other: object) -> Any:
        return self._with("!=", other) if isinstance(other, _Term) else NotImplemented

    def __lt__(self, other: _Term) -> _Term:
        return self._with("<", other)

    def __le__(self, other: _Term) -> _Term:
        return self._with("<=", other)

    def __gt__(self, other: _Term) -> _Term:
        return self._with(">", other)

    def __ge__(self, other: _Term) -> _Term:
        return self._with(">=", other)

    __hash__ = None  # type: ignore[assignment]

    def is_null(self) -> _Term:
        return _Term(f"({self.text} is null)")

    def cast(self, kind: pa.DataType) -> _Term:
        raise ConfigError(f"{self.text} has not a single value, so Milvus cannot compare it")


class _MilvusParser(FilterParser):
    """The grammar of filters, to what Milvus evaluates."""

    def constant(self, value: Any) -> _Term:
        plain = value.as_py() if isinstance(value, pa.Scalar) else value
        if not isinstance(plain, bool | int | float | str):
            raise ConfigError(f"the filter {self.text} has a date or time, which no field holds")
        # JSON's escapes in a text are those of Milvus, whose words for true and false these are.
        return _Term(json.dumps(plain, ensure_ascii=False), constant=True)

    def field(self, path: list[str], kind: pa.DataType) -> _Term:
        if len(path) > 1:
            raise ConfigError(
                f"the filter {self.text} names {'.'.join(path)}, a part of a nested column, which "
                "is no field of the Milvus collection"
            )
        return _Term(path[0])

    def holds(self, words: Any, text: str, joined: bool) -> _Term:
        raise ConfigError(f"the filter {self.text} has contains, which ignores case; Milvus cannot")
