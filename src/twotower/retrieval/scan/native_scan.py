"""The scan by codes in C, tier 1."""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque

import numpy as np
import torch

from twotower.config import Metric
from twotower.retrieval.index import Float64Array
from twotower.retrieval.rows import Rows
from twotower.retrieval.scan import native
from twotower.retrieval.scan.candidates import Best, Candidates
from twotower.retrieval.scan.certificate import TAIL_ENERGY, Frame
from twotower.retrieval.scan.certified_scan import CodedScan
from twotower.retrieval.scan.codes import PANEL
from twotower.retrieval.scan.native import PEAKS, Scratch, Stage

NATIVE_QUERIES = 512  # queries a call: what a thread keeps of them stays in the cache
MOST_SCRATCH = 1 << 25  # numbers, 128 MB, kept between searches
NOTHING = Scratch.of(0, 0)
STAGED_ROWS = 1 << 18  # from so many rows on stages are worth a phase of their own
ROWS_A_RESULT = 256  # and from so many for each of the k results
TILED_QUERIES = 32  # from so many on AMX reads all codes in less time than stages take
MOST_RESULTS = 1 << 17  # of all queries, for each of which two rows are scored first
REMEMBERED, NEIGHBOURS = 64, 3  # searches of about this size; those with the nearest tails decide
EXPLORE = 32  # one search of so many tries the ways in turn
SLOWER, SELDOM = 1.5, 8  # a way so many times as slow as the best in one turn of so many only
RETRY = 16  # and after so many searches, twice as many, and so on: what disturbed it may be over
KEPT = 1 << 22  # lower bounds and candidates that all threads keep together, at most


class StageExperience:
    """Which part of the codes is best read first, as the searches before tell by their time.

    It depends on the query how many rows its head rules out: most for a picture among pictures,
    none for a text, whose tail is longer. And on the machine, on k and on the number of queries.
    Results are the same either way.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, Stage], deque[tuple[float, float]]] = {}
        self._asked: Counter[tuple[int, int]] = Counter()

    def ask(self, count: int, k: int, tail: float) -> Stage:
        """What to read first for `count` queries whose tails are about so long."""
        known = {stage: self._searches(count, k, stage) for stage in Stage}
        size = (count.bit_length(), k.bit_length())
        self._asked[size] += 1
        rarest = min(Stage, key=lambda stage: len(known[stage]))
        if len(known[rarest]) < NEIGHBOURS:
            return rarest
        times = {stage: self._time(known[stage], tail) for stage in Stage}
        best = min(Stage, key=lambda stage: times[stage])
        asked = self._asked[size]
        beyond = asked - (1 << asked.bit_length() - 1)  # the largest power of two
        if asked >= RETRY and beyond < len(Stage):
            return list(Stage)[beyond]
        turn, searches = divmod(asked, EXPLORE)
        other = list(Stage)[turn % len(Stage)]
        worth = times[other] < SLOWER * times[best] or turn // len(Stage) % SELDOM == 1
        return other if worth and searches == 0 else best

    def _searches(self, count: int, k: int, stage: Stage) -> deque[tuple[float, float]]:
        key = (count.bit_length(), k.bit_length(), stage)
        return self._known.setdefault(key, deque(maxlen=REMEMBERED))

    @staticmethod
    def _time(known: deque[tuple[float, float]], tail: float) -> float:
        """The median of those searches whose tails were most alike, the last ones of equals."""
        nearest = sorted(reversed(known), key=lambda entry: abs(entry[0] - tail))[:NEIGHBOURS]
        return statistics.median(seconds for _, seconds in nearest)

    def learn(self, count: int, k: int, tail: float, stage: Stage, seconds: float) -> None:
        """Note how long a query took."""
        self._searches(count, k, stage).append((tail, seconds / count))


def rotate(unit: Float64Array, frame: Frame) -> Float64Array:
    """What `Frame.rotate` does."""
    return native.turn(unit[:, frame.order], frame.columns, torch.get_num_threads())


class NativeScan(CodedScan):
    """The scan of scan.c."""

    def __init__(
        self,
        rows: Rows,
        level: int | None = None,
        tail_energy: float | None = TAIL_ENERGY,
        staged_rows: int = STAGED_ROWS,
    ) -> None:
        super().__init__(rows, packed=True, tail_energy=tail_energy)
        self._asked_level = level
        self._staged_rows = staged_rows
        self._scratch: dict[bool, Scratch] = {}  # of the last searches of one query, and of several
        self._experience = StageExperience()

    @property
    def _level(self) -> int:
        """That of the process that searches: AMX has to be asked for in each, and so it is here."""
        return native.level() if self._asked_level is None else self._asked_level

    def query_block(self, k: int) -> int:
        """Queries that are best searched at a time."""
        return max(1, min(NATIVE_QUERIES, KEPT // (k * torch.get_num_threads())))

    def _take_scratch(self, count: int) -> Scratch:
        """Memory for the stages of `count` queries; that of a search before if it will do.

        Fresh pages for each search would cost as much as a tenth of it.
        """
        store = self.coded.store
        # A shard's last group counts as a whole one.
        group = native.STREAM_BYTES // (PANEL * store.head) + 1
        panels = sum(shard.places // PANEL + group for shard in store.shards)
        panels = min(panels, MOST_SCRATCH // (PEAKS * count + PANEL * (count == 1)))
        last = self._scratch.pop(count == 1, None)  # unless another thread has it
        if last is not None and last.peaks.size >= PEAKS * count * panels:
            return last
        return Scratch.of(count, panels)

    def _may_stage(self, count: int, k: int) -> bool:
        """Whether there are a tail, and rows enough."""
        store, rows = self.coded.store, self._rows.size
        few = count * k <= MOST_RESULTS
        few &= self._level < native.AMX or count < TILED_QUERIES
        return (
            store.head < store.width and few and rows >= max(self._staged_rows, ROWS_A_RESULT * k)
        )

    def search(self, queries: Float64Array, k: int) -> Best:
        """The best k rows of queries (Q, dim), none of them zero, in fp64; k <= rows."""
        started = time.perf_counter()
        coded = self.coded.queries(queries, rotate)
        tail = float(coded.coded.tail_norm.mean())
        choice = self._may_stage(len(queries), k)
        stage = self._experience.ask(len(queries), k, tail) if choice else Stage.all
        scratch = NOTHING if stage is Stage.all else self._take_scratch(len(queries))
        found = native.search(
            self.coded.store.shards,
            [(part.start, part.rows) for part in self._rows.parts],
            self._rows.ids.array,
            coded,
            k,
            cosine=self._rows.metric is Metric.cosine,
            threads=torch.get_num_threads(),
            level=self._level,
            stage=stage,
            scratch=scratch,
        )
        if choice:
            seconds = time.perf_counter() - started
            self._experience.learn(len(queries), k, tail, stage, seconds)
        if scratch is not NOTHING:
            self._scratch[len(queries) == 1] = scratch
        query = np.repeat(np.arange(len(queries)), k)
        score = found.score.reshape(-1)
        return Best(Candidates(query, found.position.reshape(-1), score, score), score)
