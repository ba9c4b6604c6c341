"""What tests of several modules share: ranks without the launcher, a tiny bundle, tiny pictures."""

from __future__ import annotations

import gc
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor, nn

from twotower.decoded import Decoded, Picture
from twotower.model_config import ModelConfig
from twotower.models.dual_encoder import DualEncoder, ModelBundle, PixelNorm, Tower


def _rank(index: int, world: int, init: str, out: str, fn: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(index), WORLD_SIZE=str(world), LOCAL_RANK=str(index))
    dist.init_process_group("gloo", init_method=init, rank=index, world_size=world)
    torch.save(fn(*args), f"{out}/{index}.pt")
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    # Not the interpreter's long way out, on which torch's threads have been seen to abort.
    os._exit(0)


def run_ranks(fn: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """`fn(*args)` on `world` gloo ranks that meet in a file; their results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        init = f"file://{folder}/meet"
        mp.spawn(_rank, (world, init, folder, fn, args), nprocs=world)
        return [torch.load(f"{folder}/{i}.pt", weights_only=False) for i in range(world)]


@dataclass(frozen=True)
class HashTokenizer:
    """Words to ids by a hash: deterministic, no vocabulary file."""

    context_length: int = 8
    vocab_size: int = 97
    pad_id: int = 0

    def __call__(self, texts: Sequence[str]) -> Tensor:
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in enumerate(texts):
            for column, word in enumerate(text.lower().split()[: self.context_length]):
                digest = hashlib.sha256(word.encode()).digest()
                tokens[row, column] = 1 + int.from_bytes(digest[:4], "big") % (self.vocab_size - 1)
        return tokens


@dataclass(frozen=True)
class SquareTransform:
    """Squash to a square of uint8 (3, size, size)."""

    size: int = 16
    side: ClassVar[int] = 0

    def __call__(self, picture: Picture) -> Tensor:
        image = Image.fromarray(picture.pixels) if isinstance(picture, Decoded) else picture
        pixels = np.array(image.resize((self.size, self.size), Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class MeanText(nn.Module):
    """The mean of the embeddings of the tokens that are not padding."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=0)

    def forward(self, tokens: Tensor) -> Tensor:
        count = (tokens != 0).sum(1, keepdim=True).clamp(min=1)
        return self.embedding(tokens).sum(1) / count


def tiny_head(dim: int, dropout: float) -> nn.Module:
    """A linear head, with dropout before it if asked."""
    linear = nn.Linear(24, dim)
    return nn.Sequential(nn.Dropout(dropout), linear) if dropout else linear


def tiny_bundle(
    seed: int = 0, dim: int = 12, size: int = 16, *, locked: bool = False, dropout: float = 0.0
) -> ModelBundle:
    """A dual encoder of a few thousand parameters, built in milliseconds."""
    torch.manual_seed(seed)
    tokenizer = HashTokenizer()
    image_trunk = nn.Sequential(
        PixelNorm((0.5,) * 3, (0.5,) * 3), nn.Flatten(), nn.Linear(3 * size * size, 24), nn.GELU()
    )
    text_trunk = MeanText(tokenizer.vocab_size, 24)
    model = DualEncoder(
        Tower(image_trunk, tiny_head(dim, dropout), locked=locked),
        Tower(text_trunk, tiny_head(dim, dropout), locked=locked),
    )
    transform = SquareTransform(size)
    return ModelBundle(
        model=model,
        train_transform=transform,
        eval_transform=transform,
        tokenizer=tokenizer,
        config=ModelConfig(),
    )


COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 220),
    "white": (240, 240, 240),
}


def write_pictures(folder: Path, count: int, size: int = 24) -> list[tuple[Path, str]]:
    """Small JPEG files of coloured noise and what is on them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    made = []
    for index in range(count):
        name = list(COLOURS)[index % len(COLOURS)]
        pixels = np.array(COLOURS[name]) + rng.integers(-25, 25, (size, size, 3))
        path = folder / f"{index:04d}_{name}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=95)
        made.append((path, f"a {name} square number {index}"))
    return made
