"""Recall, ranks and intervals against cases made by hand and a double loop."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from twotower import metrics


def looped_ranks(images, texts, owner):
    """The definitions of the module's docstring, one query at a time."""
    scores = (texts @ images.T).tolist()
    to_image, to_text = [], []
    for caption, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda column: (-row[column], column))
        to_image.append(order.index(int(owner[caption])) + 1)
    for image in range(len(images)):
        own = [c for c in range(len(texts)) if owner[c] == image]
        order = sorted(range(len(texts)), key=lambda c: (-scores[c][image], c))
        to_text.append(min(order.index(c) for c in own) + 1 if own else 0)
    return to_image, to_text


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_ranks_equal_a_double_loop_with_five_captions_an_image(block):
    generator = torch.Generator().manual_seed(1)
    images = F.normalize(torch.randn(12, 6, generator=generator), dim=1)
    owner = torch.arange(60) // 5
    texts = F.normalize(images[owner] + 0.8 * torch.randn(60, 6, generator=generator), dim=1)
    to_image, to_text = looped_ranks(images, texts, owner)
    assert metrics.text_to_image_ranks(images, texts, owner, block).tolist() == to_image
    assert metrics.image_to_text_ranks(images, texts, owner, block).tolist() == to_text
    assert max(to_image) > 1 and max(to_text) > 1


def test_hand_made_case_with_five_captions():
    # Two images; the second image's five captions: one points at it, four at the first.
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0]] + [[0.9, 0.1]] * 4 + [[0.0, 1.0]] + [[0.8, 0.2]] * 4)
    owner = torch.tensor([0] * 5 + [1] * 5)
    to_image = metrics.text_to_image_ranks(images, texts, owner)
    to_text = metrics.image_to_text_ranks(images, texts, owner)
    assert to_image.tolist() == [1, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    assert to_text.tolist() == [1, 1]
    assert metrics.recall_at_k(to_image, 1) == 60.0
    assert metrics.recall_at_k(to_text, 1) == 100.0  # any of the five is a hit
    named = metrics.retrieval_metrics(to_image, to_text)
    assert named["mean_recall"] == pytest.approx((60 + 100 + 100 + 100 + 100 + 100) / 6)
    assert named["text_to_image_median_rank"] == 1.0


def test_an_image_without_captions_is_a_candidate_but_no_query():
    images = torch.eye(3)
    texts = torch.eye(3)[[0, 2]]
    owner = torch.tensor([0, 2])
    assert metrics.image_to_text_ranks(images, texts, owner).tolist() == [1, 0, 1]
    assert metrics.text_to_image_ranks(images, texts, owner).tolist() == [1, 1]


def test_a_collapsed_model_scores_chance():
    images, texts, owner = torch.ones(100, 4), torch.ones(100, 4), torch.arange(100)
    assert metrics.recall_at_k(metrics.text_to_image_ranks(images, texts, owner), 10) == 10.0
    assert metrics.recall_at_k(metrics.image_to_text_ranks(images, texts, owner), 10) == 10.0


def test_intervals_resample_images_with_all_their_captions():
    owner = torch.arange(500) // 5
    hit = torch.rand(100, generator=torch.Generator().manual_seed(0)) < 0.5
    ranks = torch.where(hit, 1, 50)
    to_image = ranks[owner]  # five captions of an image hit or miss together
    intervals = metrics.bootstrap_intervals(to_image, ranks, owner, 2000)
    low, high = intervals["text_to_image_R@1"]
    share = float(hit.float().mean())
    expected = 1.96 * 100 * np.sqrt(share * (1 - share) / 100)
    assert low < 100 * share < high
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)
    assert intervals["text_to_image_R@1"] == intervals["image_to_text_R@1"]


def test_broken_features_rank_last():
    images, texts, owner = torch.eye(4), torch.eye(4), torch.arange(4)
    texts[1] = torch.nan
    to_image = metrics.text_to_image_ranks(images, texts, owner)
    assert to_image.tolist() == [1, 5, 1, 1]
    assert metrics.image_to_text_ranks(torch.full((4, 4), torch.nan), texts, owner).min() > 4


def test_a_part_of_the_images_ranks_as_in_the_whole():
    generator = torch.Generator().manual_seed(3)
    images = F.normalize(torch.randn(20, 4, generator=generator), dim=1)
    owner = torch.arange(60) // 3
    texts = F.normalize(images[owner] + torch.randn(60, 4, generator=generator), dim=1)
    whole = metrics.image_to_text_ranks(images, texts, owner)
    parts = [range(0, 7), range(7, 7), range(7, 20)]
    ranks = [metrics.image_to_text_ranks(images, texts, owner, 5, part) for part in parts]
    assert torch.equal(torch.cat(ranks), whole)


def test_no_captions_and_no_queries():
    images, none = torch.eye(3), torch.empty(0, dtype=torch.int64)
    assert metrics.image_to_text_ranks(images, torch.empty(0, 3), none).tolist() == [0, 0, 0]
    assert metrics.text_to_image_ranks(images, torch.empty(0, 3), none).tolist() == []


def test_many_items_make_smaller_blocks(monkeypatch):
    """What is held at a time does not grow with the number of items."""
    shapes = []
    plain = metrics._ranks
    monkeypatch.setattr(metrics, "SCORES", 100)
    monkeypatch.setattr(
        metrics, "_ranks", lambda scores, *rest: shapes.append(scores.shape) or plain(scores, *rest)
    )
    images, texts, owner = torch.eye(40), torch.eye(40), torch.arange(40)
    assert metrics.text_to_image_ranks(images, texts, owner).tolist() == [1] * 40
    assert metrics.image_to_text_ranks(images, texts, owner).tolist() == [1] * 40
    assert max(rows * columns for rows, columns in shapes) <= 100
