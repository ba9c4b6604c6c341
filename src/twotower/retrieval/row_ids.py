"""The ids of an index's rows, in the order of adding."""

from __future__ import annotations

import numpy as np

from twotower.retrieval.index import NO_ID, IdArray
from twotower.settings import ConfigError


class RowIds:
    """The ids of an index's rows in the order of adding: unique, not negative, never changed.

    The place of a deleted row holds a negative number.
    """

    def __init__(self) -> None:
        self._parts: list[IdArray] = []
        self._next = 0
        self._size = 0
        self._order: IdArray | None = None  # places by id, until there are others
        self._deleted: IdArray = np.empty(0, np.int64)  # places, ascending

    @property
    def next(self) -> int:
        """What the next row is called, if nothing else is asked for."""
        return self._next

    @property
    def alive(self) -> int:
        """How many there are."""
        return self._size - len(self._deleted)

    def offer(self, count: int, ids: IdArray | None) -> IdArray:
        """`count` ids that may be taken, by default the next ones; none is taken yet.

        Raises:
            ConfigError: there are not `count` of them, or one is negative or taken.
        """
        if ids is None:
            return np.arange(self._next, self._next + count, dtype=np.int64)
        new = np.array(ids, dtype=np.int64)
        if new.shape != (count,):
            raise ConfigError(f"{count} rows cannot have ids of shape {new.shape}")
        self._check(new)
        return new

    def extend(self, count: int, ids: IdArray | None) -> IdArray:
        """Take `count` more ids, by default the next ones, and return them; see `offer`."""
        new = self.offer(count, ids)
        if count:
            self._parts.append(new)
            self._next = max(self._next, int(new.max()) + 1)
            self._size += count
            self._order = None
        return new

    def restore(self, array: IdArray, next_id: int) -> None:
        """Take over what `array` and `next` gave; there must be no ids yet."""
        self._deleted = np.flatnonzero(array < 0)
        array[self._deleted] = NO_ID - 1 - self._deleted
        self._parts, self._size = [array], len(array)
        self._next = next_id

    def places(self, ids: IdArray) -> IdArray:
        """The places (N,) of ids (N,); -1 for one that is not there."""
        known = self.array
        if self._order is None:
            self._order = np.argsort(known, kind="stable")
        if not len(known):
            return np.full(len(ids), -1)
        place = np.searchsorted(known, ids, sorter=self._order)
        found = self._order[np.minimum(place, len(known) - 1)]
        places: IdArray = np.where((known[found] == ids) & (ids >= 0), found, -1)
        return places

    def check(self, ids: IdArray) -> IdArray:
        """The places of ids that are to be deleted.

        Raises:
            ConfigError: one is not there, or stands there twice.
        """
        ids = np.asarray(ids, np.int64).reshape(-1)
        places = self.places(ids)
        if (places < 0).any():
            raise ConfigError(f"row id {ids[places.argmin()]} is not in the index")
        values, counts = np.unique(ids, return_counts=True)
        if len(values) < len(ids):
            raise ConfigError(f"row id {values[counts.argmax()]} cannot be deleted twice")
        return places

    def delete(self, ids: IdArray) -> IdArray:
        """Forget ids, and return their places.

        Raises:
            ConfigError: one is not there, or stands there twice.
        """
        places = self.check(ids)
        if len(places):
            array = self.array.copy()  # a search may hold the other
            array[places] = NO_ID - 1 - places
            self._parts, self._order = [array], None
            self._deleted = np.union1d(self._deleted, places)
        return places

    def deleted(self, start: int, stop: int) -> IdArray:
        """The places of deleted rows from start to stop - 1, counted from start."""
        low, high = np.searchsorted(self._deleted, (start, stop))
        return self._deleted[low:high] - start

    def _check(self, new: IdArray) -> None:
        if not len(new):
            return
        if new.min() < 0:
            raise ConfigError(f"row ids must not be negative, but one is {new.min()}")
        if new[0] >= self._next and bool((np.diff(new) > 0).all()):
            return  # ascending beyond the known ones, as a store's shards are: nothing to compare
        values, counts = np.unique(np.concatenate([self.array, new]), return_counts=True)
        if counts.max() > 1:
            raise ConfigError(f"row id {values[counts.argmax()]} is taken already; ids are unique")

    @property
    def array(self) -> IdArray:
        """All ids (N,) int64, in the order of adding."""
        if len(self._parts) != 1:
            joined = np.concatenate(self._parts) if self._parts else np.empty(0, np.int64)
            self._parts = [joined]
        return self._parts[0]
