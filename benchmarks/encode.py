"""JPEG files to a store of embeddings: `twotower encode` beside a plain loop, on the same files.

    python benchmarks/encode.py --pictures <folder with photographs>
    python benchmarks/encode.py --pictures <folder> --models ViT-B/32 ViT-L/14 --device cuda \
        --precision bf16 --workers 16

The plain loop is what embedding scripts do: open_clip's model with the same weights, torchvision's
transform on Pillow's pictures, a `DataLoader`, unit-norm features to an `.npy` file. Both have the
same model, batch, precision, threads and worker processes, and take turns. The forward rate is that
of open_clip's image tower alone on batches in memory. `small` is a ViT of 0.13 GFLOP a picture, so
that preprocessing weighs; weights are random. The files are made of the photographs, 4:3 with a
short side of `--side` pixels, at quality 87; `--side 0` takes the folder's own.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from preprocess import make_set
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)

from twotower.allocator import keep_freed_memory
from twotower.checkpoint.clip import OPENAI_MEAN, OPENAI_STD, Architecture
from twotower.config import Device, DistributedConfig
from twotower.data.images import SUFFIXES
from twotower.data.pairs import Pair, PairTable
from twotower.embedding.export import export
from twotower.encode_config import EncodeConfig
from twotower.evaluation.features import autocast
from twotower.models.openai_clip import ARCHITECTURES, build_bundle, build_towers
from twotower.models.openai_finetune import OpenaiFinetuneConfig
from twotower.models.preprocess import ImageInput
from twotower.models.saved import save_bundle
from twotower.train_config import Precision

SMALL = Architecture(
    embed_dim=128,
    image_size=224,
    vision_layers=3,
    vision_width=192,
    patch_size=32,
    text_width=64,
    text_layers=1,
)
MODELS = {"small": SMALL, **ARCHITECTURES}


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True, help="folder with JPEG files")
    parser.add_argument("--models", nargs="+", default=["small", "ViT-B/32"], choices=MODELS)
    parser.add_argument("--count", type=int, nargs="+", default=[2000, 200], help="files a model")
    parser.add_argument("--side", type=int, default=375, help="pixels of the files' short side")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=[p.name for p in Precision], default="fp32")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as every process of twotower does; both sides gain from it
    files = sorted(p for p in options.pictures.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        sys.exit(f"{options.pictures} has no pictures")
    counts = [*options.count, *[options.count[-1]] * len(options.models)]
    for name, count in zip(options.models, counts, strict=False):
        with tempfile.TemporaryDirectory() as folder:
            made, what = files[:count], "files"
            if options.side:
                (Path(folder) / "pictures").mkdir()
                made, what = make_set(files, options.side, count, Path(folder) / "pictures")
            rates = compare(name, made, Path(folder), options)
            write(f"{name}, {count} {what}, short side {options.side or 'any'}, {rates}")


def write(text: str) -> None:
    """To the terminal, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


class PlainPictures(Dataset[Tensor]):
    """Files through Pillow and torchvision, as OpenAI's `preprocess` does it."""

    def __init__(self, files: Sequence[Path], size: int) -> None:
        self.files = files
        self.transform = Compose(
            [
                Resize(size, interpolation=InterpolationMode.BICUBIC),
                CenterCrop(size),
                to_rgb,
                ToTensor(),
                Normalize(OPENAI_MEAN, OPENAI_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        pixels: Tensor = self.transform(Image.open(self.files[index]))
        return pixels


def to_rgb(image: Image.Image) -> Image.Image:
    """A function of its own, since workers are sent it."""
    return image.convert("RGB")


def compare(name: str, files: Sequence[Path], folder: Path, options: argparse.Namespace) -> str:
    """Measure one model in turns; the settings and rates as text."""
    torch.manual_seed(0)
    architecture = MODELS[name]
    image_input = ImageInput(size=architecture.image_size)
    model = build_towers(architecture, image_input, quick_gelu=True)
    bundle = build_bundle(OpenaiFinetuneConfig(), model, architecture, image_input)
    checkpoint = folder / "model.safetensors"
    save_bundle(checkpoint, bundle)
    device = torch.device(options.device)
    tower = model.image_tower.get_submodule("trunk.1").to(device).eval()  # open_clip's, as it is
    rates: dict[str, list[float]] = {"plain": [], "twotower": [], "forward": []}
    ways = {"plain": plain_loop, "twotower": our_export}
    for turn in range(options.rounds + 1):
        for way, run in ways.items():
            seconds = run(tower, files, folder, checkpoint, architecture, options)
            if turn:  # the first round warms up
                rates[way].append(len(files) / seconds)
        if turn:
            rates["forward"].append(forward_rate(tower, architecture.image_size, options))
    plain, ours, forward = (statistics.median(found) for found in rates.values())
    ratios = [b / a for a, b in zip(rates["plain"], rates["twotower"], strict=True)]
    shares = [b / f for b, f in zip(rates["twotower"], rates["forward"], strict=True)]
    return (
        f"batch {options.batch}, {options.precision}, "
        f"{options.device}, {options.threads} threads, {options.workers} workers, "
        f"{options.rounds} rounds:\n"
        f"  plain {plain:.1f}, twotower {ours:.1f}, forward alone {forward:.1f} images/s; "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), "
        f"{statistics.median(shares):.0%} of the forward rate\n"
    )


def casting(options: argparse.Namespace) -> AbstractContextManager[Any]:
    """The context of a forward pass."""
    return autocast(torch.device(options.device), Precision[options.precision])


@torch.inference_mode()
def plain_loop(
    tower: nn.Module,
    files: Sequence[Path],
    folder: Path,
    _: Path,
    architecture: Architecture,
    options: argparse.Namespace,
) -> float:
    """Seconds of the loop that people write."""
    start = time.perf_counter()
    loader = DataLoader(
        PlainPictures(files, architecture.image_size),
        batch_size=options.batch,
        num_workers=options.workers,
        pin_memory=options.device == "cuda",
    )
    features = []
    for images in loader:
        with casting(options):
            found = tower(images.to(options.device, non_blocking=True))
        features.append(nn.functional.normalize(found.float(), dim=-1).cpu())
    np.save(folder / "plain.npy", torch.cat(features).numpy().astype(np.float16))
    return time.perf_counter() - start


def our_export(
    tower: nn.Module,
    files: Sequence[Path],
    folder: Path,
    checkpoint: Path,
    architecture: Architecture,
    options: argparse.Namespace,
) -> float:
    """Seconds of an export, store, hashes and manifest included, without loading the model."""
    pairs = PairTable.from_pairs([Pair(str(f), "", "", f.name) for f in files], folder, "files")
    encode = EncodeConfig(
        texts=False,
        batch_size=options.batch,
        precision=Precision[options.precision],
        num_workers=options.workers,
    )
    distributed = DistributedConfig(device=Device[options.device], num_threads=options.threads)
    shutil.rmtree(folder / "store", ignore_errors=True)
    result = export(checkpoint, pairs, folder / "store", encode, distributed)
    assert result is not None and result.encoded == len(files)
    return result.seconds


@torch.inference_mode()
def forward_rate(tower: nn.Module, size: int, options: argparse.Namespace) -> float:
    """Images a second through the tower alone, batches in memory."""
    images = torch.randn(options.batch, 3, size, size, device=options.device)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        with casting(options):
            tower(images)
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(options.batch / statistics.median(seconds[1:]))


if __name__ == "__main__":
    main()
