"""Every row once and in order, whoever dies at which moment, and whoever works beside it."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from tests.embedding.parts import ONE_THREAD, bundle_of, contents
from tests.helpers import write_pictures
from twotower.data.pairs import Pair, PairTable
from twotower.embedding import encoder
from twotower.embedding.export import export
from twotower.embedding.store import EmbeddingStore
from twotower.embedding.writer import StoreWriter
from twotower.encode_config import EncodeConfig

COUNT, KILLS = 1000, 10
SETTINGS = EncodeConfig(shard_rows=16, batch_size=8)

# Children that have torch imported already.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.embedding.parts"])


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> PairTable:
    folder = tmp_path_factory.mktemp("thousand")
    pairs = [Pair(path.name, text, "", path.name) for path, text in write_pictures(folder, COUNT)]
    return PairTable.from_pairs(pairs, folder, "thousand")


def slowly(checkpoint: Path, pairs: PairTable, output: Path, pause: float) -> None:
    """An encoder of its own, whose shards take a while."""
    encoder.load_bundle = bundle_of
    write = StoreWriter._write

    def slow(writer: StoreWriter, *rest: object) -> None:
        time.sleep(pause)
        write(writer, *rest)

    StoreWriter._write = slow
    export(checkpoint, pairs, output, SETTINGS, ONE_THREAD)


def start(count: int, *args: object) -> list[BaseProcess]:
    started = [PROCESSES.Process(target=slowly, args=args) for _ in range(count)]
    for process in started:
        process.start()
    return started


def test_ten_kills_and_other_process_counts(
    checkpoint: Path, thousand: PairTable, tmp_path: Path
) -> None:
    export(checkpoint, thousand, tmp_path / "alone", SETTINGS, ONE_THREAD)
    dice = random.Random(0)
    arguments = (checkpoint, thousand, tmp_path / "store", 0.1)
    running, killed = start(3, *arguments), 0
    while killed < KILLS:
        time.sleep(dice.uniform(0, 0.3))
        victim = dice.choice(running)
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        assert victim.exitcode == -signal.SIGKILL  # it had not finished
        killed += 1
        running.remove(victim)
        running += start(1 if running else dice.randint(1, 3), *arguments)
        if killed == KILLS // 2:  # all at once, and then another number of them
            for process in running:
                process.kill()
                process.join()
            running = start(2, *arguments)
    running += start(2, *arguments)
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * len(running)

    assert contents(tmp_path / "store") == contents(tmp_path / "alone")
    store = EmbeddingStore.open(tmp_path / "store")
    assert store.row_ids().tolist() == list(range(COUNT))
    paths = [entry["image_path"] for entry in store.metadata(range(COUNT))]
    assert paths == [str(thousand.path(row)) for row in range(COUNT)]
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_shard_that_two_finish_is_written_once(
    checkpoint: Path, thousand: PairTable, tmp_path: Path
) -> None:
    """As after the pause of a process that others took for dead: its claims are gone."""
    few = thousand.head(100)
    export(checkpoint, few, tmp_path / "alone", SETTINGS, ONE_THREAD)
    running = start(3, checkpoint, few, tmp_path / "store", 0.05)
    while any(process.is_alive() for process in running):
        for claim in (tmp_path / ".store.claims").glob("[0-9]*"):
            claim.unlink(missing_ok=True)
        time.sleep(0.02)
    assert [process.exitcode for process in running] == [0, 0, 0]
    assert contents(tmp_path / "store") == contents(tmp_path / "alone")


def test_independent_jobs_do_their_own_shards_and_the_last_one_finishes(
    checkpoint: Path, thousand: PairTable, tmp_path: Path
) -> None:
    few, output = thousand.head(100), tmp_path / "store"
    export(checkpoint, few, tmp_path / "alone", SETTINGS, ONE_THREAD)
    done = []
    for shard in (2, 0, 0, 1):  # one of them twice
        job = EncodeConfig(shard_rows=16, batch_size=8, shard=shard, num_shards=3)
        done.append(export(checkpoint, few, output, job, ONE_THREAD))
        assert not output.with_name(".store.claims").exists()
    assert [result.encoded for result in done] == [32, 36, 0, 32]
    assert [result.manifest.complete for result in done] == [False, False, False, True]
    assert "other shards of the store" in done[0].sentence()
    assert contents(output) == contents(tmp_path / "alone")
    assert export(checkpoint, few, output, job, ONE_THREAD).reused
    assert np.load(output / "img_emb" / "img_emb_0001.npy").shape == (16, 12)
