"""Contrastive losses: pure functions of features; gathering over ranks happens outside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    all_image_features: Tensor,
    all_text_features: Tensor,
    logit_scale: Tensor,
    first_row: int = 0,
) -> Tensor:
    """The symmetric cross-entropy of CLIP over this rank's rows against every rank's columns.

    The mean over ranks of this value is the loss of the full batch (the "local loss" form: logits
    are (B, N) and never (N, N)). Radford et al. 2021, figure 3.

    Args:
        image_features, text_features: (B, D) of unit norm, this rank's pairs.
        all_image_features, all_text_features: (N, D), every rank's pairs in rank order.
        logit_scale: the factor of the cosines, already `exp`-ed; a scalar.
        first_row: where this rank's pairs begin among all.

    Returns:
        The loss in nats, a scalar; ln N for features that tell nothing.
    """
    labels = torch.arange(first_row, first_row + len(image_features), device=image_features.device)
    per_image = logit_scale * image_features @ all_text_features.T  # (B, N)
    per_text = logit_scale * text_features @ all_image_features.T  # (B, N)
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
