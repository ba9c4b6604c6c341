from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from tests.helpers import HashTokenizer, SquareTransform, write_pictures
from twotower.data.pairs import (
    Batch,
    Collate,
    ImageTextDataset,
    Pair,
    PairTable,
    Unreadable,
    load_pairs,
    prepare_pairs,
    trim_padding,
)
from twotower.data.synthetic import SyntheticConfig
from twotower.settings import ConfigError

CAPTIONS = 5


def made(folder: Path, count: int = 12, *, seed: int = 0) -> ImageTextDataset:
    pictures = write_pictures(folder, count)
    pairs = [
        Pair(path.name, f"{text} version {version}", "train", path.name)
        for path, text in pictures
        for version in range(CAPTIONS)
    ]
    table = PairTable.from_pairs(pairs, folder, "squares")
    return ImageTextDataset(table, SquareTransform(16), seed=seed)


def batches(dataset: ImageTextDataset, num_workers: int = 0) -> list[Batch]:
    return list(
        DataLoader(dataset, 4, num_workers=num_workers, collate_fn=Collate(HashTokenizer()))
    )


def test_an_epoch_has_each_image_once_with_one_of_its_own_captions(tmp_path: Path) -> None:
    dataset = made(tmp_path)
    samples = [dataset[row] for row in range(len(dataset))]
    assert [s.image_id for s in samples] == list(range(12))
    assert all(s.caption in dataset.pairs.captions(s.image_id) for s in samples)


def test_epochs_and_seeds_draw_different_captions_and_all_of_them(tmp_path: Path) -> None:
    dataset, other = made(tmp_path), made(tmp_path, seed=1)
    draws = Counter()
    for epoch in range(100):
        dataset.set_epoch(epoch)
        draws[tuple(dataset.draw_caption(row) for row in range(12))] += 1
    assert len(draws) == 100
    assert len({captions[3] for captions in draws}) == CAPTIONS
    dataset.set_epoch(0)
    first = [dataset.draw_caption(row) for row in range(12)]
    assert first in [list(draw) for draw in draws]
    assert first != [other.draw_caption(row) for row in range(12)]


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    dataset = made(tmp_path)
    (tmp_path / "0005_green.jpg").write_bytes(b"damaged")
    dataset.set_epoch(3)
    alone, helped = batches(dataset), batches(dataset, num_workers=2)
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
        assert one.unreadable == other.unreadable


def test_the_shapes_of_a_batch(tmp_path: Path) -> None:
    batch = batches(made(tmp_path))[0]
    assert (batch.images.shape, batch.images.dtype) == ((4, 3, 16, 16), torch.uint8)
    assert (batch.tokens.shape, batch.tokens.dtype) == ((4, 8), torch.int64)
    assert batch.keys[:, 0].tolist() == [0, 1, 2, 3]
    assert batch.unreadable == ()


def test_an_unreadable_picture_gives_way_to_the_next_and_the_batch_tells(tmp_path: Path) -> None:
    dataset = made(tmp_path)
    damaged = [tmp_path / f"{n:04d}_{c}.jpg" for n, c in ((2, "blue"), (3, "white"), (11, "white"))]
    for path in damaged:
        path.write_bytes(b"")
    first, second, third = batches(dataset)
    assert first.keys[:, 0].tolist() == [0, 1, 4, 4]
    assert third.keys[:, 0].tolist() == [8, 9, 10, 0]
    assert first.unreadable == tuple(Unreadable(str(p), "the file is empty") for p in damaged[:2])
    assert second.unreadable == ()
    assert torch.equal(first.images[2], dataset[4].image)
    assert dataset[2].caption in dataset.pairs.captions(4)


def test_no_readable_picture_is_one_sentence(tmp_path: Path) -> None:
    dataset = made(tmp_path, 3)
    for path in tmp_path.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="squares: no picture can be read, for example .*0001_"):
        dataset[1]


def test_an_image_without_captions_has_the_empty_one(tmp_path: Path) -> None:
    (path, _), *_ = write_pictures(tmp_path, 1)
    table = PairTable.from_pairs([Pair(path.name, None, "", "a")], tmp_path, "bare")
    assert ImageTextDataset(table, SquareTransform())[0].caption == ""


def test_a_source_with_nothing_to_lay_out_is_prepared_by_loading_it(tmp_path: Path) -> None:
    config = SyntheticConfig(folder=str(tmp_path), count=8)
    assert prepare_pairs(config).table.equals(load_pairs(config).table)


class Noise:
    """Random numbers in a picture's place."""

    side = 0

    def __call__(self, picture):
        return torch.rand(2)


def test_augmentation_is_drawn_by_seed_epoch_and_row_alone(tmp_path):
    """A resumed run, another worker and another rank see the same pictures."""
    made = write_pictures(tmp_path / "augmented", 3)
    rows = [Pair(str(path), "a", "train", path.name) for path, _ in made]
    pairs = PairTable.from_pairs(rows, tmp_path, "three")
    noise = ImageTextDataset(pairs, Noise(), seed=4)
    first = [noise[row].image for row in range(3)]
    torch.rand(7)
    assert all(torch.equal(noise[row].image, first[row]) for row in (2, 0, 1))
    assert not torch.equal(first[0], first[1])
    before = torch.get_rng_state()
    noise.set_epoch(1)
    assert not torch.equal(noise[0].image, first[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_padding_of_all_rows_is_trimmed_to_a_multiple_of_eight():
    tokens = torch.zeros(3, 77, dtype=torch.int64)
    tokens[0, :4], tokens[1, :11] = 5, 6
    trimmed = trim_padding(tokens, 0)
    assert trimmed.shape == (3, 16) and torch.equal(trimmed, tokens[:, :16])
    tokens[2, :75] = 7
    assert torch.equal(trim_padding(tokens, 0), tokens)
    assert trim_padding(torch.full((2, 5), 9), 9).shape == (2, 5)
