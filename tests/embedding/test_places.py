from pathlib import Path

import numpy as np

from tests.data.test_tars import write_tar
from tests.embedding.parts import ONE_THREAD
from tests.helpers import write_pictures
from twotower.data.images import decode_image
from twotower.data.manifest import ManifestConfig, load_manifest, write_manifest
from twotower.data.pairs import PairTable
from twotower.data.webdataset import WebdatasetConfig, load_webdataset
from twotower.embedding.export import export
from twotower.embedding.store import EmbeddingStore
from twotower.encode_config import EncodeConfig

SETTINGS = EncodeConfig(shard_rows=8, batch_size=4)


def encoded(checkpoint: Path, pairs: PairTable, folder: Path) -> EmbeddingStore:
    assert export(checkpoint, pairs, folder, SETTINGS, ONE_THREAD) is not None
    return EmbeddingStore.open(folder)


def test_pictures_in_tars_are_encoded_as_files_are(checkpoint: Path, tmp_path: Path) -> None:
    made = write_pictures(tmp_path / "files", 20)
    manifest = tmp_path / "files/m.csv"
    write_manifest(manifest, ("filepath", "caption"), [(path.name, text) for path, text in made])
    members = [
        member
        for path, text in made
        for member in ((path.name, path.read_bytes()), (f"{path.stem}.txt", text.encode()))
    ]
    write_tar(tmp_path / "0.tar", members[:20])
    write_tar(tmp_path / "1.tar", [*members[20:], ("9.jpg", b"broken"), ("9.txt", b"nothing")])
    config = WebdatasetConfig(tars=str(tmp_path / "{0..1}.tar"), cache=str(tmp_path / "cache"))
    tars = encoded(checkpoint, load_webdataset(config), tmp_path / "of_tars")
    files = load_manifest(ManifestConfig(manifest=str(manifest)))
    expected = encoded(checkpoint, files, tmp_path / "of_files")
    ids = tars.row_ids()
    assert ids.tolist() == expected.row_ids().tolist() == list(range(20))
    np.testing.assert_array_equal(tars.image_rows(ids), expected.image_rows(ids))
    np.testing.assert_array_equal(tars.text_rows(ids), expected.text_rows(ids))
    for entry, (path, text) in zip(tars.metadata(ids), made, strict=True):
        assert entry["caption"] == text and Path(entry["image_path"]).name == path.name
        assert decode_image(entry["image_path"]).tobytes() == decode_image(path).tobytes()
