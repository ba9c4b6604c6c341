"""Where the codes of an index lie: shards of about a million rows, which grow as rows are added."""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from twotower.retrieval.index import FloatArray, IdArray
from twotower.retrieval.scan.certificate import CodedRows, Codes

Bytes = npt.NDArray[np.uint8]

PANEL = 64  # rows that the C scan reads together, four dimensions at a time
QUARTER = 16  # rows of a panel whose codes lie together
SHARD_ROWS = 1 << 20
LEAST_ROWS = 1024
HUGE = 1 << 21  # bytes of a huge page on x86-64
DEAD = -np.inf  # an error that no threshold lets through: of deleted rows and unused places


@dataclass
class Shard:
    """Places for rows, of which the first `used` are taken.

    `codes` has the head, and the front and the back of the tail, each (panels, 4, words, 16, 4)
    bytes, 128 above their codes, or (places, width) int8. Where all is head the others are empty.
    """

    first: int
    used: int
    codes: list[npt.NDArray[np.generic]]
    scale: FloatArray
    error: FloatArray
    norm: FloatArray
    tail_norm: FloatArray
    back_norm: FloatArray

    @property
    def places(self) -> int:
        """Rows that it has memory for."""
        return len(self.scale)


class CodeStore:
    """Codes of rows of dimension `dim`, in panels for the C scan or row after row for torch."""

    def __init__(self, dim: int, packed: bool, shard_rows: int = SHARD_ROWS) -> None:
        self.packed = packed
        self.width = -(-dim // 8) * 8  # what an int8 product likes; the rest are zeros
        self.head = self.width  # of which so many dimensions are the head
        self.back = self.width  # and so many come before the tail's back
        self.shards: list[Shard] = []
        self._dim = dim
        self._shard_rows = shard_rows

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, errors and norms."""
        columns = 5 if self.head < self.width else 3
        codes = sum(part.nbytes for shard in self.shards for part in shard.codes)
        return codes + sum(columns * shard.scale.nbytes for shard in self.shards)

    def split(self, head: int, back: int) -> None:
        """Keep the dimensions from `head` on apart, if there are any; the store must be empty."""
        assert not self.shards
        self.head, self.back = (cut if cut < self._dim else self.width for cut in (head, back))

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Where head, front and back begin and end among the dimensions."""
        edges = [0, self.head, self.back, self.width]
        return list(pairwise(edges))

    @property
    def size(self) -> int:
        """Rows that were added, deleted ones with them."""
        return self.shards[-1].first + self.shards[-1].used if self.shards else 0

    def reserve(self, count: int) -> None:
        """Make room for rows to come, in the last shard or a new one, without copying later."""
        last = self.shards[-1] if self.shards else None
        if last is None or last.used == last.places >= self._shard_rows:
            first = last.first + last.used if last else 0
            self.shards.append(self._empty(first, max(count, LEAST_ROWS)))
        elif last.places - last.used < count and last.places < self._shard_rows:
            self._grow(last, max(last.used + count, 2 * last.places))

    def append(self, rows: CodedRows) -> None:
        """Add the codes of rows at the next places."""
        done = 0
        while done < len(rows.scale):
            left = len(rows.scale) - done
            shard = self._last(left)
            take = min(left, shard.places - shard.used)
            self._write(shard, rows.part(done, done + take))
            shard.used += take
            done += take

    def _last(self, count: int) -> Shard:
        """A shard with a free place."""
        if not self.shards or self.shards[-1].used == self.shards[-1].places:
            self.reserve(count)
        return self.shards[-1]

    def _empty(self, first: int, places: int) -> Shard:
        places = min(-(-places // PANEL) * PANEL, -(-self._shard_rows // PANEL) * PANEL)
        codes = [self._codes(places, stop - start) for start, stop in self.parts]
        scale, norm, tail_norm, back_norm = (np.zeros(places, np.float32) for _ in range(4))
        error = np.full(places, DEAD, np.float32)
        return Shard(first, 0, codes, scale, error, norm, tail_norm, back_norm)

    def _codes(self, places: int, width: int) -> npt.NDArray[np.generic]:
        raw = huge_pages(places * width)
        if self.packed:
            return raw.reshape(places // PANEL, PANEL // QUARTER, width // 4, QUARTER, 4)
        return raw.view(np.int8).reshape(places, width)

    def _grow(self, shard: Shard, places: int) -> None:
        """Give a shard at least twice the places."""
        larger = self._empty(shard.first, max(places, 2 * shard.places))
        for old, new in zip(shard.codes, larger.codes, strict=True):
            new[: len(old)] = old
        shard.codes = larger.codes
        for name in CodedRows._fields[1:]:
            column = getattr(shard, name)
            getattr(larger, name)[: len(column)] = column
            setattr(shard, name, getattr(larger, name))

    def _write(self, shard: Shard, rows: CodedRows) -> None:
        start, stop = shard.used, shard.used + len(rows.scale)
        shard.scale[start:stop], shard.norm[start:stop] = rows.scale, rows.norm
        shard.error[start:stop] = rows.error
        if self.head < self.width:
            shard.tail_norm[start:stop] = rows.tail_norm
            shard.back_norm[start:stop] = rows.back_norm
        if not self.packed:
            shard.codes[0][start:stop, : self._dim] = rows.codes
            return
        flipped = np.full((len(rows.scale), self.width), 0x80, np.uint8)
        flipped[:, : self._dim] = rows.codes.view(np.uint8) ^ 0x80
        words = flipped.view(np.uint32)  # four dimensions each
        for panels, (first, last) in zip(shard.codes, self.parts, strict=True):
            if first < last:
                _write_panels(panels, start, words[:, first // 4 : last // 4])

    def delete(self, positions: IdArray) -> None:
        """Let the rows at these positions, counted through all shards, never be found again."""
        for shard in self.shards:
            inside = (positions >= shard.first) & (positions < shard.first + shard.used)
            place = positions[inside] - shard.first
            shard.error[place] = DEAD
            shard.scale[place] = shard.norm[place] = 0
            if self.head < self.width:
                shard.tail_norm[place] = shard.back_norm[place] = 0

    def rows(self, start: int, stop: int) -> CodedRows:
        """The codes at positions start to stop - 1, as they were added."""
        parts = []
        for shard in self.shards:
            low, high = max(start - shard.first, 0), min(stop - shard.first, shard.used)
            if low < high:
                columns = (getattr(shard, name)[low:high] for name in CodedRows._fields[1:])
                parts.append(CodedRows(self._unpacked(shard, low, high), *columns))
        return CodedRows(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _unpacked(self, shard: Shard, low: int, high: int) -> Codes:
        if not self.packed:
            plain: Codes = shard.codes[0][low:high, : self._dim].view(np.int8)
            return plain
        panel, quarter, row = _places(low, high)
        parts = [_as_words(panels)[panel, quarter, :, row] for panels in shard.codes]
        flipped = np.concatenate(parts, axis=1).view(np.uint8)
        codes: Codes = (flipped[:, : self._dim] ^ 0x80).view(np.int8)
        return codes


def _as_words(panels: npt.NDArray[np.generic]) -> npt.NDArray[np.uint32]:
    """Panels (N, 4, words, 16, 4) as numbers of four bytes (N, 4, words, 16)."""
    words: npt.NDArray[np.uint32] = panels.view(np.uint32)[..., 0]
    return words


def _places(low: int, high: int) -> tuple[IdArray, IdArray, IdArray]:
    """Panels, quarters and rows of these of positions low to high - 1."""
    place = np.arange(low, high)
    return place // PANEL, place // QUARTER % (PANEL // QUARTER), place % QUARTER


def _write_panels(
    panels: npt.NDArray[np.generic], start: int, words: npt.NDArray[np.uint32]
) -> None:
    """Put the codes (n, words) of rows into panels (N, 4, words, 16, 4), from row `start` on."""
    places = _as_words(panels)
    head = min(-start % PANEL, len(words))
    even = head + (len(words) - head) // PANEL * PANEL
    for low, high in ((0, head), (even, len(words))):
        panel, quarter, row = _places(start + low, start + high)
        places[panel, quarter, :, row] = words[low:high]
    whole = words[head:even].reshape(-1, PANEL // QUARTER, QUARTER, words.shape[1])
    first = (start + head) // PANEL
    places[first : first + len(whole)] = whole.transpose(0, 1, 3, 2)


def huge_pages(size: int) -> Bytes:
    """Zeroed bytes, on huge pages where the system has them: a scan is up to 1.3 times as fast."""
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.zeros(size, np.uint8)
    # Private: shared memory, which is Python's default, is mostly refused huge pages by the system.
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    everything = np.frombuffer(memory, np.uint8)
    start = -everything.ctypes.data % HUGE
    return everything[start : start + size]
