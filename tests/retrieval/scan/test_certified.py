"""The certified scans: their bounds hold, and every tier finds what brute force in fp64 finds."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.retrieval.reference import assert_equal_up_to_ties, brute_force
from twotower.config import Metric
from twotower.distributed import num_threads
from twotower.retrieval.exact import ExactConfig, ExactIndex, RowMemory
from twotower.retrieval.index import AnyFloatArray, SearchResult, divisors, unit_rows
from twotower.retrieval.rows import Rows
from twotower.retrieval.scan import native, tiers, torch_scan
from twotower.retrieval.scan.certificate import CODED_DIM, CodedRows, Frame
from twotower.retrieval.scan.codes import HUGE, CodeStore, huge_pages
from twotower.retrieval.scan.native import CodedQueries, Scratch, Stage
from twotower.retrieval.scan.native_scan import TILED_QUERIES, NativeScan, StageExperience, rotate
from twotower.retrieval.scan.tiers import Tier
from twotower.retrieval.scan.torch_scan import TorchScan
from twotower.retrieval.synthetic import clip_like
from twotower.settings import ConfigError

KINDS = (
    *("random", "clip", "clustered", "duplicated", "one_hot", "constant", "zero", "denormal"),
    *("tiny", "huge", "integers"),
)
LENGTHS = {"denormal": (-40, -39), "tiny": (-44, 1), "huge": (-10, 36)}
LEVELS = range(native.level() + 1)
TIERS = [
    *(f"native {level}" for level in LEVELS),
    *(f"native {level} {stage}" for level in LEVELS for stage in ("head", "front")),
    f"native {LEVELS[-1]} split",
    *("torch", "torch left", "torch right", "reference"),
]


def rows_of(kind: str, count: int, dim: int, rng: np.random.Generator) -> AnyFloatArray:
    rows = rng.standard_normal((count, dim)).astype(np.float32)
    if kind in LENGTHS:  # by powers of ten
        return rows * np.float32(10) ** rng.integers(*LENGTHS[kind], (count, 1)).astype(np.float32)
    if kind == "clip":
        rows = rows / np.sqrt(np.arange(1, dim + 1, dtype=np.float32)) + 1
    elif kind == "clustered":
        centres = rng.standard_normal((4, dim)).astype(np.float32)
        rows = centres[rng.integers(0, 4, count)] + rows * np.float32(1e-3)
    elif kind == "duplicated":
        rows = rows[rng.integers(0, 5, count) % max(count, 1)]
    elif kind == "one_hot":
        rows = np.zeros((count, dim), np.float32)
        rows[np.arange(count), rng.integers(0, dim, count)] = 1
    elif kind == "constant":
        rows[:] = 0.7
    elif kind == "zero":
        rows[rng.random(count) < 0.7] = 0
    elif kind == "integers":
        rows = rng.integers(-2, 3, (count, dim)).astype(np.float32)
    return rows


def make(tier: str, dim: int, metric: Metric = Metric.cosine, **options: object) -> ExactIndex:
    """An index with the scan of `native <level>` or of another tier.

    With `head` or `front` it reads these parts first, whatever that is worth, and codes have parts
    with `split` too. With `left` or `right` a few queries are on this side of torch's products, of
    small blocks and few queries, and few candidates may wait.
    """
    name, *details = tier.split()
    config = ExactConfig(tier=Tier[name], metric=metric, **options)  # type: ignore[arg-type]
    index = ExactIndex(config, dim)
    if name == "torch" and details:
        left = details == ["left"]
        index._scan = TorchScan(index._rows, left, block_rows=256, product_queries=5, pending=500)
    elif details:
        level, *parts = details
        stage = {"head": Stage.head, "front": Stage.front, "split": Stage.all}
        index._scan = (
            Staged(index._rows, int(level), stage[parts[0]])
            if parts
            else NativeScan(index._rows, int(level))
        )
    return index


class Staged(NativeScan):
    """Reads some parts before others at any number of rows, a few groups of panels at a time."""

    def __init__(self, rows: Rows, level: int, stage: Stage) -> None:
        super().__init__(rows, level, tail_energy=1.0, staged_rows=0)
        self._experience = Settled(stage)

    def _may_stage(self, count: int, k: int) -> bool:
        return self.coded.store.head < self.coded.store.width

    def _take_scratch(self, count: int) -> Scratch:
        return Scratch.of(count, panels=5)


class Settled(StageExperience):
    """Always the same, whatever it took."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def ask(self, count: int, k: int, tail: float) -> Stage:
        return self.stage


