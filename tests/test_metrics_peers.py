"""The same arrays through torchmetrics and by CLIP_benchmark's definitions: the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall
from torchmetrics.retrieval import RetrievalHitRate

from twotower import metrics


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def retrieval_case(seed):
    """60 images with 1 to 5 captions each, near enough that ranks differ."""
    generator = torch.Generator().manual_seed(seed)
    images = unit(60, 8, seed=seed)
    owner = torch.arange(60).repeat_interleave(torch.randint(1, 6, (60,), generator=generator))
    noise = torch.randn(len(owner), 8, generator=generator)
    return images, F.normalize(images[owner] + 0.5 * noise, dim=-1), owner


def hit_rate(scores, positive, k):
    """torchmetrics, which wants every (query, item) pair in a row."""
    queries = torch.arange(len(scores))[:, None].expand_as(scores)
    found = RetrievalHitRate(top_k=k)(
        scores.flatten(), positive.flatten(), indexes=queries.flatten()
    )
    return 100.0 * float(found)


def benchmark_recall(scores, positive, k):
    """CLIP_benchmark: true positives in the top k over all positives; above 0 is a hit."""
    top = scores.topk(k, dim=1).indices
    share = positive.gather(1, top).sum(1) / positive.sum(1)
    return 100.0 * float((share > 0).double().mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_equals_torchmetrics_and_clip_benchmark(seed, k):
    images, texts, owner = retrieval_case(seed)
    scores = texts @ images.T
    positive = owner[:, None] == torch.arange(len(images))
    found = metrics.retrieval_metrics(
        metrics.text_to_image_ranks(images, texts, owner),
        metrics.image_to_text_ranks(images, texts, owner),
    )
    directions = {"text_to_image": (scores, positive), "image_to_text": (scores.T, positive.T)}
    for name, (rows, hits) in directions.items():
        ours = found[f"{name}_R@{k}"]
        assert 20 < ours < 100 or k == 10
        assert ours == pytest.approx(hit_rate(rows, hits, k), rel=1e-6)
        assert ours == pytest.approx(benchmark_recall(rows, hits, k), rel=1e-12)


def classification_case(seed, images=300, classes=12):
    """Every class has images, of unequal number."""
    vectors = unit(classes, 8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.arange(classes // 2).repeat(images)])[:images]
    noise = torch.randn(images, 8, generator=generator)
    return F.normalize(vectors[labels] + 0.7 * noise, dim=-1), vectors, labels


def macro_recall(predicted, labels):
    """CLIP_benchmark: the macro average of scikit-learn's report over the classes that occur."""
    recalls = [
        float((predicted[labels == label] == label).double().mean()) for label in labels.unique()
    ]
    return 100.0 * sum(recalls) / len(recalls)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_zeroshot_metrics_equal_torchmetrics_and_clip_benchmark(seed):
    images, vectors, labels = classification_case(seed)
    logits = 100 * images @ vectors.T
    ranks = metrics.target_ranks(vectors, images, labels, block=7)
    for k in (1, 5):
        accuracy = MulticlassAccuracy(len(vectors), top_k=k, average="micro")(logits, labels)
        assert metrics.top_k_accuracy(ranks, k) == pytest.approx(100 * float(accuracy), rel=1e-6)
    recall = MulticlassRecall(len(vectors), average="macro")(logits, labels)
    ours = metrics.mean_per_class(ranks, labels)
    assert ours == pytest.approx(100 * float(recall), rel=1e-6)
    assert ours == pytest.approx(macro_recall(logits.argmax(1), labels), rel=1e-12)
    assert abs(ours - metrics.top_k_accuracy(ranks, 1)) > 0.1  # the classes' sizes matter


def test_the_mean_per_class_is_over_the_classes_that_have_images():
    ranks, labels = torch.tensor([1, 1, 2, 1]), torch.tensor([0, 0, 0, 4])
    assert metrics.mean_per_class(ranks, labels) == pytest.approx(100 * (2 / 3 + 1) / 2)
