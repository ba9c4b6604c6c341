"""Filters on a store's metadata: `width>=512 and class=="cat"`, evaluated by pyarrow.

    filter      and, or, not and brackets around conditions
    condition   value (== != < <= > >=) value, also chained: 256 <= width < 1024
                column in ["cat", "dog"]      column not in [...]
                column contains "text"        whatever the case; of a list in any of its texts
                column is null                column is not null        column (true or false)
    value       a column, a number, "text" or 'text', true, false

A column is named as in the store, a nested one with dots, an odd one in `backquotes`. Where a value
is missing no comparison holds, nor does its opposite; `is null` asks for it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from twotower.retrieval.search.reading import Reader
from twotower.settings import ConfigError

COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "=": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
WORDS = ("and", "or", "not", "in", "contains", "is", "null", "true", "false")

_COMPARE = re.compile("==|!=|<=|>=|=|<|>")
_NAME = re.compile(r"([^\W\d]\w*(?:\.\w+)*)|`([^`]+)`")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?!\w)")
_KEYWORD = {word: re.compile(rf"{word}\b") for word in WORDS}
_OPEN, _CLOSE = re.compile(r"\("), re.compile(r"\)")
_LIST_OPEN, _LIST_CLOSE, _COMMA = re.compile(r"[\[(]"), re.compile(r"[\])]"), re.compile(",")


@dataclass(frozen=True)
class Filter:
    """A condition on rows: as typed, for pyarrow, and the columns that it reads."""

    text: str
    expression: pc.Expression
    schema: pa.Schema


@dataclass(frozen=True)
class _Value:
    """One side of a comparison: what pyarrow takes, and what kind of value it is."""

    expression: pc.Expression
    type: pa.DataType
    column: str = ""  # empty for a constant
    constant: Any = None


def parse_filter(text: str, schema: pa.Schema) -> Filter:
    """A filter on columns of a schema; nothing in it is ever run as code.

    Raises:
        ConfigError: it is malformed, which is told with the place, names a column that there is
            not, or compares what cannot be compared.
    """
    parser = FilterParser(text, schema)
    expression = parser.whole()
    used = [field for field in schema if field.name in parser.used]
    return Filter(text, expression, pa.schema(used))


class FilterParser(Reader):
    """Recursive descent over the grammar; `constant`, `field` and `holds` make it pyarrow's."""

    def __init__(self, text: str, schema: pa.Schema) -> None:
        super().__init__(text, "filter")
        self.schema = schema
        self.used: set[str] = set()

    def constant(self, value: Any) -> Any:
        return pc.scalar(value)

    def field(self, path: list[str], kind: pa.DataType) -> Any:
        found = pc.field(*path)
        return found.cast(kind.value_type) if pt.is_dictionary(kind) else found

    def holds(self, words: Any, text: str, joined: bool) -> Any:
        words = pc.binary_join(words, "\n") if joined else words
        return pc.match_substring(words, text, ignore_case=True)

    def whole(self) -> Any:
        """All of the text; raises as `parse_filter` does."""
        if self.at_end():
            raise ConfigError(
                'the filter is empty; give a condition, for example filter="width>=512"'
            )
        expression = self.disjunction()
        if not self.at_end():
            self.fail("a condition has ended here; and or or joins it with the next")
        if not self.used:
            has = _names(self.schema)
            raise ConfigError(f"the filter {self.text} names no column; the store has {has}")
        return expression

    def word(self, name: str) -> bool:
        return self.match(_KEYWORD[name]) is not None

    def disjunction(self) -> pc.Expression:
        found = self.conjunction()
        while self.word("or"):
            found = found | self.conjunction()
        return found

    def conjunction(self) -> pc.Expression:
        found = self.negation()
        while self.word("and"):
            found = found & self.negation()
        return found

    def negation(self) -> pc.Expression:
        if self.word("not"):
            return ~self.negation()
        if self.match(_OPEN):
            found = self.disjunction()
            if not self.match(_CLOSE):
                self.fail("a bracket that was opened is not closed")
            return found
        return self.condition()

    def condition(self) -> pc.Expression:
        left = self.value()
        if left.column:
            special = self.membership(left)
            special = self.special(left) if special is None else special
            if special is not None:
                return special
        found = None
        while sign := self.match(_COMPARE):
            right = self.value()
            left, right = self.comparable(left, right)
            holds = COMPARE[sign[0]](left.expression, right.expression)
            found = holds if found is None else found & holds
            left = right
        if found is not None:
            return found
        if left.column and pt.is_boolean(left.type):
            return left.expression
        self.fail('a comparison is missing here, as in width>=512 or class=="cat"')

    def membership(self, left: _Value) -> Any:
        """`in [...]` or `not in [...]`, if it stands here."""
        start = self.place
        negated = self.word("not")
        if not self.word("in"):
            self.place = start
            return None
        if not self.match(_LIST_OPEN):
            self.fail('in takes a list, as in class in ["cat", "dog"]')
        values = [self.constant_like(left)]
        while self.match(_COMMA):
            values.append(self.constant_like(left))
        if not self.match(_LIST_CLOSE):
            self.fail("a list that was opened is not closed")
        found = values[0]
        for value in values[1:]:
            found = found | value
        return ~found if negated else found

    def constant_like(self, left: _Value) -> pc.Expression:
        """Whether a column is the constant that stands here."""
        start = self.place
        right = self.value()
        if right.column:
            self.place = start
            self.fail('a list holds numbers or texts in quotes, as in ["cat", "dog"]')
        same, constant = self.comparable(left, right)
        return same.expression == constant.expression

    def special(self, left: _Value) -> Any:
        """`contains "text"` or `is [not] null`, if it stands here."""
        if self.word("contains"):
            text = self.quoted("\"'")
            if text is None:
                self.fail('contains takes a text in quotes, as in caption contains "dog"')
            return self.contains(left, text)
        if self.word("is"):
            negated = self.word("not")
            if not self.word("null"):
                self.fail("is takes null or not null, as in caption is not null")
            return ~left.expression.is_null() if negated else left.expression.is_null()
        return None

    def contains(self, left: _Value, text: str) -> pc.Expression:
        joined = bool(pt.is_list(left.type) or pt.is_large_list(left.type))
        if joined and not _is_text(left.type.value_type):
            self.fail(f"{left.column} holds {left.type}, not texts")
        if not joined and not _is_text(left.type):
            self.fail(f"{left.column} holds {left.type}, not text")
        return self.holds(left.expression, text, joined)

    def value(self) -> _Value:
        """A column or a constant.

        Raises:
            ConfigError: neither stands here, or there is no such column.
        """
        text = self.quoted("\"'")
        if text is not None:
            return _Value(self.constant(text), pa.string(), constant=text)
        number = self.match(_NUMBER)
        if number is not None:
            return self.number(number[0])
        for name in ("true", "false"):
            if self.word(name):
                return _Value(self.constant(name == "true"), pa.bool_(), constant=name == "true")
        start = self.place
        found = self.match(_NAME)
        if found is None or found[1] in WORDS:
            self.place = start
            self.fail('a column, a number or a text in quotes is missing here, as in class=="cat"')
        return self.column(found[1] or found[2], quoted=found[1] is None)

    def number(self, digits: str) -> _Value:
        whole = re.fullmatch(r"[+-]?\d+", digits)
        value = int(digits) if whole else float(digits)
        if whole and abs(value) >= 2**63:
            self.fail(f"{digits} is too large a number")
        scalar = pa.scalar(value)
        return _Value(self.constant(scalar), scalar.type, constant=value)

    def moment(self, constant: _Value, column: _Value) -> _Value:
        """A constant as a date or a time."""
        try:
            value = pa.scalar(constant.constant).cast(column.type)
        except pa.ArrowException:
            self.fail(f'{column.column} holds {column.type}, as in {column.column}>="2024-12-31"')
        return _Value(self.constant(value), column.type)

    def column(self, name: str, quoted: bool) -> _Value:
        """A column by its name, or a part of a nested one."""
        path = [name] if quoted or name in self.schema.names else name.split(".")
        if path[0] not in self.schema.names:
            has = _names(self.schema)
            raise ConfigError(f"the filter names the column {name}, but the store has {has}")
        self.used.add(path[0])
        kind = self.schema.field(path[0]).type
        for part in path[1:]:
            if not pt.is_struct(kind) or kind.get_field_index(part) < 0:
                raise ConfigError(f"the filter names {name}, but the column {path[0]} holds {kind}")
            kind = kind.field(part).type
        plain = kind.value_type if pt.is_dictionary(kind) else kind
        return _Value(self.field(path, kind), plain, name)

    def comparable(self, left: _Value, right: _Value) -> tuple[_Value, _Value]:
        """Both sides as pyarrow can compare them.

        Raises:
            ConfigError: a number with a text, say.
        """
        for one, other in ((left, right), (right, left)):
            if one.column and pt.is_null(one.type):  # a column without a single value
                cast = _Value(one.expression.cast(other.type), other.type, one.column)
                return (cast, right) if one is left else (left, cast)
            if one.column and pt.is_temporal(one.type) and not other.column:
                when = self.moment(other, one)
                return (left, when) if one is left else (when, right)
        for same in (_is_number, _is_text, pt.is_boolean, pt.is_temporal):
            if same(left.type) and same(right.type):
                return left, right
        names = [value.column or "a constant" for value in (left, right)]
        self.fail(
            f"{names[0]} is {_kind(left.type)} and {names[1]} is {_kind(right.type)}; "
            'numbers stand without quotes, texts in quotes, as in class=="5"'
        )


def _names(schema: pa.Schema) -> str:
    return ", ".join(field.name for field in schema)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind))


def _kind(kind: pa.DataType) -> str:
    return "text" if _is_text(kind) else "a number" if _is_number(kind) else str(kind)
