"""The scan by codes in C, tier 1."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt
import torch

from twotower.config import Metric
from twotower.retrieval import native
from twotower.retrieval.candidates import Best, Candidates
from twotower.retrieval.certificate import TAIL_ENERGY, Float64Array, Frame
from twotower.retrieval.certified_scan import CodedScan
from twotower.retrieval.codes import huge_pages
from twotower.retrieval.rows import Rows

NATIVE_QUERIES = 512  # queries a call: what a thread keeps of them stays in the cache
MOST_SCRATCH = 1 << 25  # numbers, 128 MB, kept between searches
NOTHING = np.empty(0, np.int32)
HEAD_ROWS = 1 << 18  # from so many rows on heads are worth a phase of their own
ROWS_A_RESULT = 256  # and from so many for each of the k results
REMEMBERED, NEIGHBOURS = 64, 3  # searches of about this k; those with the nearest tails decide
EXPLORE = 32  # one search of so many begins with the heads all the same
WORTH_WHILE = 0.55  # of the panels opened, at most: with more, all at once is faster
KEPT = 1 << 22  # lower bounds and candidates that all threads keep together, at most


class HeadExperience:
    """Whether queries are worth a scan by their heads first, as the searches before tell.

    It depends on the query how many rows its head rules out: on most for a picture among pictures,
    on none for a text, whose tail is longer. Results are the same either way.
    """

    def __init__(self) -> None:
        self._known: dict[int, deque[tuple[float, float]]] = {}
        self._asked = 0

    def ask(self, k: int, tail: float) -> bool:
        """Whether to begin with the heads, for queries whose tails are at most so long."""
        known = list(self._known.get(k.bit_length(), ()))
        self._asked += 1
        if len(known) < NEIGHBOURS or self._asked % EXPLORE == 0:
            return True
        nearest = sorted(known, key=lambda entry: abs(entry[0] - tail))[:NEIGHBOURS]
        return sum(opened for _, opened in nearest) < WORTH_WHILE * NEIGHBOURS

    def learn(self, k: int, tail: float, opened: float) -> None:
        """Note which share of the panels had to be read beyond their heads."""
        self._known.setdefault(k.bit_length(), deque(maxlen=REMEMBERED)).append((tail, opened))


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
        head_rows: int = HEAD_ROWS,
    ) -> None:
        super().__init__(rows, packed=True, tail_energy=tail_energy)
        self._level = native.level() if level is None else level
        self._head_rows = head_rows
        self._scratch: list[npt.NDArray[np.int32]] = []  # of searches that are over
        self._experience = HeadExperience()

    def query_block(self, k: int) -> int:
        """Queries that are best searched at a time."""
        return max(1, min(NATIVE_QUERIES, KEPT // (k * torch.get_num_threads())))

    def _take_scratch(self, count: int) -> npt.NDArray[np.int32]:
        """Memory for what the heads say of `count` queries; that of a search before if it will do.

        Fresh pages for each search would cost as much as a tenth of it.
        """
        store = self.coded.store
        group = native.GROUP_BYTES // (64 * store.width) + 1  # a shard's last one is counted whole
        panels = sum(len(shard.codes) + group for shard in store.shards)
        wanted = min(native.HEAD_NUMBERS * count * panels, MOST_SCRATCH)
        try:
            last = self._scratch.pop()
        except IndexError:  # the first search, or another thread has it
            return huge_pages(4 * wanted).view(np.int32)
        return last if last.size >= wanted else huge_pages(4 * wanted).view(np.int32)

    def search(self, queries: Float64Array, k: int) -> Best:
        """The best k rows of queries (Q, dim), none of them zero, in fp64; k <= rows."""
        coded = self.coded.queries(queries, rotate)
        tail = float(coded.coded.tail_norm.max())
        split = self.coded.store.head < self.coded.store.width
        few = len(queries) <= native.HEAD_QUERIES
        many = self._rows.size >= self._head_rows and self._rows.size >= ROWS_A_RESULT * k
        by_heads = split and few and many and self._experience.ask(k, tail)
        scratch = self._take_scratch(len(queries)) if by_heads else NOTHING
        found = native.search(
            self.coded.store.shards,
            [(part.start, part.rows) for part in self._rows.parts],
            self._rows.ids.array,
            coded,
            k,
            cosine=self._rows.metric is Metric.cosine,
            threads=torch.get_num_threads(),
            level=self._level,
            scratch=scratch,
        )
        if found.opened is not None:
            self._experience.learn(k, tail, found.opened)
            self._scratch = [scratch]
        query = np.repeat(np.arange(len(queries)), k)
        score = found.score.reshape(-1)
        return Best(Candidates(query, found.position.reshape(-1), score, score), score)
