"""Equal pictures give equal rows, however they come; what cannot be read is named or None."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import tiny_bundle, write_pictures
from tests.models.tiny import RESNET, VIT, clip_bundle
from twotower.embedding import encoder as encoder_module
from twotower.embedding.encoder import Encoder
from twotower.settings import ConfigError
from twotower.train_config import Precision

BATCH = 4


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [path for path, _ in write_pictures(tmp_path_factory.mktemp("pictures"), 10)]


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(tiny_bundle(), batch_size=BATCH)


def test_rows_are_the_models_normalised_features_in_order(
    encoder: Encoder, pictures: list[Path]
) -> None:
    bundle = encoder.bundle
    rows = encoder.encode_images(pictures)
    assert rows.shape == (10, encoder.dim) == (10, 12) and rows.dtype == np.float32
    for path, row in zip(pictures, rows, strict=True):
        pixels = bundle.eval_transform(Image.open(path))[None]
        expected = bundle.model.encode_image(pixels, normalize=True)[0]
        assert np.allclose(row, expected.detach().numpy(), atol=1e-6)
    texts = [f"text number {n}" for n in range(7)]
    expected = bundle.model.encode_text(bundle.tokenizer(texts), normalize=True)
    assert np.allclose(encoder.encode_texts(texts), expected.detach().numpy(), atol=1e-6)


def test_norms_are_one(encoder: Encoder, pictures: list[Path]) -> None:
    rows = np.concatenate([encoder.encode_images(pictures), encoder.encode_texts(["", "a b"])])
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_a_row_depends_on_nothing_beside_it(encoder: Encoder, pictures: list[Path]) -> None:
    together = encoder.encode_images(pictures)
    alone = [encoder.encode_images([path])[0] for path in pictures]
    assert np.array_equal(together, np.stack(alone))
    texts = ["one", "two words", "three words here", "", "five"]
    alone = [encoder.encode_texts([text])[0] for text in texts]
    assert np.array_equal(encoder.encode_texts(texts), np.stack(alone))


def test_every_kind_of_picture_gives_the_same_row(encoder: Encoder, pictures: list[Path]) -> None:
    path = pictures[3]
    opened = Image.open(path)
    png = io.BytesIO()
    opened.save(png, "png")
    mixed = [path, str(path), path.read_bytes(), opened, np.asarray(opened), png.getvalue()]
    rows = encoder.encode_images(mixed)
    assert np.array_equal(rows, np.repeat(encoder.encode_images([path]), len(mixed), axis=0))
    grey = np.full((9, 7), 200, np.uint8)
    alpha = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
    rows = encoder.encode_images([grey, grey[..., None], np.dstack([grey] * 3), alpha])
    assert np.array_equal(rows, np.repeat(rows[:1], 4, axis=0))


def test_unreadable_pictures_are_none_or_named(
    encoder: Encoder, pictures: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(pictures[0].read_bytes()[:300])
    floats = np.zeros((4, 4, 3))
    mixed = [pictures[0], bad, b"junk", pictures[1], tmp_path / "none.jpg", floats, pictures[2]]
    rows = encoder.encode_images(mixed, errors="none")
    assert [row is None for row in rows] == [False, True, True, False, True, True, False]
    whole = encoder.encode_images(pictures[:3])
    assert np.array_equal(np.stack([row for row in rows if row is not None]), whole)
    assert encoder.encode_images([bad] * 5, errors="none") == [None] * 5
    with pytest.raises(ConfigError, match=f"cannot read {bad}: "):
        encoder.encode_images(mixed)
    with pytest.raises(ConfigError, match="cannot read picture 5 of the input: "):
        encoder.encode_images([*pictures[:5], b"junk"])
    with pytest.raises(ConfigError, match=r"must be uint8 of shape .* not float64 of \(4, 4, 3\)"):
        encoder.encode_images([floats])


def test_what_would_shift_or_split_the_rows_is_refused(
    encoder: Encoder, pictures: list[Path]
) -> None:
    with pytest.raises(ConfigError, match="a list is wanted, and str is one; use encode_texts.*te"):
        encoder.encode_texts("a dog")
    one = np.zeros((5, 4, 3), np.uint8)
    for picture in (pictures[0], str(pictures[0]), b"bytes", Image.fromarray(one), one):
        with pytest.raises(ConfigError, match="is one; use encode_images.*picture"):
            encoder.encode_images(picture)
    with pytest.raises(ConfigError, match="""errors must be "raise" or "none", not 'skip'"""):
        encoder.encode_images(pictures, errors="skip")
    many = encoder.encode_images(np.stack([one] * 6))
    assert np.array_equal(many, encoder.encode_images([one] * 6))
    texts = encoder.encode_texts(np.array(["a dog", "a cat"]))
    assert np.array_equal(texts, encoder.encode_texts(["a dog", "a cat"]))


def test_nothing_in_gives_nothing_out(encoder: Encoder) -> None:
    assert encoder.encode_images([]).shape == (0, 12)
    assert encoder.encode_images([], errors="none") == []
    assert encoder.encode_texts([]).shape == (0, 12)


def test_dropout_is_off_and_batch_norm_reads_its_statistics(pictures: list[Path]) -> None:
    bundle = tiny_bundle()
    tower = bundle.model.image_tower
    tower.trunk = torch.nn.Sequential(*tower.trunk, torch.nn.BatchNorm1d(24), torch.nn.Dropout(0.5))
    bundle.model.train()
    encoder = Encoder(bundle, batch_size=BATCH)
    rows = encoder.encode_images(pictures)
    assert np.array_equal(rows, encoder.encode_images(pictures))
    assert tower.trunk[-2].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.bfloat16, 0.999), (torch.float16, 0.99999)], ids=["bf16", "fp16"]
)
def test_cast_weights_are_near_fp32_and_leave_the_bundle_alone(
    dtype: torch.dtype, least: float, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "multiplies_bf16", lambda: True)
    # A CPU is refused fp16 for its slowness; the numbers are what a GPU gives, up to rounding.
    monkeypatch.setitem(encoder_module.DTYPES, Precision.bf16, dtype)
    for bundle in (tiny_bundle(), clip_bundle(VIT), clip_bundle(RESNET)):
        wide = Encoder(bundle, batch_size=BATCH).encode_images(pictures)
        narrow = Encoder(bundle, precision=Precision.bf16, batch_size=BATCH).encode_images(pictures)
        assert narrow.dtype == np.float32
        cosines = (wide * narrow).sum(1)
        assert (cosines > least).all() and (cosines < 1 - 1e-9).any()
        assert {parameter.dtype for parameter in bundle.model.parameters()} == {torch.float32}


def test_bf16_on_a_cpu_that_lacks_the_instructions_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoder_module, "multiplies_bf16", lambda: False)
    with pytest.raises(ConfigError, match="this processor cannot multiply bf16 .* precision fp32"):
        Encoder(tiny_bundle(), precision=Precision.bf16)


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU; on a CPU take bf16 or fp32"):
        Encoder(tiny_bundle(), precision=Precision.fp16)


def test_both_towers_are_compiled_after_a_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    bundle = clip_bundle(VIT)
    found = Encoder(bundle, batch_size=BATCH, compiled=True)
    model = bundle.model
    assert compiled == [model.image_tower.trunk[1], model.text_tower.trunk]
    assert "dim" in vars(found)  # else a batch of one text would be compiled for


@pytest.mark.slow
def test_compiled_towers_give_the_same_rows(
    encoder: Encoder, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = Encoder(tiny_bundle(), batch_size=BATCH, compiled=True)
    texts = ["one", "two words", "three words here", "", "five"]
    for one, other in (
        (encoder.encode_images(pictures), compiled.encode_images(pictures)),
        (encoder.encode_texts(texts), compiled.encode_texts(texts)),
    ):
        assert np.allclose(one, other, atol=1e-6)


def test_load_takes_a_checkpoint_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: list[Path]
) -> None:
    asked: list[Path] = []

    def load(path: Path) -> object:
        asked.append(path)
        return tiny_bundle(seed=3)

    monkeypatch.setattr(encoder_module, "load_bundle", load)
    loaded = Encoder.load(tmp_path / "x.safetensors", batch_size=BATCH)
    assert asked == [tmp_path / "x.safetensors"]
    made = Encoder(tiny_bundle(seed=3), batch_size=BATCH)
    assert np.array_equal(loaded.encode_images(pictures), made.encode_images(pictures))
