"""An update encodes what has changed and nothing else; ids stay, and readers see what is there."""

from __future__ import annotations

import dataclasses
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.embedding.parts import ONE_THREAD, bundle_of, contents
from tests.helpers import SquareTransform, write_pictures
from twotower.data.pairs import Pair, PairTable
from twotower.embedding import encoder
from twotower.embedding import update as update_module
from twotower.embedding.claims import Claims
from twotower.embedding.export import export
from twotower.embedding.store import EmbeddingStore
from twotower.embedding.writer import StoreWriter
from twotower.encode_config import EncodeConfig, Rows
from twotower.models.dual_encoder import ModelBundle
from twotower.retrieval.build import build_index, store_fingerprint
from twotower.retrieval.exact import ExactConfig
from twotower.retrieval.index import Modality
from twotower.settings import ConfigError

SETTINGS = EncodeConfig(shard_rows=256, batch_size=32)
UPDATE = dataclasses.replace(SETTINGS, update=True)


def table(folder: Path, captions: dict[str, list[str]] | None = None) -> PairTable:
    """The pictures of a folder by name, each with a caption or those given."""
    names = sorted(path.name for path in folder.iterdir())
    told = captions or {}
    pairs = [
        Pair(name, text, "", name) for name in names for text in told.get(name, [f"about {name}"])
    ]
    return PairTable.from_pairs(pairs, folder, "pictures")


def vectors(store: EmbeddingStore) -> dict[str, bytes]:
    """The vectors of each picture by name, caption vectors too."""
    ids = store.row_ids()
    names = [Path(entry["image_path"]).name for entry in store.metadata(ids)]
    rows = np.concatenate([store.image_rows(ids), store.text_rows(ids)], axis=1)
    found: dict[str, bytes] = {}
    for name, row in zip(names, rows, strict=True):
        found[name] = found.get(name, b"") + row.tobytes()
    return found


def repaint(path: Path, other: Path) -> None:
    """Give a picture the content of another, with a later time."""
    shutil.copyfile(other, path)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "pictures", 40)
    return tmp_path / "pictures"


