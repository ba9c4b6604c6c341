"""Features of locked towers: computed once, on all ranks together, and kept on disk."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from twotower.checkpoint.atomic import replacing
from twotower.console import progress
from twotower.data.pairs import ImageTextDataset, PairTable, Sample
from twotower.data.workers import plain_signals
from twotower.distributed import (
    all_gather_objects,
    broadcast_object,
    is_main_process,
    rank,
    shard_range,
    world_size,
)
from twotower.evaluation.retrieval import PictureInputs, autocast
from twotower.models.dual_encoder import ModelBundle
from twotower.models.huggingface_text import HuggingFaceText
from twotower.settings import ConfigError
from twotower.train_config import Pairing, TrainConfig

log = logging.getLogger(__name__)

BATCH_ROWS = 32
GPU_BATCH_ROWS = 256


class CachedImages(ImageTextDataset):
    """The same pairs, with the locked trunk's features (F,) in place of the pictures."""

    def __init__(
        self, pairs: PairTable, features: Tensor, *, seed: int, pairing: Pairing = Pairing.one
    ) -> None:
        super().__init__(pairs, _no_transform, seed=seed, pairing=pairing)
        self.features = features

    def __getitem__(self, item: int) -> Sample:
        row = int(self.owner[item])
        return Sample(self.features[row], self.caption(item), row)


def _no_transform(image: object) -> Tensor:
    raise AssertionError("cached pictures are not decoded")


@dataclass(frozen=True)
class CachedCaptions:
    """Looks captions up among the locked trunk's features: texts -> (N, F)."""

    features: Tensor
    row_of: dict[str, int]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self.features[torch.tensor([self.row_of[text] for text in texts])]


def fingerprint(*parts: object) -> str:
    """The first 16 hex digits of SHA-256 over texts, tensors and modules' weights."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            digest.update(repr(part).encode())
            # Not state_dict: buffers that are not saved (a normalisation's constants) count too.
            for name, tensor in (*part.named_parameters(), *part.named_buffers()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(part, Tensor):
            digest.update(part.reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def _file_state(path: Path) -> tuple[str, int, int]:
    try:
        state = os.stat(path)
    except OSError:
        return (str(path), -1, -1)
    return (str(path), state.st_size, state.st_mtime_ns)


def _kept(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in `path`, or what `compute` gives on all ranks, which the first writes there."""
    if broadcast_object(path.is_file()):
        if is_main_process():
            log.info("reusing the locked tower's features in %s", path)
        return load_file(str(path))
    tensors = compute()
    if is_main_process():
        with replacing(path) as partial:
            save_file(tensors, str(partial))
    return tensors


@contextmanager
def _trimmed_padding(trunk: nn.Module) -> Iterator[None]:
    trunks = [part for part in trunk.modules() if isinstance(part, HuggingFaceText)]
    for part in trunks:
        part.trim_padding = True
    try:
        yield
    finally:
        for part in trunks:
            part.trim_padding = False


def _batch_rows(device: torch.device) -> int:
    return GPU_BATCH_ROWS if device.type == "cuda" else BATCH_ROWS


def _gathered(parts: list[Tensor]) -> Tensor:
    return torch.cat([part for of_rank in all_gather_objects(parts) for part in of_rank])


@torch.no_grad()
def image_features(
    bundle: ModelBundle, pairs: PairTable, config: TrainConfig, device: torch.device, folder: Path
) -> tuple[PairTable, Tensor]:
    """The readable images of `pairs`, and the locked image trunk's features of them (N, F).

    Raises:
        ConfigError: no picture can be read.
    """
    trunk = bundle.model.image_tower.get_submodule("trunk").to(device).eval()
    files = [_file_state(pairs.path(row)) for row in range(len(pairs))]
    key = fingerprint("images", trunk, bundle.eval_transform, config.precision, files)

    def compute() -> dict[str, Tensor]:
        rows = shard_range(len(pairs), rank(), world_size())
        pictures: Dataset[Tensor | None] = PictureInputs(pairs, bundle.eval_transform)
        loader = DataLoader(
            Subset(pictures, rows),
            batch_size=_batch_rows(device),
            num_workers=config.num_workers,
            worker_init_fn=plain_signals,
            collate_fn=list,
            generator=torch.Generator(),  # a cold cache must not move the model's random state
        )
        features: list[Tensor] = []
        readable: list[Tensor] = []
        with progress("image features", len(rows), "images", is_main_process()) as bar:
            for items in loader:
                readable.append(torch.tensor([item is not None for item in items]))
                images = [item for item in items if item is not None]
                if images:
                    with autocast(device, config.precision):
                        encoded = trunk(torch.stack(images).to(device, non_blocking=True))
                    features.append(encoded.float().cpu())
                bar.advance(len(items))
        if not any(all_gather_objects(bool(features))):
            raise ConfigError(f"{pairs.name}: no picture can be read, for example {pairs.path(0)}")
        return {"features": _gathered(features), "readable": _gathered(readable)}

    kept = _kept(folder / f"images-{key}.safetensors", compute)
    unreadable = int((~kept["readable"]).sum())
    if unreadable and is_main_process():
        log.warning("%d images of %s cannot be read and are left out", unreadable, pairs.name)
    return pairs.take(kept["readable"].nonzero()[:, 0].numpy()), kept["features"]


@torch.no_grad()
def caption_features(
    bundle: ModelBundle,
    captions: Sequence[str],
    config: TrainConfig,
    device: torch.device,
    folder: Path,
) -> CachedCaptions:
    """The locked text trunk's features of the captions, each different one once."""
    trunk = bundle.model.text_tower.get_submodule("trunk").to(device).eval()
    # Captions of like length side by side, so that trimming the padding pays.
    unique = sorted(set(captions), key=lambda text: (len(text), text))
    length = bundle.tokenizer.context_length
    key = fingerprint("captions", trunk, config.precision, bundle.assets, length, unique)

    def compute() -> dict[str, Tensor]:
        rows = shard_range(len(unique), rank(), world_size())
        features = []
        step = _batch_rows(device)
        shown = progress("caption features", len(rows), "captions", is_main_process())
        with shown as bar, _trimmed_padding(trunk):
            for start in range(rows.start, rows.stop, step):
                texts = unique[start : min(start + step, rows.stop)]
                with autocast(device, config.precision):
                    encoded = trunk(bundle.tokenizer(texts).to(device))
                features.append(encoded.float().cpu())
                bar.advance(len(texts))
        return {"features": _gathered(features)}

    kept = _kept(folder / f"captions-{key}.safetensors", compute)
    return CachedCaptions(kept["features"], {text: row for row, text in enumerate(unique)})
