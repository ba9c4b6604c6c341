"""Filters against the same conditions in Python, row by row."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from twotower.retrieval.search.filter_grammar import parse_filter
from twotower.settings import ConfigError

COUNT = 60
COLUMNS: dict[str, list[Any]] = {
    "width": [None if i % 7 == 0 else i * 20 for i in range(COUNT)],
    "class": [None if i % 11 == 0 else ["cat", "Dog", "a \"b\" 'c'"][i % 3] for i in range(COUNT)],
    "ok": [None if i % 5 == 0 else i % 2 == 0 for i in range(COUNT)],
    "captions": [["A dog", "x"] if i % 4 else [] for i in range(COUNT)],
    "meta": [{"camera": f"c{i % 3}", "iso": i} for i in range(COUNT)],
    "when": [datetime.date(2024, 1, 1) + datetime.timedelta(days=i) for i in range(COUNT)],
    "my column": [i / 8 for i in range(COUNT)],
    "not": list(range(COUNT)),
}
TABLE = pa.table(
    {
        **COLUMNS,
        "width": pa.array(COLUMNS["width"], pa.int16()),
        "coded": pa.array(COLUMNS["class"]).dictionary_encode(),
        "nothing": pa.nulls(COUNT),
    }
)

Row = dict[str, Any]
CASES: dict[str, Callable[[Row], bool | None]] = {
    'width>=512 and class=="cat"': lambda r: (
        r["width"] is not None and r["width"] >= 512 and r["class"] == "cat"
    ),
    "256 <= width < 1024": lambda r: r["width"] is not None and 256 <= r["width"] < 1024,
    "1024>width>=256.5": lambda r: r["width"] is not None and 256.5 <= r["width"] < 1024,
    "width > 100000": lambda r: False,
    "width < -1e3 or width = 40": lambda r: r["width"] == 40,
    'not class=="cat"': lambda r: r["class"] not in (None, "cat"),
    "class != 'cat'": lambda r: r["class"] not in (None, "cat"),
    'coded == "Dog"': lambda r: r["class"] == "Dog",
    'class in ["cat", "Dog"]': lambda r: r["class"] in ("cat", "Dog"),
    'class not in ("cat")': lambda r: r["class"] not in (None, "cat"),
    "width in [20, 40, 60.0]": lambda r: r["width"] in (20, 40, 60),
    'class == "a \\"b\\" \'c\'"': lambda r: r["class"] == "a \"b\" 'c'",
    'class contains "DO"': lambda r: r["class"] == "Dog",
    'captions contains "a d"': lambda r: bool(r["captions"]),
    "class is null": lambda r: r["class"] is None,
    "class is not null and ok": lambda r: r["class"] is not None and r["ok"],
    "not ok": lambda r: r["ok"] is False,
    "ok == true": lambda r: r["ok"],
    "not (ok or width >= 100)": lambda r: (
        r["ok"] is False and r["width"] is not None and r["width"] < 100
    ),
    'class=="cat" and ok or width==40': lambda r: (
        (r["class"] == "cat" and r["ok"]) or r["width"] == 40
    ),
    'class=="cat" and (ok or width==40)': lambda r: (
        r["class"] == "cat" and (r["ok"] or r["width"] == 40)
    ),
    'meta.camera=="c1" and meta.iso>4': lambda r: (
        r["meta"]["iso"] > 4 and r["meta"]["iso"] % 3 == 1
    ),
    'when >= "2024-02-01"': lambda r: r["when"] >= datetime.date(2024, 2, 1),
    "`my column` > 3 and `not` < 40": lambda r: 3 < r["my column"] < 5,
    "width > `not`": lambda r: r["width"] is not None and r["width"] > r["not"],
    'nothing == "x" or nothing > 3 or nothing is not null': lambda r: False,
    "width==+40": lambda r: r["width"] == 40,
}


@pytest.mark.parametrize("text", CASES)
def test_a_filter_passes_what_the_same_in_python_passes(text: str) -> None:
    wanted = parse_filter(text, TABLE.schema)
    found = ds.dataset(TABLE).to_table(columns={"passes": wanted.expression})["passes"]
    rows = [
        dict(zip(COLUMNS, values, strict=True)) for values in zip(*COLUMNS.values(), strict=True)
    ]
    assert found.fill_null(False).to_pylist() == [bool(CASES[text](row)) for row in rows]
    assert wanted.text == text
    assert all(name in text for name in wanted.schema.names)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the filter is empty"),
        (
            "widht>=512",
            "names the column widht, but the store has width, class, ok, cap",
        ),
        ("meta.lens==1", "names meta.lens, but the column meta holds struct<"),
        ("width.x==1", "names width.x, but the column width holds int16"),
        ("width>", "at its end: a column, a number or a text in quotes is missing"),
        ("width", "at its end: a comparison is missing here"),
        ("and ok", "at character 1, where 'and ok' stands: a column, a number"),
        ("ok and", "at its end: a column, a number"),
        ("(ok", "at its end: a bracket that was opened is not closed"),
        ("ok)", "at character 3, where ')' stands: a condition has ended here"),
        ("ok width>3", "at character 4, where 'width>3' stands: a condition has ended here"),
        ("class==cat", "names the column cat, but the store has"),
        ('class=="cat', "at character 8, where '\"cat' stands: this quote is never closed"),
        ("class==5", "class is text and a constant is a number; numbers stand without quotes"),
        ('width=="5"', "width is a number and a constant is text"),
        ("ok>3", "ok is bool and a constant is a number"),
        ("captions==3", "captions is list<"),
        ("class in []", "at character 11, where ']' stands: a column, a number"),
        ("class in [class]", "at character 11, where 'class]' stands: a list holds numbers or"),
        ('class in ["a"', "at its end: a list that was opened is not closed"),
        ("class in 3", "at character 10, where '3' stands: in takes a list"),
        ("class is 3", "at character 10, where '3' stands: is takes null or not null"),
        ("class contains dog", "where 'dog' stands: contains takes a text in quotes"),
        ('width contains "1"', "width holds int16, not text"),
        ('when > "soon"', 'when holds date32[day], as in when>="2024-12-31"'),
        ("3 < 5", "names no column"),
        ("width > 99999999999999999999", "is too large a number"),
        ("width > 5px", "where '5px' stands"),
        ("__import__('os').system('x')", "names the column __import__"),
        ("width >= 3; ok", "where '; ok' stands"),
    ],
)
def test_what_is_no_filter_gets_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_filter(text, TABLE.schema)
    assert sentence in str(refused.value)
