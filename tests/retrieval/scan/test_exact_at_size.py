"""Every tier of the exact search against fp64 scores, at sizes that take a while."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.retrieval.reference import assert_equal_up_to_ties
from tests.retrieval.scan.test_certified import KINDS, TIERS, assert_same, make, rows_of, thorough
from twotower.config import Metric
from twotower.distributed import num_threads
from twotower.retrieval.exact import ExactIndex, RowMemory
from twotower.retrieval.index import AnyFloatArray, IdArray, SearchResult, divisors, unit_rows

pytestmark = pytest.mark.slow

DIMS = (1, 2, 63, 64, 65, 511, 512, 513, 1000, 1024, 4095, 4096)


class Plan(NamedTuple):
    """Rows (N, dim) of two kinds, in parts; queries in batches; and what to ask of them."""

    kinds: tuple[str, str]
    count: int
    dim: int
    num_queries: int
    k: int
    metric: Metric
    memory: RowMemory
    shard_rows: int
    seed: int


@st.composite
def plans(draw: st.DrawFn, numbers: int = 600_000) -> Plan:
    """A plan whose rows have so many numbers at most, and brute force 30 times the work."""
    dim = draw(st.one_of(st.integers(1, 100), st.integers(1, 4096), st.sampled_from(DIMS)))
    count = draw(st.integers(0, min(100_000, numbers // dim)))
    k = draw(st.one_of(st.integers(1, 20), st.integers(1, max(1, count)), st.just(count or 1)))
    work = min(30 * numbers // max(1, count * dim), 100_000 // k)  # results are compared one by one
    return Plan(
        kinds=(draw(st.sampled_from(KINDS)), draw(st.sampled_from(KINDS))),
        count=count,
        dim=dim,
        num_queries=draw(st.integers(0, max(1, min(300, work)))),
        k=k,
        metric=draw(st.sampled_from(list(Metric))),
        memory=draw(st.sampled_from(list(RowMemory))),
        shard_rows=draw(st.sampled_from([64, 192, 5000, 1 << 20])),
        seed=draw(st.integers(0, 2**16)),
    )


def plan(kind: str, count: int, dim: int, num_queries: int, k: int, **options: object) -> Plan:
    """A plan that is not drawn."""
    settings = {"metric": Metric.cosine, "memory": RowMemory.fp32, "shard_rows": 1 << 20, "seed": 1}
    return Plan((kind, kind), count, dim, num_queries, k, **{**settings, **options})  # type: ignore[arg-type]


@thorough(20)
@given(plans())
@example(plan("random", 0, 5, 3, 1))
@example(plan("zero", 1, 1, 300, 1))
@example(plan("clip", 3000, 256, 20, 3000, shard_rows=192))
def test_every_tier_is_exact_whatever_is_added_and_deleted(drawn: Plan) -> None:
    check(drawn)


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicated", "one_hot", "huge"])
def test_among_many_rows(kind: str) -> None:
    check(plan(kind, 100_000, 8, 5, 10, shard_rows=30_000))


@pytest.mark.parametrize("metric", list(Metric))
def test_all_of_many_rows_in_order(metric: Metric) -> None:
    check(plan("clip", 100_000, 3, 2, 100_000, metric=metric))


@pytest.mark.parametrize("dim", [4095, 4096])
def test_many_dimensions(dim: int) -> None:
    check(plan("clip", 300, dim, 300, 10, metric=Metric.ip, memory=RowMemory.fp16))


def check(drawn: Plan) -> None:
    """An index that grows, shrinks, grows again and is emptied, in every tier, searched all along.

    The first tier is compared with fp64 scores, the others with the first, bit for bit.
    """
    rng = np.random.default_rng(drawn.seed)
    half = drawn.count // 2
    one, other = drawn.kinds
    parts = [rows_of(one, half, drawn.dim, rng), rows_of(other, drawn.count - half, drawn.dim, rng)]
    rows = rng.permutation(np.concatenate(parts))
    queries = rows_of(other, drawn.num_queries, drawn.dim, rng)
    if drawn.count:  # the hardest to tell apart: queries that are rows
        queries[::2] = rows[rng.integers(0, drawn.count, len(queries[::2]))]
    if drawn.metric is Metric.ip and np.abs(rows).max(initial=0) > np.finfo(np.float16).max:
        drawn = drawn._replace(memory=RowMemory.fp32)  # fp16 refuses them
    answers: list[list[SearchResult]] = []
    for number, tier in enumerate(TIERS):
        index = make(tier, drawn.dim, drawn.metric, memory=drawn.memory)
        if index._scan:
            index._scan.coded.store._shard_rows = drawn.shard_rows
        steps = history(index, rows, np.random.default_rng(drawn.seed))
        answers.append([])
        for alive, ids in steps:
            with num_threads(1 + number % 2):
                answers[-1].append(search(index, queries, drawn.k, number))
            if not number:
                compare(answers[0][-1], kept(index, rows)[alive], ids, queries, drawn.metric)
    for tier_answers in answers[1:]:
        for found, want in zip(tier_answers, answers[0], strict=True):
            assert_same(found, want)


def history(
    index: ExactIndex, rows: AnyFloatArray, rng: np.random.Generator
) -> Iterator[tuple[IdArray, IdArray]]:
    """Add and delete; after each step the numbers of the rows that are in the index, their ids."""
    count = len(rows)
    ids = rng.permutation(3 * count)[:count]
    yield np.arange(0), ids[:0]
    cut = int(rng.integers(0, count + 1))
    index.add(rows[:cut], ids[:cut])
    yield np.arange(cut), ids[:cut]
    index.add(rows[cut:], ids[cut:])
    yield np.arange(count), ids
    gone = rng.random(count) < rng.choice([0.01, 0.5, 0.99])
    index.delete(ids[gone])
    yield np.flatnonzero(~gone), ids[~gone]
    back = np.flatnonzero(gone)[::-1]
    index.add(rows[back])  # with ids that are new
    ids = ids.copy()
    following = index._rows.ids.array[len(index._rows.ids.array) - len(back) :]
    ids[back] = following
    yield np.arange(count), ids
    index.delete(rng.permutation(ids))
    yield np.arange(0), ids[:0]


def search(index: ExactIndex, queries: AnyFloatArray, k: int, number: int) -> SearchResult:
    """The answers to all queries, asked at once or in batches of another size a tier."""
    step = (len(queries) or 1) if number % 2 == 0 else 1 + 6 * number
    parts = [
        index.search(queries[start : start + step], k) for start in range(0, len(queries), step)
    ]
    if not parts:
        return index.search(queries, k)
    return SearchResult(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def kept(index: ExactIndex, rows: AnyFloatArray) -> AnyFloatArray:
    """The rows as the index searches them."""
    unit = unit_rows(rows) if index.config.metric is Metric.cosine else rows
    return unit.astype(np.float16) if index.config.memory is RowMemory.fp16 else unit


def compare(
    found: SearchResult, rows: AnyFloatArray, ids: IdArray, queries: AnyFloatArray, metric: Metric
) -> None:
    """Right up to ties; as many results as there can be, and padding behind them."""
    known = found.ids != -1
    assert (known.sum(axis=1) == min(found.ids.shape[1], len(ids))).all()
    assert np.isneginf(found.scores[~known]).all()
    assert (np.diff(known.astype(int), axis=1) <= 0).all()
    if metric is Metric.cosine:
        queries = queries / divisors(queries)[:, None]
    if len(ids):
        assert_equal_up_to_ties(found, rows, ids, queries)
