"""Coloured shapes with captions that say what is where: data for tests, made in an instant."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from twotower.data.layout import folder_in_one_piece
from twotower.data.manifest import ManifestConfig, load_manifest, write_manifest
from twotower.data.pairs import DATASETS, PairTable
from twotower.data.splits import SplitConfig
from twotower.settings import setting

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 119, 180),
    "yellow": (240, 200, 20),
    "purple": (148, 103, 189),
    "orange": (255, 127, 14),
    "black": (20, 20, 20),
    "pink": (240, 130, 190),
}
POLYGONS = {"triangle": 3, "square": 4, "hexagon": 6}
SHAPES = ("circle", "ring", "star", *POLYGONS)
RADII = {"small": 0.09, "large": 0.15}  # of the picture's side
POSITIONS = {
    f"{vertical} {horizontal}".replace("middle centre", "centre"): (x, y)
    for (vertical, y), (horizontal, x) in itertools.product(
        {"top": 0.2, "middle": 0.5, "bottom": 0.8}.items(),
        {"left": 0.2, "centre": 0.5, "right": 0.8}.items(),
    )
}
TEMPLATES = (
    "a {size} {colour} {shape} in the {position}",
    "{colour} {shape}, {size}, {position}",
    "there is a {size} {shape} in the {position} and it is {colour}",
    "a picture of one {colour} {shape} that is {size}, in the {position}",
    "in the {position} stands one {size} {colour} {shape}",
)
OVERSAMPLING = 4


class Scene(NamedTuple):
    """What is on a picture, in the words of its captions."""

    size: str
    colour: str
    shape: str
    position: str


@dataclass(kw_only=True)
class SyntheticConfig(SplitConfig):
    """Generated pictures of one shape each."""

    folder: str = setting(
        "dataset/synthetic", "folder; each choice of the numbers has its own in it"
    )
    count: int = setting(64, "pictures; above 864 there are near copies", ge=2)
    size: int = setting(32, "pixels a side", ge=8, le=1024)
    captions_per_image: int = setting(3, "captions a picture", ge=1, le=len(TEMPLATES))
    seed: int = setting(0, "seed of what is on the pictures", ge=0)
    val_fraction: float = setting(0.25, "share of the images that validate", ge=0, lt=1)


@DATASETS.register("synthetic", SyntheticConfig)
def load_synthetic(config: SyntheticConfig) -> PairTable:
    """The pictures, made now if they are not there: deterministic, so any process makes the same.

    Raises:
        ConfigError: the folder cannot be written.
    """
    folder = make_synthetic(config)
    manifest = ManifestConfig(
        manifest=str(folder / "manifest.csv"),
        val_fraction=config.val_fraction,
        split_seed=config.split_seed,
    )
    return replace(load_manifest(manifest), name="synthetic")


def make_synthetic(config: SyntheticConfig) -> Path:
    """Write the pictures and `manifest.csv`, unless they are there, and return their folder."""
    numbers = (config.count, config.size, config.captions_per_image, config.seed)
    folder = Path(config.folder) / "-".join(map(str, numbers))
    if (folder / "manifest.csv").is_file():
        return folder
    rows = []
    with folder_in_one_piece(folder) as temporary:
        for number, scene in enumerate(_scenes(config.count, config.seed)):
            name = f"{number:05d}.png"
            draw(scene, config.size, seed=f"{config.seed}/{number}").save(temporary / name)
            captions = [template.format(**scene._asdict()) for template in TEMPLATES]
            rows += [(name, caption) for caption in captions[: config.captions_per_image]]
        write_manifest(temporary / "manifest.csv", ("filepath", "caption"), rows)
    return folder


def _scenes(count: int, seed: int) -> list[Scene]:
    """Scenes in a random order, each once before any comes again."""
    every = [Scene(*words) for words in itertools.product(RADII, COLOURS, SHAPES, POSITIONS)]
    random.Random(seed).shuffle(every)
    return list(itertools.islice(itertools.cycle(every), count))


def draw(scene: Scene, size: int, seed: str) -> Image.Image:
    """One scene, `size` pixels square; `seed` moves and turns it a little and tints the ground."""
    rng = random.Random(seed)
    side = size * OVERSAMPLING
    ground = tuple(rng.randrange(225, 256) for _ in range(3))
    image = Image.new("RGB", (side, side), ground)
    x, y = (side * (place + rng.uniform(-0.03, 0.03)) for place in POSITIONS[scene.position])
    radius = side * RADII[scene.size] * rng.uniform(0.9, 1.1)
    _draw_shape(ImageDraw.Draw(image), scene, (x, y), radius, turn=rng.uniform(-0.2, 0.2))
    return image.resize((size, size), Image.Resampling.BOX)


def _draw_shape(
    canvas: ImageDraw.ImageDraw,
    scene: Scene,
    centre: tuple[float, float],
    radius: float,
    turn: float,
) -> None:
    colour = COLOURS[scene.colour]
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if scene.shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif scene.shape == "ring":
        canvas.ellipse(box, outline=colour, width=max(1, round(radius * 0.35)))
    elif scene.shape == "star":
        canvas.polygon(_corners(centre, (radius, radius * 0.42), 10, turn), fill=colour)
    else:
        canvas.polygon(_corners(centre, (radius,), POLYGONS[scene.shape], turn), fill=colour)


def _corners(
    centre: tuple[float, float], radii: Sequence[float], count: int, turn: float
) -> list[tuple[float, float]]:
    """Corners around a centre, the radii taking turns; one is on top, but squares lie flat."""
    turn += math.pi / 4 if count == 4 else 0.0
    angles = (turn + 2 * math.pi * corner / count for corner in range(count))
    return [
        (centre[0] + r * math.sin(angle), centre[1] - r * math.cos(angle))
        for angle, r in zip(angles, itertools.cycle(radii), strict=False)
    ]
