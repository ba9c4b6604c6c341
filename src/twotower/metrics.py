"""Metrics of retrieval, with several captions to one image, and of zero-shot classification.

All are pure functions of features and labels, and hold a block of queries' scores at a time.

Definitions (CLIP-style, as Radford et al. 2021 and Karpathy and Fei-Fei 2015 report them):

* text -> image: each caption is a query among all images; a hit if its image is in the top k.
* image -> text: each image that has captions is a query among all captions; a hit if *any* of its
  captions is in the top k. This is not the recall of information retrieval (positives found /
  positives).
* R@k is the share of queries with a hit, in percent; the median rank counts from 1; the mean
  recall is the mean of R@1, R@5 and R@10 in both directions.
* Zero-shot: each image is a query among the vectors of all classes; top-k accuracy is the share
  of images whose class is in the top k; the mean per class is the mean of each class's top-1
  share, over the classes that have images (balanced accuracy). Both in percent.
* Equal scores rank by ascending position, so that a collapsed model (all scores equal) scores
  chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

KS = (1, 5, 10)
BLOCK = 1024
SCORES = 1 << 23  # scores held at a time: 32 MiB in fp32


def _block(block: int, columns: int) -> int:
    """Queries a block: as many as asked for, but no more scores at a time than `SCORES`."""
    return max(1, min(block, SCORES // max(columns, 1)))


def _ranks(scores: Tensor, best: Tensor, column: Tensor) -> Tensor:
    """Ranks from 1 of the entry (best score, column) of each row of `scores` (b, n)."""
    columns = torch.arange(scores.shape[1], device=scores.device)
    ahead = ~(scores <= best[:, None])  # a NaN is ahead of everything: broken features rank last
    ahead |= (scores == best[:, None]) & (columns < column[:, None])
    return ahead.sum(1) + 1


def target_ranks(items: Tensor, queries: Tensor, target: Tensor, block: int = BLOCK) -> Tensor:
    """The rank of each query's item among all items: (Q,) int64, from 1.

    Args:
        items: (N, D) of unit norm: images, or the vectors of classes.
        queries: (Q, D) of unit norm: captions, or images.
        target: (Q,) rows of the queries' items.
        block: most queries whose scores are held at a time.
    """
    ranks = [target[:0]]
    step = _block(block, len(items))
    for start in range(0, len(queries), step):
        rows = target[start : start + step]
        scores = queries[start : start + step] @ items.T  # (step, N)
        ranks.append(_ranks(scores, scores.gather(1, rows[:, None])[:, 0], rows))
    return torch.cat(ranks)


def text_to_image_ranks(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor, block: int = BLOCK
) -> Tensor:
    """The rank of each caption's image among all images: (C,) int64, from 1.

    Args:
        image_features: (N, D) of unit norm.
        text_features: (C, D) of unit norm.
        image_of_text: (C,) rows of the captions' images.
        block: most captions whose scores are held at a time.
    """
    return target_ranks(image_features, text_features, image_of_text, block)


def image_to_text_ranks(
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Tensor,
    block: int = BLOCK,
    images: range | None = None,
) -> Tensor:
    """The rank of each image's best caption among all: (N,) int64, from 1; 0 without captions.

    Arguments as in `text_to_image_ranks`; `images` are the rows to rank, by default all.
    """
    chosen = range(len(image_features)) if images is None else images
    columns = torch.arange(len(text_features), device=text_features.device)
    ranks = [columns[:0]]
    if not len(columns):
        return image_of_text.new_zeros(len(chosen))
    step = _block(block, len(columns))
    for start in range(chosen.start, chosen.stop, step):
        features = image_features[start : min(start + step, chosen.stop)]
        scores = features @ text_features.T  # (step, C)
        rows = torch.arange(start, start + len(features), device=features.device)
        own = image_of_text[None, :] == rows[:, None]
        best = scores.masked_fill(~own, -torch.inf).amax(1)
        first = torch.where(own & (scores == best[:, None]), columns, len(columns)).amin(1)
        ranks.append(torch.where(own.any(1), _ranks(scores, best, first), 0))
    return torch.cat(ranks)


def recall_at_k(ranks: Tensor, k: int) -> float:
    """The share of queries whose rank is at most k, in percent; queries of rank 0 do not count."""
    asked = ranks[ranks > 0]
    return 100.0 * float((asked <= k).double().mean()) if len(asked) else float("nan")


def top_k_accuracy(ranks: Tensor, k: int) -> float:
    """The share of images whose class ranks at most k, in percent; ranks as of `target_ranks`."""
    return recall_at_k(ranks, k)


def mean_per_class(ranks: Tensor, labels: Tensor) -> float:
    """The mean over the classes that have images of their top-1 shares, in percent.

    Args:
        ranks: (N,) of each image's class among all classes, from 1.
        labels: (N,) of the images' classes.
    """
    count = torch.bincount(labels)
    hits = torch.bincount(labels, weights=(ranks == 1).double())
    there = count > 0
    return 100.0 * float((hits[there] / count[there]).mean())


def median_rank(ranks: Tensor) -> float:
    """The median rank, from 1; the mean of the two middle ones when the count is even."""
    asked = ranks[ranks > 0]
    return float(np.median(asked.numpy())) if len(asked) else float("nan")


def signed(name: str, value: float) -> float:
    """A metric's value, or a change of it, so that more is better: ranks count negative."""
    return -value if name.endswith("rank") else value


def retrieval_metrics(
    to_image: Tensor, to_text: Tensor, ks: Sequence[int] = KS
) -> dict[str, float]:
    """All metrics by name from the ranks of both directions; recalls in percent."""
    metrics = {}
    for name, ranks in (("text_to_image", to_image), ("image_to_text", to_text)):
        for k in ks:
            metrics[f"{name}_R@{k}"] = recall_at_k(ranks, k)
        metrics[f"{name}_median_rank"] = median_rank(ranks)
    recalls = [value for key, value in metrics.items() if "_R@" in key]
    metrics["mean_recall"] = sum(recalls) / len(recalls)
    return metrics


def bootstrap_intervals(
    to_image: Tensor,
    to_text: Tensor,
    image_of_text: Tensor,
    resamples: int,
    seed: int = 0,
    ks: Sequence[int] = KS,
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of the recalls, resampling *images* with all their captions.

    Captions of one image are not independent, so resampling captions would give intervals too
    narrow (cluster bootstrap; Efron and Tibshirani 1993, chapter 8).

    Returns:
        (low, high) in percent for each `..._R@k` and for `mean_recall`.
    """
    count = len(to_text)
    if not resamples or not count:
        return {}
    rng = np.random.default_rng(seed)
    # times[b, i]: how often image i is drawn in resample b
    times = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    owner = image_of_text.numpy()
    groups = {
        "text_to_image": (to_image.numpy(), owner),
        "image_to_text": (to_text.numpy(), np.arange(count)),
    }
    curves: dict[str, np.ndarray] = {}
    for name, (ranks, image) in groups.items():
        asked = np.bincount(image, weights=ranks > 0, minlength=count)
        for k in ks:
            hits = np.bincount(image, weights=(ranks > 0) & (ranks <= k), minlength=count)
            with np.errstate(invalid="ignore"):
                curves[f"{name}_R@{k}"] = 100.0 * (times @ hits) / (times @ asked)
    curves["mean_recall"] = np.mean(list(curves.values()), axis=0)
    return {
        name: (float(np.nanpercentile(values, 2.5)), float(np.nanpercentile(values, 97.5)))
        for name, values in curves.items()
    }
