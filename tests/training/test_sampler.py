"""The order of the data: the same for any number of ranks, each row once, no batch incomplete."""

import pytest

from twotower.settings import ConfigError
from twotower.training.sampler import GlobalBatchSampler, check_batch_size


def batches(world, epoch=0, done=0, seed=3):
    samplers = [GlobalBatchSampler(50, 12, seed, rank, world) for rank in range(world)]
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
