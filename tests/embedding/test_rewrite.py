"""Compacted stores hold the same vectors and metadata, row for row."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.embedding.parts import ONE_THREAD, contents, plain
from tests.helpers import write_pictures
from twotower.data.pairs import Pair, PairTable
from twotower.embedding import rewrite
from twotower.embedding.encoder import Encoder
from twotower.embedding.export import export
from twotower.embedding.rewrite import compact_store
from twotower.embedding.store import EmbeddingStore
from twotower.embedding.verify import verify_store
from twotower.encode_config import EncodeConfig, Rows
from twotower.settings import ConfigError

SETTINGS = EncodeConfig(shard_rows=16, batch_size=5)
PAIRS = dataclasses.replace(SETTINGS, rows=Rows.pairs)


@pytest.mark.parametrize("settings", [SETTINGS, PAIRS])
def test_compacting_an_updated_store_gives_a_fresh_one_with_its_old_ids(
    checkpoint: Path, tmp_path: Path, settings: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = tmp_path / "pictures", tmp_path / "store"
    paths = [path for path, _ in write_pictures(folder, 60)]

    def source() -> PairTable:
        names = sorted(path.name for path in folder.iterdir())
        pairs = [Pair(n, f"{word} {n}", "", n) for n in names for word in ("a", "the")]
        return PairTable.from_pairs(pairs, folder, "pictures")

    export(checkpoint, source(), output, settings, ONE_THREAD)
    with pytest.raises(ConfigError, match="has nothing to compact"):
        compact_store(output)
    paths[5].rename(folder / "0000_first.jpg")
    paths[30].write_bytes(paths[31].read_bytes())
    paths[40].write_bytes(b"junk")
    update = dataclasses.replace(settings, update=True)
    export(checkpoint, source(), output, update, ONE_THREAD)
    before = EmbeddingStore.open(output)
    rows = {row["row_id"]: row for row in plain(before, "source_row")}

    with monkeypatch.context() as patch:
        patch.setattr(rewrite, "replace_store", lambda folder: (_ for _ in ()).throw(OSError()))
        with pytest.raises(OSError):
            compact_store(output)
    assert len(EmbeddingStore.open(output)) == len(before)  # as it was
    compact_store(output)

    store = EmbeddingStore.open(output)
    assert {row["row_id"]: row for row in plain(store, "source_row")} == rows
    export(checkpoint, source(), tmp_path / "fresh", settings, ONE_THREAD)
    fresh = EmbeddingStore.open(tmp_path / "fresh")
    assert plain(store, "row_id") == plain(fresh, "row_id")
    for name, content in contents(tmp_path / "fresh").items():
        if name.endswith(".npy"):
            assert (output / name).read_bytes() == content
    assert not (output / "deleted.npy").exists() and store.errors() == fresh.errors()
    # It goes on from there.
    paths[40].write_bytes(paths[41].read_bytes())
    assert export(checkpoint, source(), output, update, ONE_THREAD).encoded == 1
    assert len(EmbeddingStore.open(output)) == 60 * (2 if settings is PAIRS else 1)


def test_verify_reads_every_byte_and_encodes_again(
    checkpoint: Path, source: PairTable, tmp_path: Path
) -> None:
    output = tmp_path / "store"
    export(checkpoint, source, output, SETTINGS, ONE_THREAD)
    encoder = Encoder.load(checkpoint, batch_size=5)
    said = verify_store(EmbeddingStore.open(output), encoder, 30, seed=0)
    assert said == (
        f"{output}: 89 rows in 7 shards are what was written, 30 pictures give the same vectors, "
        "30 captions do"
    )
    path = output / "img_emb" / "img_emb_0003.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ConfigError, match="img_emb_0003.npy .another content than was written"):
        verify_store(EmbeddingStore.open(output), None, 0, seed=0)
    path.write_bytes(whole)
    assert "0003" not in verify_store(EmbeddingStore.open(output), None, 0, seed=0)
    # Vectors that are whole, but not those of the pictures.
    store = EmbeddingStore.open(output)
    shards = store.image_shards()
    shards[2] = np.roll(shards[2], 1, axis=0)
    with pytest.raises(ConfigError, match="is not what its checkpoint gives: in img_emb, row"):
        verify_store(store, encoder, 89, seed=0)
