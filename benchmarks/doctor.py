"""Faults planted into a copy of your data, and how many of them `twotower doctor` finds.

    python benchmarks/doctor.py dataset/flickr8k/Images
    python benchmarks/doctor.py captions.csv --duplicates 200 --leaks 100

The source, a folder of pictures or a manifest, is read and not changed: planted files are written
to a temporary folder (or to --output), and a manifest there names them beside the untouched files.
Corrupt, CMYK and EXIF-rotated files take the place of their originals; duplicates, leaks and bombs
come on top. Duplicates and leaks are re-encoded at quality 70, resized to 80 %, or cropped by 5 %
on each side, in turn. A false alarm is an untouched file with a fault, or called a duplicate or a
leak; true ones that were there before count too, so look at the page.
"""

from __future__ import annotations

import argparse
import csv
import io
import random
import struct
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from twotower.config import DataConfig
from twotower.data.images import decode_image
from twotower.data.pairs import PairTable
from twotower.data.splits import draw_splits
from twotower.doctor_config import COPIES, FAULTS
from twotower.embedding.source import pairs_to_encode
from twotower.hydra_app import compose
from twotower.quality.doctor import examine, lines, write

EXPECTED = {
    "corrupt": FAULTS,
    "duplicates": ("duplicate", "near_duplicate"),
    "leaks": ("leak", "near_leak"),
    "bombs": ("huge",),
    "cmyk": ("cmyk",),
    "rotated": ("exif_rotated",),
}
NUMBERS = {"corrupt": 50, "duplicates": 20, "leaks": 10, "bombs": 5, "cmyk": 5, "rotated": 5}


def quality_70(image: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(jpeg(image, 70)))


