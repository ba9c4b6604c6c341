"""Contrastive losses: pure functions of features; gathering over ranks happens outside.

Each loss is a sum over rows, and a row needs every rank's columns but no other row. So the loss of
a batch is computed a block of rows at a time, together with its gradient, and the N x N matrix of
a batch never exists: memory grows with N, not with its square. The mean of this value over ranks
is the loss of the full batch (the "local loss" form).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.registry import Registry
from twotower.settings import setting
from twotower.train_config import LossConfig, SameImage

# Logits held at once: 4 MiB in fp32, a few times that with their gradient. Of large batches more,
# since each block adds to the gradient of all columns.
BLOCK_ELEMENTS = 2**20
MIN_BLOCK_ROWS = 256


class Pairs(NamedTuple):
    """Image-text pairs as the losses see them.

    Attributes:
        image, text: features (n, D) of unit norm.
        keys: (n, 2) int64, numbers of the image and of the caption: equal numbers, equal things.
    """

    image: Tensor
    text: Tensor
    keys: Tensor


class Temperature(NamedTuple):
    """The factor of the cosines, already `exp`-ed, and what the sigmoid loss adds; scalars."""

    scale: Tensor
    bias: Tensor


RowLoss = Callable[[Pairs, Pairs, Tensor, Temperature], Iterator[Tensor]]
"""(rows (b), columns (N), the rows' own columns (b,), temperature) -> terms whose sum is the sum of
the rows' losses; each is differentiated and freed before the next one is asked for."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss, and where the temperature starts when the weights bring none of this kind.

    Attributes:
        initial: (logit_scale as a logarithm, logit_bias); None keeps the model's own, without bias.
        chance_is_log_n: whether guessing costs the logarithm of the batch size.
    """

    terms: RowLoss
    initial: tuple[float, float] | None = None
    chance_is_log_n: bool = False


LOSSES: Registry[Loss] = Registry("loss")


@dataclass(kw_only=True)
class ClipLossConfig(LossConfig):
    """Softmax over the batch (Radford et al. 2021)."""


@dataclass(kw_only=True)
class SiglipLossConfig(LossConfig):
    """A sigmoid for each pair of the batch (Zhai et al. 2023); learns a bias too."""


@dataclass(kw_only=True)
class SoftTargetLossConfig(LossConfig):
    """Softmax against targets softened by how alike the images and the captions are."""

    target_scale: float = setting(
        0.0, "factor of the similarities in the targets; 0 is the learned logit_scale", ge=0
    )


def same_pairs(rows: Pairs, columns: Pairs) -> Tensor:
    """(b, N) bool: the pair of the column has the row's image or the row's caption."""
    equal = rows.keys[:, None, :] == columns.keys[None, :, :]
    return equal.any(-1)


def _own_columns(own: Tensor, columns: int) -> Tensor:
    return own[:, None] == torch.arange(columns, device=own.device)


@LOSSES.register("clip", ClipLossConfig)
def build_clip_loss(config: LossConfig) -> Loss:
    """The symmetric cross-entropy of CLIP (Radford et al. 2021, figure 3).

    Other pairs of one image: `positive` spreads the target evenly over them (Khosla et al. 2020,
    equation 2), `mask` leaves them out of the sum, `ignore` takes them for negatives.
    """

    def terms(
        rows: Pairs, columns: Pairs, own: Tensor, temperature: Temperature
    ) -> Iterator[Tensor]:
        same = None if config.same_image is SameImage.ignore else same_pairs(rows, columns)

        def one_way(queries: Tensor, items: Tensor) -> Tensor:
            logits = temperature.scale * (queries @ items.T)  # (b, N)
            if same is None:
                return F.cross_entropy(logits, own, reduction="sum")
            if config.same_image is SameImage.mask:
                others = same & ~_own_columns(own, len(items))
                return F.cross_entropy(logits.masked_fill(others, -math.inf), own, reduction="sum")
            positives = same.to(logits.dtype)
            return F.cross_entropy(
                logits, positives / positives.sum(1, keepdim=True), reduction="sum"
            )

        yield one_way(rows.image, columns.text) / 2
        yield one_way(rows.text, columns.image) / 2

    return Loss(terms=terms, chance_is_log_n=config.same_image is not SameImage.positive)


@LOSSES.register("siglip", SiglipLossConfig)
def build_siglip_loss(config: LossConfig) -> Loss:
    """The pairwise sigmoid loss, summed over a row (Zhai et al. 2023, algorithm 1).

    Other pairs of one image: `positive` makes them matches, `mask` leaves them out, `ignore` takes
    them for mismatches.
    """

    def terms(
        rows: Pairs, columns: Pairs, own: Tensor, temperature: Temperature
    ) -> Iterator[Tensor]:
        logits = temperature.scale * (rows.image @ columns.text.T) + temperature.bias  # (b, N)
        matches = _own_columns(own, len(columns.text))
        if config.same_image is SameImage.positive:
            matches = same_pairs(rows, columns)
        losses = F.softplus(torch.where(matches, -logits, logits))
        if config.same_image is SameImage.mask:
            losses = losses.masked_fill(same_pairs(rows, columns) & ~matches, 0.0)
        yield losses.sum()

    return Loss(terms=terms, initial=(math.log(10), -10.0))


@LOSSES.register("soft_target", SoftTargetLossConfig)
def build_soft_target_loss(config: SoftTargetLossConfig) -> Loss:
    """The symmetric cross-entropy against softmax((I I^T + T T^T) / 2 * target_scale).

    The target of a row is a distribution and carries no gradient. The mean similarity of other
    pairs of one image: `positive` counts as 1, `mask` leaves them out, `ignore` is as measured.
    """

    def terms(
        rows: Pairs, columns: Pairs, own: Tensor, temperature: Temperature
    ) -> Iterator[Tensor]:
        factor = config.target_scale or temperature.scale.detach()
        with torch.no_grad():
            alike = (rows.image @ columns.image.T + rows.text @ columns.text.T) / 2  # (b, N)
            left_out = torch.zeros_like(alike, dtype=torch.bool)
            if config.same_image is SameImage.positive:
                alike = alike.masked_fill(same_pairs(rows, columns), 1.0)
            elif config.same_image is SameImage.mask:
                left_out = same_pairs(rows, columns) & ~_own_columns(own, len(columns.text))
            targets = (factor * alike).masked_fill_(left_out, -math.inf).softmax(1)

        def one_way(queries: Tensor, items: Tensor) -> Tensor:
            logits = temperature.scale * (queries @ items.T)
            likely = logits.masked_fill(left_out, -math.inf).log_softmax(1)
            return -(targets * likely.masked_fill(left_out, 0.0)).sum()

        yield one_way(rows.image, columns.text) / 2
        yield one_way(rows.text, columns.image) / 2

    return Loss(terms=terms)


def contrastive_loss(
    loss: Loss,
    local: Pairs,
    everyone: Pairs,
    temperature: Temperature,
    first_row: int = 0,
    block_rows: int = 0,
) -> Tensor:
    """The loss of this rank's pairs against every rank's, a block of rows at a time.

    Args:
        local: this rank's B pairs.
        everyone: all N pairs in rank order.
        temperature: the learned scalars.
        first_row: where this rank's pairs begin among all.
        block_rows: rows whose logits are held at once; 0 chooses by N.

    Returns:
        The mean over the B rows, in nats, a scalar; for features that tell nothing, ln N (softmax).
    """
    rows = block_rows or max(MIN_BLOCK_ROWS, BLOCK_ELEMENTS // len(everyone.image))
    blocks = (local.keys, everyone.keys, first_row, rows)
    value: Tensor = _Blocks.apply(loss.terms, blocks, *local[:2], *everyone[:2], *temperature)
    return value


class _Blocks(torch.autograd.Function):
    """Sums a row loss over blocks; the gradient is computed with the value and kept instead of it.

    What is kept for the backward pass are tensors of the inputs' sizes, (B, D) and (N, D).
    """

    @staticmethod
    def forward(
        ctx: Any,
        row_loss: RowLoss,
        blocks: tuple[Tensor, Tensor, int, int],
        *inputs: Tensor,
    ) -> Tensor:
        keys, all_keys, first_row, block = blocks
        count = len(keys)
        wanted = any(ctx.needs_input_grad)
        gradients = [torch.zeros_like(tensor) for tensor in inputs] if wanted else []
        total = inputs[0].new_zeros(())
        shared = [tensor.detach().requires_grad_(wanted) for tensor in inputs[2:]]
        for start in range(0, count, block):
            rows = slice(start, min(start + block, count))
            own = torch.arange(rows.start, rows.stop, device=keys.device) + first_row
            parts = [tensor[rows].detach().requires_grad_(wanted) for tensor in inputs[:2]]
            image, text, all_image, all_text, scale, bias = leaves = [*parts, *shared]
            into = [whole[rows] for whole in gradients[:2]] + gradients[2:]
            with torch.set_grad_enabled(wanted):
                for term in row_loss(
                    Pairs(image, text, keys[rows]),
                    Pairs(all_image, all_text, all_keys),
                    own,
                    Temperature(scale, bias),
                ):
                    total += term.detach()
                    if wanted:
                        _add_gradient(term, leaves, into)
        ctx.save_for_backward(*gradients)
        ctx.count = count
        return total / count

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = outputs
        return (None, None, *(factor / ctx.count * part for part in ctx.saved_tensors))


def _add_gradient(term: Tensor, leaves: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    found = torch.autograd.grad(term, leaves, allow_unused=True)
    for whole, addend in zip(into, found, strict=True):
        if addend is not None:
            whole += addend
