from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers import tiny_bundle, write_pictures
from twotower.embedding.encoder import Encoder
from twotower.retrieval.search.query import Query, Term, TermKind, parse_query, read_queries
from twotower.retrieval.search.query_vectors import query_vectors
from twotower.settings import ConfigError

TEXT, IMAGE, VECTOR = TermKind.text, TermKind.image, TermKind.vector

JUST_TEXT = [
    "a dog + a cat",
    "a dog - a leash",
    "2*dog",
    "- dog",
    "what's this (black)?",
    'the sign says "stop"',
    "image: a dog",
    "5",
    "+",
    "-",
    "2 *",
    "'dog' + 'cat'",
    "“dog” + “cat”",
    "浜辺を走る犬",
    " a  b ",
    "a=b",
    "vector: x",
    "3 dogs",
]


@pytest.mark.parametrize("text", JUST_TEXT)
def test_what_begins_like_no_formula_is_text_as_typed(text: str) -> None:
    assert parse_query(text) == Query((Term(TEXT, text),), text)
    assert parse_query(text).text == text


FORMULAS: dict[str, list[Term]] = {
    '"dog"': [Term(TEXT, "dog")],
    ' "dog" ': [Term(TEXT, "dog")],
    '2*"dog" + img:pool.jpg - "leash"': [
        Term(TEXT, "dog", 2.0),
        Term(IMAGE, "pool.jpg"),
        Term(TEXT, "leash", -1.0),
    ],
    '"a"+"b"-.5 * "c"': [Term(TEXT, "a"), Term(TEXT, "b"), Term(TEXT, "c", -0.5)],
    '- 3."a"': [],
    '-3.*"a"': [Term(TEXT, "a", -3.0)],
    "img:a+b.jpg": [Term(IMAGE, "a+b.jpg")],
    'img:"my pool.jpg" + vec:x.npy': [Term(IMAGE, "my pool.jpg"), Term(VECTOR, "x.npy")],
    r'"say \"hi\" \\ \n"': [Term(TEXT, r'say "hi" \ \n')],
    '"+ - 2*img:x"': [Term(TEXT, "+ - 2*img:x")],
    '0*"a" + "浜"': [Term(TEXT, "a", 0.0), Term(TEXT, "浜")],
    'text:"quoted" - dog': [Term(TEXT, '"quoted" - dog')],
    "text:text:x": [Term(TEXT, "text:x")],
}


