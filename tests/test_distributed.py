"""Starting ranks: results, refusals and failures reach the caller; what ranks agree on."""

import os
import signal
import time

import pytest

from tests.helpers import run_ranks
from twotower import distributed
from twotower.config import DistributedConfig
from twotower.distributed import Stopped, on_main, shard_range
from twotower.launch import launch
from twotower.settings import ConfigError, Diverged

TWO = DistributedConfig(nproc_per_node=2, num_threads=1, oversubscribe=True)


def describe(word):
    return word, distributed.rank(), distributed.all_gather_objects(distributed.rank())


def refuse_on_main():
    raise ConfigError("this is\u2019s refused: a reason")


def refuse_together():
    return on_main(refuse_on_main)


def refuse_alone():
    if distributed.rank() == 1:
        raise Diverged("the second rank has a reason")
    distributed.barrier()


def fail_alone():
    if distributed.rank() == 1:
        raise ZeroDivisionError("planted")
    distributed.barrier()


def stop_alone():
    """The second rank is told to stop; both leave as the training loop does."""
    from twotower.training.resume import stop_after_step

    with stop_after_step() as stop:
        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        number, _ = stop.agreed(False)
        raise Stopped(number, "saved")


def test_the_first_ranks_result_comes_back():
    assert launch(describe, TWO, "hello") == ("hello", 0, [0, 1])
    assert launch(describe, DistributedConfig(), "alone") == ("alone", 0, [0])


@pytest.mark.parametrize(
    ("fn", "sentence"),
    [
        (refuse_together, "this is\u2019s refused: a reason"),
        (refuse_alone, "the second rank has a reason"),
    ],
)
def test_a_ranks_refusal_is_its_sentence(fn, sentence, capfd):
    with pytest.raises(ConfigError) as error:
        launch(fn, TWO)
    assert str(error.value) == sentence
    assert (error.type is Diverged) == (fn is refuse_alone), "a sweep tells the two apart"
    assert "Traceback" not in capfd.readouterr().err


def test_a_failing_ranks_traceback_comes_back():
    with pytest.raises(RuntimeError, match="(?s)rank 1 failed.*ZeroDivisionError: planted"):
        launch(fail_alone, TWO)


def test_a_rank_that_is_stopped_stops_the_run():
    with pytest.raises(Stopped) as stopped:
        launch(stop_alone, TWO)
    assert stopped.value.signal == signal.SIGTERM


def on_main_of_ranks():
    found = on_main(distributed.rank)
    try:
        on_main(refuse_on_main)
    except ConfigError as error:
        return found, str(error)
    return found, ""


def test_what_the_first_rank_finds_or_refuses_every_rank_knows():
    assert run_ranks(on_main_of_ranks, 3) == [(0, "this is\u2019s refused: a reason")] * 3


def test_more_processes_than_cores_are_refused_unless_asked_for():
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(ConfigError, match=f"is 999, but this machine has {cores} CPU core"):
        launch(describe, DistributedConfig(nproc_per_node=999), "x")


@pytest.mark.parametrize(("total", "count"), [(0, 3), (2, 3), (10, 3), (101, 7)])
def test_shards_are_contiguous_whole_and_even(total, count):
    parts = [shard_range(total, index, count) for index in range(count)]
    assert [row for part in parts for row in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