def resized(image: Image.Image) -> Image.Image:
    size = [max(1, round(side * 0.8)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def cropped(image: Image.Image) -> Image.Image:
    width, height = image.size
    return image.crop(
        (round(0.05 * width), round(0.05 * height), round(0.95 * width), round(0.95 * height))
    )


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


CHANGES: tuple[Callable[[Image.Image], Image.Image], ...] = (quality_70, resized, cropped)


def corrupt(data: bytes, number: int, rng: random.Random) -> bytes:
    """A file damaged in one of six ways, in turn."""
    half, size = len(data) // 2, min(2048, len(data) // 4)
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: data[: int(len(data) * rng.uniform(0.2, 0.95))],
        lambda: data[:half] + bytes(len(data) - half),
        lambda: data[:half] + rng.randbytes(size) + data[half + size :],
        lambda: rng.randbytes(64) + data[64:],
        lambda: b"",
        lambda: b"<html><body>404 Not Found</body></html>",
    )
    return ways[number % len(ways)]()


def bomb(side: int) -> bytes:
    """A black PNG of side x side pixels, in few bytes."""
    packer, rows = zlib.compressobj(9), []
    for _ in range(side):
        rows.append(packer.compress(bytes(1 + -(-side // 8))))
    body = b"".join([*rows, packer.flush()])
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", body)]
    file = b"\x89PNG\r\n\x1a\n"
    for kind, content in [*chunks, (b"IEND", b"")]:
        check = struct.pack(">I", zlib.crc32(kind + content))
        file += struct.pack(">I", len(content)) + kind + content + check
    return file


def turned(image: Image.Image) -> bytes:
    """A picture stored on its side, with the EXIF tag that turns it back."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()


@dataclass
class Planter:
    """Writes planted files and a manifest of them and the rest; `planted` says which are what."""

    pairs: PairTable
    folder: Path
    rng: random.Random
    planted: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))

    def plant(self, numbers: dict[str, int]) -> Path:
        """The manifest."""
        splits = self.pairs.table["split"].to_pylist()
        rows = list(range(len(self.pairs)))
        self.rng.shuffle(rows)
        train = iter([row for row in rows if splits[row] == "train"])
        held_out = iter([row for row in rows if splits[row] != "train"])
        replaced: dict[int, Path] = {}
        added: list[tuple[Path, int, str]] = []
        for kind in ("corrupt", "cmyk", "rotated"):
            for number in range(numbers[kind]):
                row = next(train)
                replaced[row] = self.write(kind, number, self.damaged(kind, number, row))
        for kind, source in (("duplicates", train), ("leaks", held_out)):
            for number in range(numbers[kind]):
                row, change = next(source), CHANGES[number % len(CHANGES)]
                data = jpeg(change(self.image(row)), 70 if change is quality_70 else 90)
                path = self.write(kind, number, data, change.__name__, original=row)
                added.append((path, row, "train"))
        for number in range(numbers["bombs"]):
            path = self.write("bombs", number, bomb(12_000 + 4_000 * number), ending="png")
            added.append((path, next(train), "train"))
        manifest = self.folder / "planted.csv"
        with manifest.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["filepath", "caption", "split"])
            for row, split in enumerate(splits):
                self.rows(writer, replaced.get(row, self.pairs.path(row)), row, split)
            for path, row, split in added:
                self.rows(writer, path, row, split)
        return manifest

    def image(self, row: int) -> Image.Image:
        return decode_image(self.pairs.path(row))

    def damaged(self, kind: str, number: int, row: int) -> bytes:
        if kind == "corrupt":
            return corrupt(self.pairs.path(row).read_bytes(), number, self.rng)
        image = self.image(row)
        return turned(image) if kind == "rotated" else jpeg(image.convert("CMYK"))

    def write(
        self,
        kind: str,
        number: int,
        data: bytes,
        how: str = "",
        original: int | None = None,
        ending: str = "jpg",
    ) -> Path:
        path = (self.folder / f"{kind}_{number:04d}.{ending}").absolute()
        path.write_bytes(data)
        about = "" if original is None else str(self.pairs.path(original).absolute())
        self.planted[kind][str(path)] = how or about
        return path

    def rows(self, writer: object, path: Path, row: int, split: str) -> None:
        for caption in self.pairs.captions(row) or ["a picture"]:
            writer.writerow([str(path.absolute()), caption, split])  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a folder of pictures, or a manifest")
    parser.add_argument("--images", type=int, default=0, help="take the first so many; 0 is all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--output", default="", help="folder to keep planted files and report in")
    for kind, number in NUMBERS.items():
        parser.add_argument(f"--{kind}", type=int, default=number)
    options = parser.parse_args()
    pairs = pairs_to_encode(DataConfig(), options.source).head(options.images)
    if len(set(pairs.table["split"].to_pylist())) < 2:
        pairs = draw_splits(pairs, 0.1, options.seed)
    numbers = {kind: getattr(options, kind) for kind in NUMBERS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.output or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        planter = Planter(pairs, folder, random.Random(options.seed))
        manifest = planter.plant(numbers)
        overrides = ["data=manifest", f"data.manifest={manifest}", f"doctor.output={folder}/report"]
        config = compose([*overrides, f"doctor.num_workers={options.workers}"], "doctor")
        start = time.perf_counter()
        sick = pairs_to_encode(config.data, None)
        diagnosis = examine(config, sick, folder / "report")
        summary = write(config, sick, diagnosis, folder / "report")
        seconds = time.perf_counter() - start
        say("\n".join(lines(summary, folder / "report")))
        tell(planter, folder / "report" / "report.parquet", len(pairs), seconds)


def tell(planter: Planter, report: Path, untouched: int, seconds: float) -> None:
    """Print what was found, missed, and found without being there."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for row in pq.read_table(report, columns=["filepath", "kind"]).to_pylist():
        kinds[row["filepath"]].add(row["kind"])
    everything: set[str] = set()
    for kind, files in planter.planted.items():
        missed = [path for path in files if not kinds[path] & set(EXPECTED[kind])]
        found = len(files) - len(missed)
        say(f"{kind:<12} planted {len(files):>4}  found {found:>4} ({found / len(files):.1%})")
        for path in missed:
            say(f"    missed {Path(path).name} {files[path]}")
        everything |= files.keys()
    alarms = [
        path
        for path, found_kinds in kinds.items()
        if path not in everything and found_kinds & {*FAULTS, *COPIES}
    ]
    untouched -= sum(len(planter.planted[kind]) for kind in ("corrupt", "cmyk", "rotated"))
    share = len(alarms) / max(untouched, 1)
    say(f"false alarms {len(alarms)} of {untouched} untouched files ({share:.2%})")
    for path in alarms[:20]:
        say(f"    {path}: {', '.join(sorted(kinds[path]))}")
    say(f"{seconds:.1f} s with the report")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