@pytest.mark.parametrize("text", [text for text, terms in FORMULAS.items() if terms])
def test_formulas(text: str) -> None:
    assert parse_query(text) == Query(tuple(FORMULAS[text]), text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the query is empty"),
        (" \u3000", "the query is empty"),
        ("text: ", "the query is empty"),
        ("caf\udce9", "not valid UTF-8"),
        ('"dog" + cat', "at character 9, where 'cat' stands: a term is \"words\", img:<file>"),
        ('"dog" "cat"', "at character 7, where '\"cat\"' stands: + or - is missing here"),
        ('"dog" +', "at its end: a term is"),
        ('"dog" + - "cat"', "at character 9, where '- \"cat\"' stands: a term is"),
        ('"dog', "at character 1, where '\"dog' stands: this quote is never closed"),
        ('"dog" + " "', "at its end: there are no words between the quotes before this"),
        ('""', "there are no words between the quotes"),
        ("img:", "at its end: img: needs the path of a file right behind it"),
        ("img: pool.jpg", "at character 6, where 'pool.jpg' stands: img: needs the path"),
        ("img:my pool.jpg", "at character 8, where 'pool.jpg' stands: + or - is missing"),
        ('"Hello", she said', "put text: before the query if all of it is text"),
        (f'{"9" * 400}*"a"', "the weight before this is too large"),
    ],
)
def test_a_malformed_query_is_told_with_its_place(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_query(text)
    assert sentence in str(refused.value)


def test_where_others_ask_no_file_is_read() -> None:
    assert parse_query('"dog" - "cat"', files=False) == parse_query('"dog" - "cat"')
    for text in ('"a" + img:/etc/passwd', '"a" + vec:"x.npy"'):
        with pytest.raises(ConfigError, match="at character 7, where .* files are not taken here"):
            parse_query(text, files=False)


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    (path, _), *_ = write_pictures(tmp_path, 1)
    parse_query(f'img:{path} + "dog"').check_files()
    for text, sentence in (
        (f'"a" - img:{tmp_path}', f"img:{tmp_path}: there is no such picture"),
        ("vec:no.npy", "vec:no.npy: there is no such file of a vector"),
        (f"img:{'x' * 5000}", "there is no such picture; a path with blanks stands in quotes"),
    ):
        with pytest.raises(ConfigError) as refused:
            parse_query(text).check_files()
        assert sentence in str(refused.value)


def test_queries_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "queries.txt"
    file.write_text('a dog, running\n\n2*"dog" - "cat"\r\n浜辺\n', encoding="utf-8")
    typed = ["a dog, running", '2*"dog" - "cat"', "浜辺"]
    assert read_queries(file) == [parse_query(text) for text in typed]
    file.write_text('a dog\n"cat\n')
    with pytest.raises(ConfigError, match="queries.txt, line 2: cannot read the query at char"):
        read_queries(file)
    file.write_text(" \n")
    with pytest.raises(ConfigError, match="queries.txt is empty"):
        read_queries(file)


def test_vectors_of_a_file_are_a_query_each(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((3, 12)).astype(np.float16)
    np.save(tmp_path / "rows.npy", rows)
    queries = read_queries(tmp_path / "rows.npy")
    assert [query.label for query in queries] == ["rows.npy[0]", "rows.npy[1]", "rows.npy[2]"]
    encoder = Encoder(tiny_bundle())
    np.testing.assert_array_equal(query_vectors(queries, encoder), rows.astype(np.float32))
    np.save(tmp_path / "rows.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(ConfigError, match="cannot be read as a .npy file of vectors"):
        read_queries(tmp_path / "rows.npy")
    np.save(tmp_path / "rows.npy", np.arange(3))
    with pytest.raises(ConfigError, match="must hold floating-point numbers, not int64"):
        read_queries(tmp_path / "rows.npy")


def unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_a_mixture_is_the_weighted_sum_of_unit_vectors(tmp_path: Path) -> None:
    (path, _), *_ = write_pictures(tmp_path, 1)
    np.save(tmp_path / "x.npy", np.arange(12.0) * 7)
    encoder = Encoder(tiny_bundle())
    text = f'2*"dog" + img:{path} - .5*"leash" + 3*vec:{tmp_path / "x.npy"}'
    dog, leash = encoder.encode_texts(["dog", "leash"])
    (picture,) = encoder.encode_images([path])
    want = unit(2 * dog + picture - 0.5 * leash + 3 * unit(np.arange(12.0)))
    queries = [parse_query(text), parse_query("dog"), parse_query('2*"dog"')]
    got = query_vectors(queries, encoder)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [want, dog, dog], atol=1e-6)
    np.testing.assert_array_equal(got[1], dog)


def test_templates_stand_for_a_text_by_their_mean() -> None:
    encoder = Encoder(tiny_bundle())
    templates = ("a photo of a {}.", "{}", "the {} and the {}")
    prompts = {w: [t.replace("{}", w) for t in templates] for w in ("dog", "cat")}
    mean = {w: unit(encoder.encode_texts(texts).mean(axis=0)) for w, texts in prompts.items()}
    queries = [parse_query("dog"), parse_query('"dog" - 2*"cat"')]
    want = [mean["dog"], unit(mean["dog"] - 2 * mean["cat"])]
    np.testing.assert_allclose(query_vectors(queries, encoder, templates), want, atol=1e-6)


def test_each_text_and_picture_is_encoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path, _), *_ = write_pictures(tmp_path, 1)
    encoder = Encoder(tiny_bundle())
    texts, images = encoder.encode_texts, encoder.encode_images
    seen: list[object] = []
    monkeypatch.setattr(encoder, "encode_texts", lambda t: (seen.append(list(t)), texts(t))[1])
    monkeypatch.setattr(encoder, "encode_images", lambda i: (seen.append(list(i)), images(i))[1])
    lines = ["dog", '"dog" + "cat"', f'img:{path} - "cat"', f"img:{path}"]
    assert query_vectors([parse_query(line) for line in lines], encoder).shape == (4, 12)
    assert seen == [["dog", "cat"], [str(path)]]
    assert query_vectors([], encoder).shape == (0, 12)


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        (parse_query('"dog" - "dog"'), 'the terms of the query "dog" - "dog" cancel each other'),
        (parse_query('0*"dog"'), "cancel each other out"),
        (Query.of_vector(np.ones(7)), "the vector of the query has dimension 7, but the model's"),
        (Query.of_vector(np.zeros(12)), "is zero, or holds NaN or infinity"),
        (Query.of_vector(np.full(12, np.nan)), "is zero, or holds NaN or infinity"),
        (Query.of_vector(np.ones((2, 12))), "holds 2 vectors, and a term is one; query_file="),
    ],
)
def test_what_has_no_vector_gets_a_sentence(query: Query, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        query_vectors([query], Encoder(tiny_bundle()))
    assert sentence in str(refused.value)
