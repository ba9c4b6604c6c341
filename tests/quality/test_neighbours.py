"""Near pairs equal those of a double loop; with lists, hardly any that is really near is missed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.quality import neighbours
from twotower.quality.groups import components
from twotower.quality.neighbours import near_pairs


def vectors(count: int, near: int, dim: int = 24) -> Tensor:
    """Random unit vectors, the last `near` of them beside the first."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(count, dim, generator=generator)
    base[-near:] = base[:near] + 0.15 * torch.randn(near, dim, generator=generator)
    return F.normalize(base, dim=1)


def plain(base: Tensor):  # noqa: ANN201
    return lambda first, last: base[first:last, None]


def test_every_pair_is_found_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    base = vectors(150, 40)
    cosines = (base @ base.T).triu(1)
    expected = (cosines >= 0.5).nonzero().numpy()
    assert len(expected) > 40
    for name, size in (("QUERIES", 7), ("MEMBERS", 11)):
        monkeypatch.setattr(neighbours, name, size)
    np.testing.assert_array_equal(near_pairs(base, plain(base), 0.5), expected)


def test_any_of_a_rows_queries_may_be_near() -> None:
    base = torch.eye(6)
    queries = torch.stack([base, base.roll(2, 0)], 1)
    found = near_pairs(base, lambda first, last: queries[first:last], 0.9)
    assert found.tolist() == [[0, 2], [0, 4], [1, 3], [1, 5], [2, 4], [3, 5]]


def test_lists_find_what_is_near() -> None:
    base = vectors(3000, 500)
    expected = {tuple(pair) for pair in near_pairs(base, plain(base), 0.9).tolist()}
    found = {tuple(pair) for pair in near_pairs(base, plain(base), 0.9, exact=100).tolist()}
    assert found <= expected
    assert len(found) >= 0.99 * len(expected) >= 400


def test_a_thousand_copies_make_no_million_pairs() -> None:
    base = torch.ones(1000, 4) / 2
    pairs = near_pairs(base, plain(base), 0.9)
    assert len(pairs) <= 1000 * neighbours.MOST
    assert len(np.unique(components(pairs, 1000))) == 1


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_for_a_pair(count: int) -> None:
    base = torch.ones(count, 4)
    assert near_pairs(base, plain(base), 0.5).shape == (0, 2)
