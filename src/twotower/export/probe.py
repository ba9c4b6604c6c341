"""What both sides are shown: real pictures and captions, whose features must come out the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from twotower.checkpoint.foreign import read_json
from twotower.config import DataConfig
from twotower.data.images import UnreadableImage, decode_image, stack_pictures
from twotower.data.pairs import DATASETS, load_pairs
from twotower.models.dual_encoder import DualEncoder, ModelBundle, Tokenizer
from twotower.runs import NOTE
from twotower.settings import ConfigError, from_plain

log = logging.getLogger(__name__)

PICTURES = 4
# Photographs and a drawing that come with matplotlib, for when the run's own are not at hand.
PACKAGED = ("grace_hopper.jpg", "Minduka_Present_Blue_Pack.png", "logo2.png")
CAPTIONS = (
    "a dog runs on the beach",
    "",
    "A woman in uniform in front of a flag; it's 1984!",
    "one two three four five six seven eight nine ten " * 20,  # longer than any context
)
# Of a feature's norm. The same numbers in another order (torch takes other kernels for locked
# weights, too) give about 1e-6, the wrong activation or wrong constants 1e-2.
TOLERANCE = 1e-4

Features = tuple[Tensor, Tensor]  # (P, D) of the pictures and (C, D) of the captions


@dataclass(frozen=True)
class Probe:
    """Pictures as a tower takes them, uint8 (P, 3, S, S), and captions."""

    pictures: Tensor
    captions: Sequence[str]

    def images(self) -> list[Image.Image]:
        """The pictures for readers that begin with Pillow; S x S, so that none resizes them."""
        return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in self.pictures]


def make_probe(bundle: ModelBundle, checkpoint: Path) -> Probe:
    """Pictures and captions of the data that the run beside `checkpoint` had, or packaged ones."""
    pictures, captions = _of_the_run(checkpoint)
    if not pictures:
        from matplotlib.cbook import get_sample_data

        paths = [get_sample_data(name, asfileobj=False) for name in PACKAGED]
        pictures = [decode_image(path) for path in paths]
    prepared = stack_pictures([bundle.eval_transform(picture) for picture in pictures])
    return Probe(prepared, [*CAPTIONS, *captions])


def _of_the_run(checkpoint: Path) -> tuple[list[Image.Image], list[str]]:
    """The first pictures of the run's data set that can be read; none where it is not at hand."""
    try:
        told = dict(read_json(checkpoint.parent / NOTE).get("data.", {}))
        source = told.pop("source", None)
        # Synthetic pictures are no real ones, and loading them may write them.
        if source not in DATASETS or source == "synthetic":
            return [], []
        config_class = cast(type[DataConfig], DATASETS.config_class(source))
        pairs = load_pairs(from_plain(config_class, told)).head(PICTURES)
        pictures = [decode_image(pairs.path(row)) for row in range(len(pairs))]
        captions = [caption for row in range(len(pairs)) for caption in pairs.captions(row)[:1]]
    except (ConfigError, UnreadableImage, TypeError) as error:
        log.debug("the pictures of the run are not at hand: %s", error)
        return [], []
    return pictures, captions


@torch.inference_mode()
def features_of(model: DualEncoder, tokenizer: Tokenizer, probe: Probe) -> Features:
    """What twotower makes of a probe, on the CPU in fp32; not of unit norm."""
    model = model.cpu().float().eval()
    return model.encode_image(probe.pictures), model.encode_text(tokenizer(probe.captions))


def check_equal(expected: Features, found: Features, reader: str) -> None:
    """Make sure that a reader's features are the checkpoint's.

    Raises:
        RuntimeError: they differ by more than `TOLERANCE` of a feature's norm.
    """
    for tower, ours, theirs in zip(("image", "text"), expected, found, strict=True):
        if ours.shape != theirs.shape:
            raise RuntimeError(
                f"{reader} gives {tower} features of shape {tuple(theirs.shape)} where the "
                f"checkpoint gives {tuple(ours.shape)}; nothing was written"
            )
        difference = float(((theirs - ours).norm(dim=1) / ours.norm(dim=1)).max())
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"the {tower} features that {reader} gives differ from those of the checkpoint "
                f"by {difference:.1e} of their norm; nothing was written"
            )
