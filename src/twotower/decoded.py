"""Between decoding and a tower's transform: what the one hands to the other."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL.Image import Image
from torch import Tensor


class Decoded(NamedTuple):
    """An upright RGB picture (H, W, 3), and its height and width in the file.

    The latter are larger where decoding left pixels out.
    """

    pixels: npt.NDArray[np.uint8]
    size: tuple[int, int]


Picture = Image | Decoded  # an image is RGB


class ImageTransform(Protocol):
    """A picture -> uint8 (3, H, W), a tower's input.

    `side`: decoding need not leave more pixels of the picture's shorter side; 0 wants all.
    """

    @property
    def side(self) -> int: ...

    def __call__(self, picture: Picture) -> Tensor: ...
