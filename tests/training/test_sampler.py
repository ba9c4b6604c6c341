"""The order of the data: the same for any number of ranks, each row once, no batch incomplete."""

import pytest
import torch

from twotower.settings import ConfigError
from twotower.train_config import Pairing
from twotower.training.sampler import GlobalBatchSampler, check_batch_size


def batches(world, epoch=0, done=0, seed=3):
    samplers = [
        GlobalBatchSampler(torch.arange(50), 12, seed, rank, world) for rank in range(world)
    ]
    for sampler in samplers:
        sampler.set_position(epoch, done)
    return [sum(parts, []) for parts in zip(*samplers, strict=True)]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_batches_of_one_process(world):
    assert batches(world) == batches(1)


def test_an_epoch_has_each_row_at_most_once_and_only_full_batches():
    rows = sum(batches(1), [])
    assert len(rows) == 48 and len(set(rows)) == 48
    assert batches(1, epoch=1) != batches(1) and batches(1, seed=4) != batches(1)


def test_a_position_inside_the_epoch_leaves_out_what_is_done():
    assert batches(1, epoch=2, done=3) == batches(1, epoch=2)[3:]


def test_the_sentence_names_the_sizes_that_work():
    with pytest.raises(
        ConfigError, match="128, which 3 processes cannot share evenly; use 126 or 129"
    ):
        check_batch_size(128, 1000, 3)
    with pytest.raises(ConfigError, match="there are 100 training images"):
        check_batch_size(128, 100, 1)


def test_micro_batches_must_divide_the_batch():
    with pytest.raises(ConfigError, match="in micro-batches of 24; use 96 or 144"):
        check_batch_size(128, 1000, 2, 24)
    check_batch_size(144, 1000, 2, 24)


OWNER = torch.repeat_interleave(torch.arange(40), torch.tensor([1, 2, 3, 5] * 10))


def paired(pairing, epoch=0, batch_size=10):
    sampler = GlobalBatchSampler(OWNER, batch_size, 3, pairing=pairing)
    sampler.set_position(epoch, 0)
    found = list(sampler)
    assert len(found) == len(sampler)
    assert all(len(batch) == batch_size for batch in found)
    items = sum(found, [])
    assert len(set(items)) == len(items)
    return found


def test_separate_never_brings_an_image_twice_in_a_batch():
    for epoch in range(3):
        for batch in paired(Pairing.separate, epoch):
            assert len(set(OWNER[batch].tolist())) == len(batch)
    # 40, 30, 20, 10 and 10 images have a first, second, ... caption: whole batches all.
    assert len(paired(Pairing.separate)) == 11
    assert any(len(set(OWNER[batch].tolist())) < len(batch) for batch in paired(Pairing.shuffle))


def test_group_keeps_the_captions_of_an_image_side_by_side():
    items = sum(paired(Pairing.group), [])
    images = OWNER[items].tolist()
    changes = 1 + sum(a != b for a, b in zip(images, images[1:], strict=False))
    assert changes == len(set(images))
    assert sum(paired(Pairing.group, epoch=1), []) != items


def test_the_order_within_an_image_is_drawn_anew():
    firsts = [[b for b in sum(paired(Pairing.separate, e), []) if OWNER[b] == 3] for e in (0, 1, 2)]
    assert len({tuple(items) for items in firsts}) > 1
