"""Near duplicates: the same photograph after re-encoding, resizing or a small crop.

A thumb's luminance becomes the low frequencies of its cosine transform, weighted against the 1/f
fall of natural pictures. Candidates agree in 8 x 8 frequencies, one of them perhaps cropped in one
of five ways. Each is then aligned over 225 crops of either side and must agree in 12 x 12
frequencies, in brightness and in colour.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.quality.neighbours import EXACT, Pairs, near_pairs
from twotower.quality.picture import COLOUR_SIDE, SIDE

COARSE, FINE = 8, 12  # frequencies a side
CANDIDATE = 0.84  # least cosine of coarse descriptors
BORDER, STEP = 0.1, 0.025  # the most that is cropped of a side's length, and in what steps
# Windows (left, right, top, bottom) of the queries: shares that are cut off each side.
CORNERS = tuple((a, 0.07 - a, b, 0.07 - b) for a in (0, 0.07) for b in (0, 0.07))
LOOKS = ((0, 0, 0, 0), (0.05, 0.05, 0.05, 0.05), *CORNERS)
APART = 10.0  # levels (rms over 4 x 4 fields) by which brightness and colours may differ
GREY = 3.0  # levels: a picture whose colour planes deviate less from grey has no colours to compare
BATCH = 256


class NearPairs(NamedTuple):
    """Pairs (P, 2) of rows i < j, and how well each agrees: (P,) in [-1, 1]."""

    rows: Pairs
    similarity: npt.NDArray[np.float32]


def find_near(
    thumbs: npt.NDArray[np.uint8],
    least: float,
    device: torch.device | None = None,
    *,
    exact: int = EXACT,
) -> NearPairs:
    """The pairs of near duplicates among thumbs (N, THUMB)."""
    device = device or torch.device("cpu")
    luminance = thumbs[:, : SIDE**2]
    crops = [(_window(SIDE, t, b), _window(SIDE, le, r)) for le, r, t, b in LOOKS]
    crops = [(rows.to(device), columns.to(device)) for rows, columns in crops]

    def looks(first: int, last: int) -> Tensor:
        pictures = _pictures(luminance[first:last], device)
        cut = [describe(rows @ pictures @ columns.T, COARSE) for rows, columns in crops]
        return torch.stack(cut, 1)

    parts = range(0, len(thumbs), 4096)
    base = [describe(_pictures(luminance[i : i + 4096], device), COARSE) for i in parts]
    if not base:
        return NearPairs(np.empty((0, 2), np.int64), np.empty(0, np.float32))
    candidates = near_pairs(torch.cat(base), looks, CANDIDATE, exact=exact)
    agreement = [
        _agreement(thumbs[part[:, 0]], thumbs[part[:, 1]], device).cpu().numpy()
        for part in np.array_split(candidates, range(BATCH, len(candidates), BATCH))
        if len(part)
    ]
    similarity = np.concatenate([np.empty(0, np.float32), *agreement])
    near = similarity >= least
    return NearPairs(candidates[near], similarity[near])


def _pictures(luminance: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    return torch.from_numpy(luminance.copy()).to(device).float().view(-1, SIDE, SIDE)


def describe(pictures: Tensor, frequencies: int) -> Tensor:
    """Unit vectors of the lowest weighted frequencies but the mean: (N, 32, 32) -> (N, k * k)."""
    basis = _cosines(SIDE)[:frequencies].to(pictures.device)
    return _unit(basis @ pictures @ basis.T)


def _unit(spectrum: Tensor) -> Tensor:
    """(..., k, k) -> (..., k * k) of unit norm, weighted by frequency, so that the mean is none."""
    scale = torch.arange(spectrum.shape[-1], device=spectrum.device, dtype=spectrum.dtype)
    weights = (scale[:, None] ** 2 + scale**2).sqrt()
    return F.normalize((spectrum * weights).flatten(-2), dim=-1)


def _agreement(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    """How well pairs of thumbs (P, THUMB) agree when aligned: (P,), -1 for other colours."""
    one, two = (_pictures(x[:, : SIDE**2], device) for x in (a, b))
    colours = [_colours(x, device) for x in (a, b)]
    ways = [_aligned(one, two, *colours), _aligned(two, one, *reversed(colours))]
    return torch.maximum(*ways)


def _colours(thumbs: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    """Cb and Cr about grey at (P, 2, 8, 8)."""
    colours = torch.from_numpy(thumbs[:, SIDE**2 :].copy()).to(device).float() - 128
    return colours.view(-1, 2, COLOUR_SIDE, COLOUR_SIDE)


def _aligned(whole: Tensor, part: Tensor, whole_colours: Tensor, part_colours: Tensor) -> Tensor:
    """The best agreement of any crop of `whole` with `part`: (P,)."""
    cut = _crops(SIDE, whole.device)
    seen = _cosines(SIDE)[:FINE].to(whole.device) @ cut  # (W, k, 32): crop, then transform
    by_rows = torch.einsum("wkh,phx->pwkx", seen, whole)
    target = describe(part, FINE)[:, :, None]
    best = torch.full((len(whole),), -1.0, device=whole.device)
    window = torch.zeros(2, len(whole), dtype=torch.int64, device=whole.device)
    for column in range(len(cut)):
        score, row = (_unit(by_rows @ seen[column].T) @ target)[:, :, 0].max(1)
        better = score > best
        best = torch.where(better, score, best)
        window = torch.where(better, torch.stack([row, torch.full_like(row, column)]), window)
    light = _stretched(whole, cut, window) - part
    small = _crops(COLOUR_SIDE, whole.device)[:, None]
    colour = _stretched(whole_colours, small, window) - part_colours
    grey = _is_grey(whole_colours) | _is_grey(part_colours)
    same = (_apart(light[:, None]) <= APART) & (grey | (_apart(colour) <= APART))
    return torch.where(same, best, -1.0)


def _stretched(pictures: Tensor, crops: Tensor, window: Tensor) -> Tensor:
    """Pictures (P, ..., s, s), each by its window (2, P) of rows and columns."""
    return crops[window[0]] @ pictures @ crops[window[1]].transpose(-1, -2)


def _apart(difference: Tensor) -> Tensor:
    """The largest rms over the planes of (P, planes, s, s), after averaging 4 x 4 fields: (P,)."""
    fields = F.adaptive_avg_pool2d(difference, 4)
    return fields.square().mean((2, 3)).sqrt().amax(1)


def _is_grey(colours: Tensor) -> Tensor:
    return colours.abs().amax((1, 2, 3)) < GREY


@lru_cache
def _cosines(size: int) -> Tensor:
    """The orthonormal DCT-II as a matrix (frequencies, places)."""
    places = (torch.arange(size) + 0.5) / size
    matrix = torch.cos(torch.pi * torch.arange(size)[:, None] * places) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _crops(size: int, device: torch.device) -> Tensor:
    """The matrices (W, size, size) of all windows: steps cut off both ends of a side."""
    steps = range(round(BORDER / STEP) + 1)
    cut = [(a * STEP, b * STEP) for a in steps for b in steps if a + b < len(steps)]
    return torch.stack([_window(size, before, after) for before, after in cut]).to(device)


@lru_cache
def _window(size: int, before: float, after: float) -> Tensor:
    """The matrix (size, size) that stretches what is left of a side, linearly, to its length."""
    places = (torch.arange(size) + 0.5) / size * (1 - before - after) + before
    places = (places * size - 0.5).clamp(0, size - 1)
    below = places.long().clamp(max=size - 2)
    matrix = torch.zeros(size, size)
    line = torch.arange(size)
    matrix[line, below] = 1 - (places - below)
    matrix[line, below + 1] = places - below
    return matrix