def assert_same(one: SearchResult, other: SearchResult) -> None:
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.scores, other.scores)


class Case(NamedTuple):
    rows: AnyFloatArray
    queries: AnyFloatArray
    k: int
    metric: Metric
    seed: int


@st.composite
def searches(draw: st.DrawFn, largest: int = 3000) -> Case:
    """A search; the work of brute force is bounded."""
    dim = draw(st.sampled_from([1, 2, 3, 7, 8, 32, 63, 64, 65, 100, 512, 1000, 4096]))
    count = draw(st.sampled_from([1, 2, 63, 64, 65, 200, 1023, 1025, largest]))
    count = min(count, 4_000_000 // dim)
    most = max(1, min(300, 40_000_000 // (count * dim)))
    num_queries = draw(st.sampled_from([0, 1, 2, 6, 7, 13, 33, 300]))
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    rows = rows_of(draw(st.sampled_from(KINDS)), count, dim, rng)
    queries = rows_of(draw(st.sampled_from(KINDS)), min(num_queries, most), dim, rng)
    if draw(st.booleans()) and len(queries):
        queries[::2] = rows[rng.integers(0, count, len(queries[::2]))]
    k = draw(st.sampled_from([1, 2, 10, 100, count // 5 or 1, count]))
    return Case(rows, queries, min(k, count), draw(st.sampled_from(list(Metric))), seed)


def thorough(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


@thorough(25)
@given(searches())
def test_every_tier_finds_what_brute_force_finds(case: Case) -> None:
    check_every_tier(case)


@pytest.mark.slow
@thorough(200)
@given(searches(largest=20_000))
def test_every_tier_finds_what_brute_force_finds_among_many(case: Case) -> None:
    check_every_tier(case)


def check_every_tier(case: Case) -> None:
    """Before and after rows are deleted, and once they are back, with several threads."""
    rows, queries, k, metric, seed = case
    rng = np.random.default_rng(seed)
    count, dim = rows.shape
    ids = rng.permutation(3 * count)[:count]
    gone = np.unique(rng.integers(0, count, count // 3))
    kept, asked = rows, queries
    if metric is Metric.cosine:
        kept = unit_rows(rows)
        asked = queries / divisors(queries)[:, None]  # fp64
    alive = np.setdiff1d(np.arange(count), gone)
    order = np.concatenate([alive, gone])
    first: list[SearchResult] = []
    for number, tier in enumerate(TIERS):
        index = make(tier, dim, metric)
        cut = int(rng.integers(0, count + 1))
        index.add(rows[:cut], ids[:cut])
        index.search(queries[:1], 1)
        index.add(rows[cut:], ids[cut:])
        with num_threads(1 + number % 3):
            before = index.search(queries, k)
            index.delete(ids[gone])
            after = index.search(queries, min(k, max(len(alive), 1)))
            index.add(rows[gone], ids[gone])
            again = index.search(queries, k)
        if not first:
            assert_equal_up_to_ties(before, kept, ids, asked)
            if len(alive):
                assert_equal_up_to_ties(after, kept[alive], ids[alive], asked)
            assert_equal_up_to_ties(again, kept[order], ids[order], asked)
            first = [before, after, again]
        for found, want in zip((before, after, again), first, strict=True):
            assert_same(found, want)


@pytest.mark.parametrize("tier", ["native 0", "torch", "reference"])
def test_scores_below_the_range_of_fp32_stand_in_order(tier: str) -> None:
    rows = rows_of("clustered", 20_000, 1, np.random.default_rng(1))
    index = make(tier, 1, Metric.ip)
    index.add(rows)
    for k in (20_000, 5000):  # of all rows, and by the scan
        scores = index.search(np.full((1, 1), -2.001e-41, np.float32), k).scores[0]
        assert (scores[1:] <= scores[:-1]).all()


@pytest.mark.parametrize("tier", TIERS)
def test_products_of_large_rows_stay_within_fp32(tier: str) -> None:
    rng = np.random.default_rng(0)
    for length in (35.3, 35.9):  # by powers of ten
        rows = (rng.standard_normal((4000, 64)) * 10**length).astype(np.float32)
        queries = rows[:8].copy()
        queries[0] /= 10**length
        found = []
        for each in (tier, "reference"):
            index = make(each, 64, Metric.ip)
            index.add(rows)
            found.append([index.search(queries, k) for k in (1, 5)])
        for one, other in zip(*found, strict=True):
            assert_same(one, other)


def asked_of(
    index: ExactIndex, queries: AnyFloatArray
) -> tuple[TorchScan, CodedQueries, torch_scan._Asked]:
    """Torch's scan of an index, and what it keeps of queries."""
    scan = index._scan
    assert isinstance(scan, TorchScan)
    coded = scan.coded.queries(queries.astype(np.float64), torch_scan.rotate)
    return scan, coded, torch_scan._Asked(coded, np.arange(len(queries)), 10, left=False)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_lets_every_row_through_that_reaches_the_threshold(kind: str) -> None:
    rng = np.random.default_rng(2)
    rows, queries = rows_of(kind, 600, 48, rng), rows_of("clip", 20, 48, rng)
    index = make("torch", 48, Metric.ip)
    for start, stop in ((0, 250), (250, 251), (251, 600)):  # some groups have several scales
        index.add(rows[start:stop])
    index.delete(np.arange(3, 600, 7))
    scan, coded, asked = asked_of(index, queries)
    (shard,) = scan.coded.store.shards
    (block,) = scan._blocks(shard, [asked])
    products = torch.from_numpy(shard.codes[0][:640].astype(np.int64) @ coded.coded.codes.T)
    scale, error, norm = (
        torch.from_numpy(column[:640]) for column in (shard.scale, shard.error, shard.norm)
    )
    for row in np.setdiff1d(np.arange(600), np.arange(3, 600, 7)):
        middle = products[row].int() * asked._scale * scale[row]
        asked._set_threshold(middle + (norm[row] * asked._error + error[row]))
        assert (products[row] >= asked._limit(block)[row // block.per_group]).all()


@pytest.mark.parametrize("count", [1, 17, 50, 300, 512])
def test_torch_compares_the_best_of_64_rows_at_any_number_of_queries(count: int) -> None:
    index = make("torch", 8)
    rows = np.random.default_rng(0).standard_normal((100_000, 8)).astype(np.float32)
    index.add(rows)
    index.delete(np.arange(0, 100_000, 5))
    scan, _, asked = asked_of(index, rows[:count])
    asked._set_threshold(torch.zeros(count))
    blocks = list(scan._blocks(scan.coded.store.shards[0], [asked]))
    assert {block.per_group for block in blocks} == {64}
    # A group whose rows are of one scale is known to be, whatever was deleted of it.
    assert all(torch.equal(block.least_scale, block.most_scale) for block in blocks[:-1])


def test_an_index_may_be_searched_in_another_process(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, queries = rng.standard_normal((2, 500, 64)).astype(np.float32)
    index = ExactIndex(ExactConfig(), 64)
    index.add(rows)
    (tmp_path / "index").write_bytes(pickle.dumps((index, queries)))
    code = (
        "import pickle, sys; index, queries = pickle.load(open(sys.argv[1], 'rb'));"
        "print(index.search(queries, 3).ids.tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "index")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(index.search(queries, 3).ids.tolist())


def test_vectors_that_are_too_long_for_codes_are_searched_without_them() -> None:
    rows = np.random.default_rng(0).standard_normal((9, CODED_DIM + 1)).astype(np.float32)
    index = ExactIndex(ExactConfig(), CODED_DIM + 1)
    index.add(rows)
    assert index._scan is None
    np.testing.assert_array_equal(index.search(rows, 1).ids[:, 0], np.arange(9))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", ["clip", "duplicated", "integers", "constant"])
def test_threads_batches_and_room_change_nothing(kind: str, tier: str) -> None:
    rng = np.random.default_rng(1)
    rows, queries = rows_of(kind, 2500, 40, rng), rows_of(kind, 9, 40, rng)
    index = make(tier, 40)
    index.add(rows)
    if len(tier.split()) == 3:
        assert index._scan is not None
        assert index._scan.coded.store.parts[0] == (0, 16)
        assert index._scan._may_stage(9, 15)
    want = brute_force(unit_rows(rows), np.arange(2500), queries, 15, Metric.cosine)
    for count in (1, 2, 5):
        with num_threads(count):
            assert_same(index.search(queries, 15), want)
            single = [index.search(query[None], 15) for query in queries]
            assert_same(SearchResult(*map(np.concatenate, zip(*single, strict=True))), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "split"), [(1, 0), (5, 0), (64, 0), (64, 1), (300, 1), (700, 0)])
@pytest.mark.parametrize("together", [1, 64])
def test_the_bounds_hold(kind: str, dim: int, split: int, together: int) -> None:
    rng = np.random.default_rng(dim)
    rows = rows_of(kind, 300, dim, rng)
    queries = unit_rows(rows_of("random", 20, dim, rng)).astype(np.float64)
    frame = Frame.of(np.tile(rows, (4, 1)) if split else rows[:50], tail_energy=split or None)
    head, back = frame.head, frame.back
    assert head == (16 if split else dim)
    assert 32 <= back <= dim if split else back == dim
    parts = [coded for _, coded in frame.code_rows(rows, together, first=5 % together)]
    coded = CodedRows(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    asked = frame.code_rotated(frame.rotate(queries))
    # As scan.c computes it, in fp32.
    codes, others = asked.codes.astype(np.int64), coded.codes.astype(np.int64)
    factor = 4 if head < dim else 1
    says = factor * (codes[:, :head] @ others[:, :head].T)
    middle = says.astype(np.float32) * asked.scale[:, None] * coded.scale
    width = asked.error[:, None] * coded.norm + coded.error
    outside = width + asked.tail_norm[:, None] * coded.tail_norm
    stages = [(middle, outside)]
    both = says + codes[:, head:back] @ others[:, head:back].T
    middle = both.astype(np.float32) * asked.scale[:, None] * coded.scale
    stages.append((middle, width + asked.back_norm[:, None] * coded.back_norm))
    both = says + codes[:, head:] @ others[:, head:].T
    middle = both.astype(np.float32) * asked.scale[:, None] * coded.scale
    true = queries @ rows.astype(np.float64).T
    centred = true - (queries @ frame.centre)[:, None]
    length = np.linalg.norm(rows.astype(np.float64), axis=1)
    ties = 2.0**-23 * np.abs(true) + 1e-15 * (length + np.linalg.norm(frame.centre))
    assert (centred + ties <= (middle + width)).all()
    assert (centred - ties >= (middle - width)).all()
    for middle_so_far, outside in stages:
        assert (centred <= middle_so_far + outside).all()
        assert (centred >= middle_so_far - outside).all()
    assert np.isfinite(middle + width).all()
    if together > 1:  # 59 rows, and then as many as share a scale
        assert len(np.unique(coded.scale[:59])) == len(np.unique(coded.scale[59:123])) == 1
    if kind in ("random", "clip") and dim >= 64:
        moved = np.linalg.norm(rows - frame.centre, axis=1)
        most = moved if together == 1 else moved.max()
        assert (coded.error < 0.02 * most).all()  # and are tight enough to be of use


@pytest.mark.parametrize(
    ("packed", "head", "back"), [(True, 13, 13), (True, 8, 13), (True, 4, 8), (False, 13, 13)]
)
def test_codes_are_read_as_they_were_written(packed: bool, head: int, back: int) -> None:
    rng = np.random.default_rng(0)
    store = CodeStore(13, packed, shard_rows=192)
    store.split(head, back)
    parts = []
    for count in (1, 5, 63, 64, 200, 0, 1, 900):
        columns = [rng.random(count).astype(np.float32) for _ in range(5)]
        if head == 13:
            columns[3][:] = columns[4][:] = 0
        codes = rng.integers(-127, 128, (count, 13)).astype(np.int8)
        parts.append(CodedRows(codes, *columns))
        store.append(parts[-1])
    every = CodedRows(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    for start, stop in ((0, 1234), (60, 70), (191, 193), (500, 501)):
        for one, other in zip(store.rows(start, stop), every, strict=True):
            np.testing.assert_array_equal(one, other[start:stop])
    assert [shard.used for shard in store.shards] == [192] * 6 + [82]


@pytest.mark.parametrize("memory", list(RowMemory))
def test_memory_is_what_is_asked_for(memory: RowMemory) -> None:
    rng = np.random.default_rng(0)
    rows = unit_rows(rng.standard_normal((4096, 64)).astype(np.float32)).astype(np.float16)
    index = make("native 0", 64, memory=memory)
    index.add(rows, normalized=True)
    bytes_a_value = 4 if memory is RowMemory.fp32 else 2
    # Values, an fp64 norm, an int64 id; a code a value, and three fp32 numbers: there is no tail.
    assert index.nbytes == 4096 * (64 * bytes_a_value + 8 + 8 + 64 + 3 * 4)
    queries = rng.standard_normal((9, 64)).astype(np.float32)
    want = brute_force(rows, np.arange(4096), queries, 20, Metric.cosine)
    assert_same(index.search(queries, 20), want)


@pytest.mark.parametrize("memory", list(RowMemory))
@pytest.mark.parametrize("tier", [f"native {LEVELS[-1]} split", "torch", "reference"])
def test_a_loaded_index_has_the_codes_that_were_written(
    tier: str, memory: RowMemory, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    rows, queries = rng.standard_normal((2, 700, 40)).astype(np.float32)
    index = make(tier, 40, memory=memory)
    index.add(rows[:600])
    index.delete(np.arange(3, 500, 7))
    index.write(tmp_path / "index")
    # A scan that has no use for the codes that are there, or finds none, makes its own.
    loaded, *others = (make(each, 40, memory=memory) for each in (tier, *TIERS[-6:]))
    for each in (loaded, *others):
        each.read(tmp_path / "index")
    mapped = [isinstance(part.rows, np.memmap) for part in loaded._rows.parts]
    assert mapped == [memory is RowMemory.stored]
    for each in (loaded, *others):
        assert len(each) == len(index)
        assert_same(each.search(queries[:40], 20), index.search(queries[:40], 20))
    if loaded._scan and index._scan:
        alive = index._rows.ids.array >= 0
        written = index._scan.coded.arrays(alive)
        for name, column in loaded._scan.coded.arrays(alive[alive]).items():
            parts, kept = (np.concatenate(list(each.parts)) for each in (column, written[name]))
            np.testing.assert_array_equal(parts, kept)
        loaded.add(rows[600:])
        index.add(rows[600:], np.arange(600, 700))
        assert_same(loaded.search(queries[:9], 5), index.search(queries[:9], 5))


def test_codes_lie_in_private_memory_where_the_system_gives_huge_pages() -> None:
    size = 8 * HUGE
    before = resident()
    memory = huge_pages(size)
    memory[:] = 1
    after = resident()
    assert memory.ctypes.data % HUGE == 0
    assert after["RssAnon"] - before["RssAnon"] > size // 2
    assert after["RssShmem"] == before["RssShmem"]


def resident() -> dict[str, int]:
    """The bytes in memory of this process, by their kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.startswith("Rss"))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in fields}


def test_an_interrupted_add_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((5000, 8)).astype(np.float32)
    index = make("native 0", 8)
    index.add(rows[:10])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CodeStore, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index.add(rows)
    index.add(rows[:10])
    for use in (lambda: index.search(rows[:1], 1), lambda: index.write(tmp_path / "index")):
        with pytest.raises(ConfigError, match="was interrupted; build it again"):
            use()


def test_an_emptied_index_is_saved_and_its_ids_are_not_given_again(tmp_path: Path) -> None:
    index = make("native 0", 8)
    index.add(np.eye(8, dtype=np.float32))
    index.delete(np.arange(8))
    for name in ("one", "two"):
        index.write(tmp_path / name)
        index = make("native 0", 8)
        index.read(tmp_path / name)
        assert len(index) == 0
    index.add(np.eye(8, dtype=np.float32)[:1])
    assert index.search(np.eye(8, dtype=np.float32)[:1], 1).ids.tolist() == [[8]]


def test_a_library_of_other_structures_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    native.library.cache_clear()
    monkeypatch.setattr(native, "_Shard", native._Part)
    assert native.library() is None
    monkeypatch.undo()
    native.library.cache_clear()
    assert native.library() is not None


def searched_at_once(rows: AnyFloatArray, count: int, k: int, *threads: int) -> list[native.Found]:
    """What the C scan finds, and at what cost, for the first rows as queries."""
    index = make(f"native {native.level()}", rows.shape[1])
    index.add(rows)
    scan = index._scan
    assert isinstance(scan, NativeScan)
    coded = scan.coded.queries(unit_rows(rows[:count]).astype(np.float64), rotate)
    parts = [(part.start, part.rows) for part in index._rows.parts]
    arguments = (scan.coded.store.shards, parts, index._rows.ids.array, coded, k)
    options = {"cosine": True, "level": native.level(), "stage": Stage.all}
    nothing = Scratch.of(0, 0)
    return [native.search(*arguments, **options, threads=n, scratch=nothing) for n in threads]


def test_few_rows_are_scored_exactly() -> None:
    (found,) = searched_at_once(rows_of("clip", 20_000, 64, np.random.default_rng(0)), 50, 10, 1)
    assert 10 <= found.reranked / 50 < 100
    assert found.collected / 50 < 1500


def test_threads_look_at_no_more_rows_than_one() -> None:
    one, eight = searched_at_once(clip_like(60_000, 256), 128, 50, 1, 8)
    assert eight.collected < 1.2 * one.collected


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize(("stage", "most"), [("head", 0.65), ("front", 0.9)])
def test_a_search_in_stages_reads_few_of_the_codes(
    stage: str, most: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    spectrum = 1 / np.arange(1, 65, dtype=np.float32)
    centres = rng.standard_normal((400, 64)).astype(np.float32) * spectrum
    noise = rng.standard_normal((20_000, 64)).astype(np.float32) * spectrum
    rows = unit_rows(centres[rng.integers(0, 400, 20_000)] + 0.3 * noise)
    index = make(f"native {native.level()} {stage}", 64)
    index.add(rows)
    scan = index._scan
    assert isinstance(scan, NativeScan)
    assert scan.coded.store.parts == [(0, 16), (16, 32), (32, 64)]
    seen: list[float | None] = []
    search = native.search

    def watched(*arguments: Any, **options: Any) -> native.Found:
        found = search(*arguments, **options)
        seen.append(found.read)
        return found

    monkeypatch.setattr(native, "search", watched)
    found = index.search(rows[:count], 10)
    assert_same(found, brute_force(rows, np.arange(20_000), rows[:count], 10, Metric.cosine))
    assert len(seen) == 1
    assert seen[0] is not None
    assert 0.25 < seen[0] < most


def test_amx_multiplies_many_queries_without_stages() -> None:
    rows = rows_of("clip", 3000, 64, np.random.default_rng(0))
    index = make("native 0", 64)
    for level, most in ((native.AMX - 1, 100), (native.AMX, TILED_QUERIES - 1)):
        scan = NativeScan(index._rows, level, tail_energy=1.0, staged_rows=0)
        index._scan = scan
        index.add(rows)
        assert scan._may_stage(most, 10)
        assert scan._may_stage(most + 1, 10) == (level < native.AMX)


def test_memory_of_searches_before_will_do_for_any_number_of_queries() -> None:
    rng = np.random.default_rng(0)
    rows, queries = rows_of("clip", 3000, 64, rng), rows_of("clip", 40, 64, rng)
    index = make("native 0", 64)
    scan = NativeScan(index._rows, native.level(), tail_energy=1.0, staged_rows=0)
    index._scan = scan
    index.add(rows)
    want = brute_force(unit_rows(rows), np.arange(3000), queries, 10, Metric.cosine)
    for stage in (Stage.head, Stage.front):
        scan._experience = Settled(stage)
        for count in (1, 7, 1, 20, 2, 1, 40):
            assert_same(index.search(queries[:count], 10), SearchResult(*(a[:count] for a in want)))
    kept = {single: scratch.peaks.ctypes.data for single, scratch in scan._scratch.items()}
    for count in (1, 7, 1):
        index.search(queries[:count], 10)
    assert {single: each.peaks.ctypes.data for single, each in scan._scratch.items()} == kept
    assert set(kept) == {True, False}
    index.add(rows_of("clip", 9000, 64, rng))  # it is too small now
    single = index.search(queries[:1], 10)
    scan._experience = Settled(Stage.all)
    assert_same(index.search(queries[:1], 10), single)
    with ThreadPoolExecutor(4) as pool:
        scan._experience = Settled(Stage.head)
        batches = [queries[start : start + 1 + start % 3] for start in range(36)]
        found = list(pool.map(lambda batch: index.search(batch, 10), batches))
    scan._experience = Settled(Stage.all)
    for batch, each in zip(batches, found, strict=True):
        assert_same(each, index.search(batch, 10))


def test_what_was_fastest_for_searches_like_it_is_done_again() -> None:
    experience = StageExperience()
    seconds = {Stage.head: (0.1, 0.9), Stage.front: (0.3, 0.8), Stage.all: (0.5, 0.5)}
    tried = []
    for tail in (0.2, 0.5):
        for _ in range(9):
            stage = experience.ask(1, 10, tail)
            experience.learn(1, 10, tail, stage, seconds[stage][tail == 0.5])
            tried.append(stage)
    assert {stage: tried[:9].count(stage) for stage in Stage} == dict.fromkeys(Stage, 3)
    for stage in Stage:
        for _ in range(3):
            experience.learn(1, 10, 0.5, stage, seconds[stage][1])
    assert experience.ask(1, 10, 0.21) is Stage.head
    asked = [experience.ask(1, 10, 0.49) for _ in range(768)]
    assert 755 <= asked.count(Stage.all) < 768  # now and then it looks whether that has changed
    assert set(asked) == set(Stage) == set(asked[:32])
    for _ in range(3):
        experience.learn(1, 10, 0.5, Stage.front, 0.6)  # not much slower: oftener
    asked = [experience.ask(1, 10, 0.49) for _ in range(768)]
    assert 8 <= asked.count(Stage.front) <= 10 and asked.count(Stage.head) <= 2
    assert experience.ask(1, 100, 0.49) is Stage.head  # of which nothing is known
    assert experience.ask(2, 10, 0.49) is Stage.head


def test_a_way_that_was_disturbed_is_tried_again_soon() -> None:
    experience = StageExperience()
    seconds = {Stage.head: 0.4, Stage.front: 0.3, Stage.all: 0.1}
    tried = []
    for search in range(95):
        stage = experience.ask(1, 10, 0.2)
        disturbed = search < 9 and stage is Stage.all
        experience.learn(1, 10, 0.2, stage, 2.0 if disturbed else seconds[stage])
        tried.append(stage)
    assert set(tried[20:31]) == {Stage.front} and set(tried[70:]) == {Stage.all}


@pytest.mark.parametrize("dims", [(1,), (7, 6), (64,), (33, 40)])
def test_queries_are_rotated_as_rows_are(dims: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    blocks = [rng.standard_normal((dim, dim)).astype(np.float32) for dim in dims]
    frame = Frame.of_parts(
        np.zeros(sum(dims), np.float32), rng.permutation(sum(dims)), blocks, 1, 1
    )
    for count in (1, 4, 6, 70):
        queries = rng.standard_normal((count, sum(dims)))
        for how in (rotate, torch_scan.rotate):
            np.testing.assert_allclose(how(queries, frame), frame.rotate(queries), atol=1e-12)


def test_a_missing_library_means_another_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiers.choose_tier(Tier.auto) is Tier.native
    assert tiers.describe().startswith(f"tier 1, C: {native.level_name(native.level())}")
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(torch_scan, "probe", lambda: torch_scan.Probe(True, True))
    assert tiers.choose_tier(Tier.auto) is Tier.torch
    assert tiers.describe().startswith("tier 2, int8 in torch; the C extension was not built")
    rows = rows_of("random", 300, 8, np.random.default_rng(0))
    index = ExactIndex(ExactConfig(), 8)
    index.add(rows)
    assert index.search(rows, 1).ids[:, 0].tolist() == list(range(300))
    monkeypatch.setattr(torch_scan, "probe", lambda: torch_scan.Probe(False, False))
    assert tiers.choose_tier(Tier.auto) is Tier.reference
    assert tiers.describe().startswith("tier 3, fp32 in torch; the C extension was not built")
    assert make("auto", 8)._scan is None
    with pytest.raises(ConfigError, match="index.tier=torch does not run here.*index.tier=auto"):
        ExactIndex(ExactConfig(tier=Tier.torch), 8)
    with pytest.raises(ConfigError, match="index.tier=native does not run here.*index.tier=auto"):
        ExactIndex(ExactConfig(tier=Tier.native), 8)
