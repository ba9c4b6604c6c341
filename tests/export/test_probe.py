from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import tiny_bundle, write_pictures
from twotower.data.folder import FolderConfig
from twotower.data.images import decode_image
from twotower.export.probe import CAPTIONS, check_equal, make_probe
from twotower.settings import to_plain


def write_run(folder: Path, config: Any) -> Path:
    """What training leaves beside its checkpoints."""
    folder.mkdir()
    told = {"source": "folder", **to_plain(config)}
    (folder / "run.json").write_text(json.dumps({"data.": told}))
    return folder / "best.safetensors"


def test_the_pictures_are_those_of_the_run(tmp_path: Path) -> None:
    made = write_pictures(tmp_path / "pictures", 6)
    for path, caption in made:
        path.with_suffix(".txt").write_text(caption)
    checkpoint = write_run(tmp_path / "run", FolderConfig(folder=str(tmp_path / "pictures")))
    bundle = tiny_bundle()
    probe = make_probe(bundle, checkpoint)
    expected = [bundle.eval_transform(decode_image(path)) for path, _ in made[:4]]
    assert torch.equal(probe.pictures, torch.stack(expected))
    assert list(probe.captions) == [*CAPTIONS, *(caption for _, caption in made[:4])]
    again = [torch.tensor(list(image.tobytes())) for image in probe.images()]
    assert torch.equal(torch.stack(again), probe.pictures.permute(0, 2, 3, 1).flatten(1))


@pytest.mark.parametrize("told", ["", "{", '{"data.": {"source": "gone"}}', '{"data.": 3}'])
def test_without_them_photographs_are_taken(told: str, tmp_path: Path) -> None:
    if told:
        (tmp_path / "run.json").write_text(told)
    probe = make_probe(tiny_bundle(), tmp_path / "best.safetensors")
    assert probe.pictures.shape == (3, 3, 16, 16) and probe.pictures.dtype == torch.uint8
    spread = probe.pictures.float().flatten(1).std(dim=1)
    assert (spread > 20).all(), "pictures with something on them"


def test_pictures_that_are_gone_are_no_mistake(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path / "run", FolderConfig(folder=str(tmp_path / "gone")))
    assert len(make_probe(tiny_bundle(), checkpoint).pictures) == 3


def test_features_that_differ_or_are_no_numbers_are_refused() -> None:
    ones = (torch.ones(2, 4), torch.ones(3, 4))
    check_equal(ones, (ones[0] * (1 + 1e-5), ones[1]), "it")
    wrong = {
        "the text features that it gives differ from those of the checkpoint by 1.0e-03": (
            ones[0],
            ones[1] * 1.001,
        ),
        "the image features that it gives differ": (ones[0] * torch.nan, ones[1]),
        r"it gives text features of shape \(3, 1\) where the checkpoint gives \(3, 4\)": (
            ones[0],
            ones[1][:, :1],
        ),
    }
    for sentence, found in wrong.items():
        with pytest.raises(RuntimeError, match=sentence):
            check_equal(ones, found, "it")
