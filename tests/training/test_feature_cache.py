"""The cache is keyed by all that decides the features, and filling it changes nothing else."""

import pytest
import torch
from torch import nn

from tests.helpers import tiny_bundle, write_pictures
from twotower.data.images import decode_image
from twotower.data.pairs import Pair, PairTable, own_random_numbers
from twotower.evaluation.examined import Examined
from twotower.models.dual_encoder import PixelNorm
from twotower.models.huggingface_text import HuggingFaceText, Pooling
from twotower.models.preprocess import TrainTransform
from twotower.train_config import Precision, TrainConfig
from twotower.training.feature_cache import caption_features, fingerprint, image_features
from twotower.training.inputs import prepare_inputs

CPU = torch.device("cpu")


@pytest.fixture
def pairs(tmp_path):
    made = write_pictures(tmp_path / "pictures", 6)
    rows = [Pair(path.name, text, "train", path.name) for path, text in made]
    return PairTable.from_pairs(rows, tmp_path / "pictures", "six")


def test_a_warm_cache_equals_a_cold_one_and_the_trunk(pairs, tmp_path):
    bundle, config = tiny_bundle(locked=True), TrainConfig()
    before = torch.get_rng_state()
    cold = image_features(bundle, pairs, config, CPU, tmp_path / "cache")[1]
    words = caption_features(bundle, ["a red", "b", "a red"], config, CPU, tmp_path / "cache")
    assert torch.equal(torch.get_rng_state(), before)  # else a cold run trains other weights
    warm = image_features(bundle, pairs, config, CPU, tmp_path / "cache")[1]
    assert torch.equal(warm, cold) and len(list((tmp_path / "cache").iterdir())) == 2
    expected = bundle.model.text_tower.trunk(bundle.tokenizer(["b", "a red"]))
    torch.testing.assert_close(words(["b", "a red"]), expected)


def test_what_changes_the_features_changes_the_key(pairs, tmp_path):
    config = TrainConfig()
    bundle = tiny_bundle(locked=True)
    features = image_features(bundle, pairs, config, CPU, tmp_path)[1]
    bundle.model.image_tower.trunk[0] = PixelNorm((0.4,) * 3, (0.3,) * 3)  # not in state_dict
    changed = image_features(bundle, pairs, config, CPU, tmp_path)[1]
    assert not torch.allclose(changed, features)
    image_features(bundle, pairs, TrainConfig(precision=Precision.bf16), CPU, tmp_path)
    write_pictures(pairs.root, 6, size=30)
    image_features(bundle, pairs, config, CPU, tmp_path)
    assert len(list(tmp_path.glob("images-*"))) == 4


def test_views_are_random_crops_that_every_run_shares(pairs, tmp_path):
    bundle, config = tiny_bundle(locked=True), TrainConfig(cached_views=3)
    bundle.train_transform = TrainTransform(16, min_scale=0.2, flip=True)
    trunk, folder = bundle.model.image_tower.trunk, tmp_path / "cache"
    views = [image_features(bundle, pairs, config, CPU, folder, view)[1] for view in range(3)]
    for view, features in enumerate(views):
        pictures = []
        for row in range(len(pairs)):
            with own_random_numbers(f"view/{view}/{row}"):
                pictures.append(bundle.train_transform(decode_image(pairs.path(row))))
        torch.testing.assert_close(features, trunk(torch.stack(pictures)))
    assert not torch.allclose(views[0], views[1])

    inputs = prepare_inputs(bundle, pairs, Examined(pairs), config, 7, CPU, folder)
    assert len(list(folder.glob("images-*"))) == 4  # three views, and the pictures as evaluated
    brought = set()
    for epoch in range(40):
        inputs.train.set_epoch(epoch)
        (found,) = [n for n in range(3) if torch.equal(inputs.train[4].image, views[n][4])]
        brought.add(found)
    assert brought == {0, 1, 2}
    assert torch.equal(
        inputs.val.images[4], image_features(bundle, pairs, config, CPU, folder)[1][4]
    )


def test_pooling_and_activation_are_in_the_fingerprint():
    encoder = nn.Linear(2, 2)
    trunks = [HuggingFaceText(encoder, pooling, 0) for pooling in Pooling]
    layers = [nn.Sequential(encoder, act) for act in (nn.GELU(), nn.ReLU())]
    assert len({fingerprint(module) for module in (*trunks, *layers)}) == 4
