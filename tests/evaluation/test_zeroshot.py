"""Zero-shot classification equals a loop over images and prompts, on one rank and on two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from tests.helpers import run_ranks, tiny_bundle, write_pictures
from twotower.config import EvaluateConfig
from twotower.data.images import decode_image
from twotower.data.pairs import Pair, PairTable
from twotower.evaluation.features import FeatureInputs, PictureInputs, pair_features
from twotower.evaluation.prompts import Prompts
from twotower.evaluation.retrieval import measure_pairs
from twotower.evaluation.zeroshot import ZeroShotReport, measure_zeroshot
from twotower.models.dual_encoder import DualEncoder
from twotower.settings import ConfigError

CPU = torch.device("cpu")
CONFIG = EvaluateConfig(batch_size=4)
COLOURS = ("red", "green", "blue", "white")
PROMPTS = Prompts(
    labels=(*COLOURS, "black", "pink"),
    words=(*COLOURS, "black", "pink"),
    templates=("a {}", "the {} one", "it is {} , {} indeed"),
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairTable:
    """Twenty pictures of four colours; one cannot be read, one has no class, one another class."""
    folder = tmp_path_factory.mktemp("pictures")
    made = write_pictures(folder, 20)
    (folder / made[6][0].name).write_bytes(b"not a picture")
    rows = [Pair(path.name, text, "val", path.name) for path, text in made for text in (text, "x")]
    table = PairTable.from_pairs(rows, folder, "colours").table
    labels = [path.stem.split("_")[1] for path, _ in made]
    labels[3:5] = ["", "purple"]
    return PairTable(table.append_column("class", pa.array(labels, pa.large_string())), folder)


def zeroshot(pairs: PairTable, *, reuse: bool = False) -> ZeroShotReport:
    bundle = tiny_bundle(seed=3)
    inputs = PictureInputs(pairs, bundle.eval_transform)
    features = None
    if reuse:
        features = pair_features(bundle.model, pairs, inputs, bundle.tokenizer, CONFIG, CPU)
    return measure_zeroshot(
        bundle.model, pairs, inputs, bundle.tokenizer, PROMPTS, CONFIG, CPU, features=features
    )


def test_it_equals_a_loop_over_images_and_prompts(pairs: PairTable) -> None:
    bundle = tiny_bundle(seed=3)
    model = bundle.model.eval()
    vectors = []
    for word in PROMPTS.words:
        texts = [f"a {word}", f"the {word} one", f"it is {word} , {word} indeed"]
        each = [model.encode_text(bundle.tokenizer([text]), normalize=True)[0] for text in texts]
        vectors.append(F.normalize(torch.stack(each).mean(0), dim=0))
    hits: dict[int, list[tuple[bool, bool]]] = {}
    for row, label in enumerate(pairs.classes() or ()):
        if row != 6 and label in COLOURS:
            image = bundle.eval_transform(decode_image(pairs.path(row)))[None]
            feature = model.encode_image(image, normalize=True)[0]
            order = sorted(range(6), key=lambda k: -(feature @ vectors[k]).item())
            place = order.index(COLOURS.index(label))
            hits.setdefault(COLOURS.index(label), []).append((place < 1, place < 5))
    every = [hit for of_class in hits.values() for hit in of_class]
    report = zeroshot(pairs)
    expected = {
        "zeroshot_top1": 100 * sum(top1 for top1, _ in every) / len(every),
        "zeroshot_top5": 100 * sum(top5 for _, top5 in every) / len(every),
        "zeroshot_mean_per_class": 100
        * sum(sum(top1 for top1, _ in h) / len(h) for h in hits.values())
        / len(hits),
    }
    assert report.metrics == pytest.approx(expected)
    assert 0 < report.metrics["zeroshot_top1"] < report.metrics["zeroshot_top5"] <= 100
    assert (report.images, report.classes, report.templates) == (17, 6, 3)
    assert (report.unlisted, report.unreadable, report.absent) == (2, 1, [])
    assert report.about() == (
        "zero-shot: 17 images, 6 classes, 3 templates; 2 images of no listed class left out; "
        "1 images unreadable left out"
    )


def two_classes(pairs: PairTable) -> ZeroShotReport:
    bundle = tiny_bundle()
    prompts = replace(PROMPTS, labels=("red", "green"), words=("red", "green"))
    inputs = PictureInputs(pairs, bundle.eval_transform)
    return measure_zeroshot(bundle.model, pairs, inputs, bundle.tokenizer, prompts, CONFIG, CPU)


def test_top5_of_two_classes_is_left_out_and_said_so(pairs: PairTable) -> None:
    report = two_classes(pairs)
    assert list(report.metrics) == ["zeroshot_top1", "zeroshot_mean_per_class"]
    assert report.absent == [5]
    assert "top-5 left out, since there are only 2 classes" in report.about()


def test_heads_on_cached_features_classify_as_the_whole_model_does(pairs: PairTable) -> None:
    bundle = tiny_bundle(seed=3)
    model = bundle.model.eval()
    readable = pairs.take(torch.tensor([row for row in range(20) if row != 6]).numpy())
    pictures = PictureInputs(readable, bundle.eval_transform)
    with torch.no_grad():
        stack = torch.stack([pictures[row] for row in range(len(readable))])
        inputs = FeatureInputs(model.image_tower.trunk(stack))
        known = PROMPTS.texts()
        texts = model.text_tower.trunk(bundle.tokenizer(known))

    def cached(asked: list[str]) -> torch.Tensor:
        return texts[[known.index(text) for text in asked]]

    heads = DualEncoder(model.image_tower.head, model.text_tower.head, model.logit_scale)
    found = measure_zeroshot(heads, readable, inputs, cached, PROMPTS, CONFIG, CPU)
    assert found == replace(zeroshot(pairs), unreadable=0)


def test_nothing_to_classify_gets_a_sentence(pairs: PairTable) -> None:
    broken = pairs.take(torch.tensor([6]).numpy())
    with pytest.raises(ConfigError, match="no picture can be read, for example .*0006_blue.jpg"):
        zeroshot(broken)
    other = pairs.take(torch.tensor([4]).numpy())
    with pytest.raises(ConfigError, match="no picture of .* it has purple"):
        zeroshot(other)


def retrieval(pairs: PairTable) -> tuple[dict[str, float], torch.Tensor, list[str], list[int]]:
    bundle = tiny_bundle(seed=3)
    bundle.model.train()
    inputs = PictureInputs(pairs, bundle.eval_transform)
    report, features = measure_pairs(
        bundle.model, pairs, inputs, bundle.tokenizer, CONFIG, CPU, bootstrap=5
    )
    assert bundle.model.training
    return report.metrics, features.owner, features.captions, features.rows.tolist()


def everything(pairs: PairTable) -> tuple[object, ...]:
    """Also with more ranks than images."""
    reused = zeroshot(pairs, reuse=True)
    return zeroshot(pairs), reused, two_classes(pairs.head(1)), *retrieval(pairs)


def test_two_ranks_measure_what_one_rank_measures(pairs: PairTable) -> None:
    alone = everything(pairs)
    whole, reused, _, recalls, owner, captions, rows = alone
    assert reused == whole
    assert rows == [row for row in range(20) if row != 6]
    assert captions == [text for row in rows for text in pairs.captions(row)]
    assert torch.equal(owner, torch.arange(19).repeat_interleave(2))
    for other in run_ranks(everything, 2, pairs):
        assert other[:3] == alone[:3]
        assert other[3] == pytest.approx(recalls)
        assert torch.equal(other[4], owner)
        assert other[5:] == (captions, rows)


def test_retrieval_without_captions_gets_a_sentence(pairs: PairTable) -> None:
    rows = [Pair(path, None, "val", path) for path in pairs.table["filepath"].to_pylist()]
    with pytest.raises(ConfigError, match="has no captions, so retrieval cannot be measured"):
        retrieval(PairTable.from_pairs(rows, Path(pairs.root), "bare"))