def test_ten_new_five_changed_five_gone_of_a_thousand(checkpoint: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "pictures", tmp_path / "store"
    paths = [path for path, _ in write_pictures(folder, 1000, size=8)]
    export(checkpoint, table(folder), output, SETTINGS, ONE_THREAD)
    before = EmbeddingStore.open(output)
    id_of = {Path(e["image_path"]).name: e["row_id"] for e in before.metadata(range(1000))}
    mark = store_fingerprint(before, Modality.images)
    for number, path in enumerate(paths[:10]):
        shutil.copyfile(path, folder / f"{number:04d}_new.jpg")
    for path, other in zip(paths[100:105], paths[500:505], strict=True):
        repaint(path, other)
    for path in paths[900:905]:
        path.unlink()
    os.utime(paths[700], (1, 1))  # another time, the same content

    result = export(checkpoint, table(folder), output, UPDATE, ONE_THREAD)

    assert result.encoded == 15 and result.manifest.rows == 1005
    assert "10 new, 5 changed and 5 vanished images and encoded 15 in" in result.sentence()
    assert np.load(output / "deleted.npy").tolist() == [id_of[p.name] for p in paths[900:905]]
    store = EmbeddingStore.open(output)
    assert len(store) == 1005 and store_fingerprint(store, Modality.images) != mark
    fresh = tmp_path / "fresh"
    export(checkpoint, table(folder), fresh, SETTINGS, ONE_THREAD)
    assert vectors(store) == vectors(EmbeddingStore.open(fresh))
    now = {Path(e["image_path"]).name: e["row_id"] for e in store.metadata(store.row_ids())}
    assert {name: now[name] for name in id_of if name in now} == {
        name: number for name, number in id_of.items() if (folder / name).exists()
    }
    assert sorted(now[f"{n:04d}_new.jpg"] for n in range(10)) == list(range(1000, 1010))
    # Whoever searches finds what is there now, under the ids that stay.
    index = build_index(ExactConfig(), store)
    assert len(index) == 1005
    changed = id_of[paths[100].name]
    assert changed in index.search(store.image_rows([changed]).astype(np.float32), 2).ids[0]
    with pytest.raises(KeyError, match=f"has no row {id_of[paths[900].name]}"):
        store.image_rows([id_of[paths[900].name]])
    # Nothing is left to be done.
    assert export(checkpoint, table(folder), output, UPDATE, ONE_THREAD).reused
    assert export(checkpoint, table(folder), output, SETTINGS, ONE_THREAD).reused
    assert [path.name for path in tmp_path.iterdir() if "store" in path.name] == ["store"]


def test_captions_and_pictures_that_break_and_mend(
    checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SETTINGS, shard_rows=16, rows=Rows.pairs)
    anew = dataclasses.replace(settings, update=True)
    names = sorted(path.name for path in folder.iterdir())
    captions = {names[3]: ["one", "two"], names[4]: ["three"]}
    broken = (folder / names[7]).read_bytes()
    (folder / names[8]).write_bytes(b"junk")
    output = tmp_path / "store"
    export(checkpoint, table(folder, captions), output, settings, ONE_THREAD)
    ids = EmbeddingStore.open(output).row_ids().tolist()
    assert len(ids) == 40 and 9 not in ids

    captions = {names[3]: ["one", "two", "more"], names[4]: ["four"]}
    (folder / names[7]).write_bytes(b"no picture")
    (folder / names[8]).write_bytes(broken)
    result = export(checkpoint, table(folder, captions), output, anew, ONE_THREAD)
    assert result.encoded == 4 and result.manifest.errors == 1
    store = EmbeddingStore.open(output)
    assert [error["source_row"] for error in store.errors()] == [7]
    # One caption more: the image has new ids. Another caption: the id stays. Mended: as reserved.
    assert store.deleted().tolist() == [3, 4, 8]
    assert sorted(set(store.row_ids().tolist()) - set(ids)) == [9, 41, 42, 43]
    (row,) = store.metadata([5])
    assert (row["image_path"], row["caption"]) == (str(folder / names[4]), "four")

    (folder / names[7]).write_bytes(broken)
    assert export(checkpoint, table(folder, captions), output, anew, ONE_THREAD).encoded == 1
    store = EmbeddingStore.open(output)
    export(checkpoint, table(folder, captions), tmp_path / "fresh", settings, ONE_THREAD)
    assert vectors(store) == vectors(EmbeddingStore.open(tmp_path / "fresh"))
    assert store.errors() == [] and store.row_ids().max() == 44


def test_a_killed_update_leaves_the_old_store_and_goes_on(
    checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(SETTINGS, shard_rows=4, batch_size=2)
    anew = dataclasses.replace(settings, update=True)
    output = tmp_path / "store"
    export(checkpoint, table(folder), output, settings, ONE_THREAD)
    before = vectors(EmbeddingStore.open(output))
    for path in sorted(folder.iterdir())[:10]:
        repaint(path, folder / "0013_green.jpg")
    (folder / "0020_red.jpg").unlink()
    commit, write_errors = StoreWriter.commit, update_module._write_errors

    def interrupted(writer: StoreWriter, shard: int, *rest: object) -> None:
        if shard == 1:
            raise KeyboardInterrupt
        commit(writer, shard, *rest)

    def killed(*rest: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(checkpoint, table(folder), output, anew, ONE_THREAD)
    assert vectors(EmbeddingStore.open(output)) == before
    with monkeypatch.context() as patch:
        patch.setattr(update_module, "_write_errors", killed)
        with pytest.raises(KeyboardInterrupt):
            export(checkpoint, table(folder), output, anew, ONE_THREAD)
    # Shards and tombstones are written, and the manifest is not.
    assert vectors(EmbeddingStore.open(output)) == before
    monkeypatch.setattr(update_module, "_write_errors", write_errors)
    export(checkpoint, table(folder), output, anew, ONE_THREAD)
    export(checkpoint, table(folder), tmp_path / "fresh", settings, ONE_THREAD)
    assert vectors(EmbeddingStore.open(output)) == vectors(EmbeddingStore.open(tmp_path / "fresh"))
    assert EmbeddingStore.open(output).deleted().tolist() == [20]
    assert not (tmp_path / "store.update").exists()


def test_what_cannot_be_updated_is_said(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "store"
    first = export(checkpoint, table(folder), output, UPDATE, ONE_THREAD)  # as without update
    assert first.encoded == 40 and not first.update
    before = contents(output)
    other = tmp_path / "other.safetensors"
    other.write_text("1")
    with pytest.raises(ConfigError, match="which cannot be updated: the checkpoint"):
        export(other, table(folder), output, UPDATE, ONE_THREAD)
    for path in folder.iterdir():
        path.write_bytes(b"gone")
    with pytest.raises(ConfigError, match="nothing of pictures can be read; the store .* stays"):
        export(checkpoint, table(folder), output, UPDATE, ONE_THREAD)
    assert contents(output) == before
    with pytest.raises(ConfigError, match="are both true"):
        EncodeConfig(update=True, overwrite=True)
    (output / "source.parquet").unlink()
    with pytest.raises(ConfigError, match="cannot be updated: it lacks files; encode anew"):
        export(checkpoint, table(folder), output, UPDATE, ONE_THREAD)
    (output / "source.parquet").write_bytes(b"no table")
    with pytest.raises(ConfigError, match="source.parquet cannot be read, so nobody knows what"):
        export(checkpoint, table(folder), output, UPDATE, ONE_THREAD)


def test_an_update_that_waited_for_another_looks_again(
    checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, working = tmp_path / "store", Claims.working
    export(checkpoint, table(folder), output, SETTINGS, ONE_THREAD)
    (folder / "0003_white.jpg").unlink()

    def after_another(claims: Claims, job: str) -> AbstractContextManager[None]:
        """Another update comes in between, which has seen a further picture."""
        monkeypatch.setattr(Claims, "working", working)
        repaint(folder / "0005_green.jpg", folder / "0008_red.jpg")
        assert export(checkpoint, table(folder), output, UPDATE, ONE_THREAD).encoded == 1
        shutil.copyfile(folder / "0008_red.jpg", folder / "0041_red.jpg")
        return working(claims, job)

    shutil.copyfile(folder / "0008_red.jpg", folder / "0040_red.jpg")
    (folder / "0040_red.jpg").rename(folder / "0040_again.jpg")
    pairs = table(folder)
    monkeypatch.setattr(Claims, "working", after_another)
    (folder / "0040_again.jpg").unlink()
    # Its source still names the picture that has vanished since, which is listed.
    result = export(checkpoint, pairs, output, UPDATE, ONE_THREAD)
    assert (result.manifest.updates, result.manifest.errors) == (2, 1)
    monkeypatch.setattr(Claims, "working", working)
    export(checkpoint, table(folder), output, UPDATE, ONE_THREAD)
    export(checkpoint, table(folder), tmp_path / "fresh", SETTINGS, ONE_THREAD)
    assert vectors(EmbeddingStore.open(output)) == vectors(EmbeddingStore.open(tmp_path / "fresh"))


def test_two_images_of_one_id_stay_two(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    """As from tars of one name in two folders."""
    names = pa.array([f"00000/{row % 20}" for row in range(40)], pa.large_string())
    output = tmp_path / "store"

    def source() -> PairTable:
        whole = table(folder).table
        place = whole.schema.get_field_index("image_id")
        column = names.slice(0, len(whole))
        return PairTable(whole.set_column(place, "image_id", column), folder, "twice")

    export(checkpoint, source(), output, SETTINGS, ONE_THREAD)
    assert export(checkpoint, source(), output, UPDATE, ONE_THREAD).reused
    repaint(folder / "0025_green.jpg", folder / "0008_red.jpg")
    (folder / "0039_white.jpg").unlink()
    result = export(checkpoint, source(), output, UPDATE, ONE_THREAD)
    assert result.encoded == 1 and len(result.manifest.shards) == 2
    store = EmbeddingStore.open(output)
    assert store.deleted().tolist() == [39]
    export(checkpoint, source(), tmp_path / "fresh", SETTINGS, ONE_THREAD)
    assert vectors(store) == vectors(EmbeddingStore.open(tmp_path / "fresh"))


def test_rows_that_would_be_made_otherwise_are_not_added(
    checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "store"
    export(checkpoint, table(folder), output, SETTINGS, ONE_THREAD)
    (folder / "0003_white.jpg").rename(folder / "0099_white.jpg")

    def other_code(path: Path) -> ModelBundle:
        return dataclasses.replace(bundle_of(path), eval_transform=SquareTransform(17))

    monkeypatch.setattr(encoder, "load_bundle", other_code)
    with pytest.raises(ConfigError, match=r"the store to update has the .*\(size=17\) here"):
        export(checkpoint, table(folder), output, UPDATE, ONE_THREAD)
    assert len(EmbeddingStore.open(output)) == 40 and not (tmp_path / "store.update").exists()


def test_of_torchruns_ranks_the_first_speaks_for_all(
    checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "store"
    export(checkpoint, table(folder), output, SETTINGS, ONE_THREAD)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    said = []
    for settings in (SETTINGS, UPDATE):  # a store that is kept; an update that only deletes
        for rank in (1, 0):
            monkeypatch.setenv("RANK", str(rank))
            said.append(export(checkpoint, table(folder), output, settings, ONE_THREAD))
        (folder / "0003_white.jpg").unlink(missing_ok=True)
    assert [result is None for result in said] == [True, False, True, False]
    assert said[1].reused and "0 changed and 1 vanished images" in said[3].sentence()
