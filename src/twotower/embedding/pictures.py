"""Pictures on their way to the tower: read, transformed, in batches whose places never shift."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from twotower.data.images import UnreadableImage, stack_pictures, transformed
from twotower.data.pairs import PairTable
from twotower.data.places import read_place, state_of
from twotower.data.workers import plain_signals
from twotower.decoded import ImageTransform

Picture = Path | str | bytes | Image.Image | np.ndarray


class FileState(NamedTuple):
    """What a picture's file was when it was read, by which a change is noticed later."""

    size: int = 0
    mtime_ns: int = 0
    sha256: str = ""


class PictureBatch(NamedTuple):
    """Pictures in their places: uint8 (n, 3, H, W), zeros where one is unreadable, and why it is.

    A place that stays makes a row's value independent of whether its neighbours can be read.
    `pixels` is None where no picture of the batch can be read; `states` are those of files.
    """

    pixels: Tensor | None
    reasons: dict[int, str]
    states: list[FileState] = []


def open_row(pairs: PairTable, row: int) -> tuple[bytes, int]:
    """The file of a row's picture, and when it was changed (ns): the one place that opens them.

    Raises:
        OSError: it cannot be read.
    """
    return read_place(pairs.path(row))


def stat_row(pairs: PairTable, row: int) -> FileState:
    """Size and time of the file of a row's picture, without its hash; zeros if there is none."""
    try:
        return FileState(*state_of(pairs.path(row)))
    except OSError:
        return FileState()


def row_state(pairs: PairTable, row: int) -> FileState:
    """Size, time and hash of the file of a row's picture; zeros if it cannot be read."""
    try:
        data, changed = open_row(pairs, row)
    except OSError:
        return FileState()
    return FileState(len(data), changed, hashlib.sha256(data).hexdigest())


def name_of_row(pairs: PairTable, row: int) -> str:
    """What to call the picture of a row."""
    return str(pairs.path(row))


def _from_array(pixels: np.ndarray) -> Image.Image:
    channels_last = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))
    if pixels.dtype != np.uint8 or not channels_last:
        raise UnreadableImage(
            "an array must be uint8 of shape (H, W), (H, W, 3) or (H, W, 4), "
            f"not {pixels.dtype} of {pixels.shape}"
        )
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return Image.fromarray(pixels)


def read_picture(source: Picture, transform: ImageTransform) -> Tensor | str:
    """One picture as uint8 (3, H, W), or the reason why it cannot be read."""
    try:
        picture = _from_array(source) if isinstance(source, np.ndarray) else source
        return transformed(picture, transform)
    except UnreadableImage as error:
        return str(error)
    # A transform may fail on a picture of a shape that nobody thought of; one file in a million
    # must not end the export, and its reason is kept.
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def collate_pictures(pictures: Sequence[Tensor | str]) -> PictureBatch:
    """Stack what could be read, each in its place."""
    reasons = {place: read for place, read in enumerate(pictures) if isinstance(read, str)}
    first = next((read for read in pictures if isinstance(read, Tensor)), None)
    if first is None:
        return PictureBatch(None, reasons)
    blank = torch.zeros_like(first)
    pixels = stack_pictures([blank if isinstance(read, str) else read for read in pictures])
    return PictureBatch(pixels, reasons)


class ReadRow(NamedTuple):
    """The picture of a row, uint8 (3, H, W) or the reason why there is none, and its file."""

    picture: Tensor | str
    state: FileState


def collate_rows(rows: Sequence[ReadRow]) -> PictureBatch:
    """Stack what could be read, each in its place, and list the files."""
    batch = collate_pictures([row.picture for row in rows])
    return batch._replace(states=[row.state for row in rows])


class PictureFiles(Dataset[ReadRow]):
    """The pictures of a table by source row; a class so that worker processes can be sent it."""

    def __init__(self, pairs: PairTable, transform: ImageTransform) -> None:
        self.pairs = pairs
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> ReadRow:
        try:
            data, changed = open_row(self.pairs, row)
        except OSError as error:
            return ReadRow((error.strerror or str(error)).lower(), FileState())
        state = FileState(len(data), changed, hashlib.sha256(data).hexdigest())
        return ReadRow(read_picture(data, self.transform), state)


def batches_of(rows: range, batch_size: int) -> Iterator[range]:
    """A shard's rows cut into batches that start at the shard's first row."""
    for first in range(rows.start, rows.stop, batch_size):
        yield range(first, min(first + batch_size, rows.stop))


class ShardBatches:
    """The row numbers of every batch of several shards, made as they are asked for."""

    def __init__(self, shards: Iterable[range], batch_size: int) -> None:
        self.shards = shards
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.shards:
            for batch in batches_of(rows, self.batch_size):
                yield list(batch)


def picture_batches(
    pairs: PairTable,
    transform: ImageTransform,
    shards: Iterable[range],
    batch_size: int,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[PictureBatch]:
    """The batches of several shards, one after the other, read ahead by `num_workers` processes."""
    loader: DataLoader[ReadRow] = DataLoader(
        PictureFiles(pairs, transform),
        batch_sampler=ShardBatches(shards, batch_size),
        collate_fn=collate_rows,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=plain_signals,
    )
    return iter(loader)


def name_of(source: Picture, place: int) -> str:
    """What to call a picture in a message."""
    if isinstance(source, str | Path):
        return os.fspath(source)
    return f"picture {place} of the input"
