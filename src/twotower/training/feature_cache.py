"""Features of locked towers: computed once, on all ranks together, and kept on disk."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Subset

from twotower.checkpoint.atomic import replacing
from twotower.console import progress
from twotower.data.pairs import ImageTextDataset, PairTable, Sample, trim_padding
from twotower.data.places import state_of
from twotower.decoded import Picture
from twotower.distributed import broadcast_object, is_main_process, rank, shard_range, world_size
from twotower.evaluation.features import (
    PictureInputs,
    PictureViews,
    autocast,
    gathered,
    readable_features,
)
from twotower.models.dual_encoder import ModelBundle
from twotower.settings import ConfigError
from twotower.train_config import Pairing, TrainConfig

log = logging.getLogger(__name__)

BATCH_ROWS = 32
GPU_BATCH_ROWS = 256


class CachedImages(ImageTextDataset):
    """The same pairs, with the locked trunk's features (F,) in place of the pictures.

    Of several views (N, F) each item brings one an epoch, drawn at random.
    """

    def __init__(
        self,
        pairs: PairTable,
        views: Sequence[Tensor],
        *,
        seed: int,
        pairing: Pairing = Pairing.one,
    ) -> None:
        super().__init__(pairs, _NoTransform(), seed=seed, pairing=pairing)
        self.views = views

    def __getitem__(self, item: int) -> Sample:
        row = int(self.owner[item])
        drawing = random.Random(f"view/{self.seed}/{self.epoch}/{item}")
        return Sample(self.views[drawing.randrange(len(self.views))][row], self.caption(item), row)


class _NoTransform:
    """Cached pictures are not decoded."""

    side = 0

    def __call__(self, picture: Picture) -> Tensor:
        raise NotImplementedError


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
        return (str(path), *state_of(path))
    except OSError:
        return (str(path), -1, -1)


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


def _batch_rows(device: torch.device) -> int:
    return GPU_BATCH_ROWS if device.type == "cuda" else BATCH_ROWS


@torch.no_grad()
def image_features(
    bundle: ModelBundle,
    pairs: PairTable,
    config: TrainConfig,
    device: torch.device,
    folder: Path,
    view: int | None = None,
) -> tuple[PairTable, Tensor]:
    """The readable images of `pairs`, and the locked image trunk's features of them (N, F).

    Args:
        view: the number of a random view of each, by the training transform; None: as they are
            evaluated.

    Raises:
        ConfigError: no picture can be read.
    """
    trunk = bundle.model.image_tower.get_submodule("trunk").to(device).eval()
    files = [_file_state(pairs.path(row)) for row in range(len(pairs))]
    pictures = PictureInputs(pairs, bundle.eval_transform)
    how: list[object] = [bundle.eval_transform]
    if view is not None:
        pictures = PictureViews(pairs, bundle.train_transform, view)
        how = [bundle.train_transform, view]
    key = fingerprint("images", trunk, *how, config.precision, files)

    def compute() -> dict[str, Tensor]:
        rows = shard_range(len(pairs), rank(), world_size())
        what = "image features" if view is None else f"image features, view {view + 1}"
        with progress(what, len(rows), "images", is_main_process()) as bar:
            features, readable = readable_features(
                trunk,
                Subset(pictures, rows),
                batch_size=_batch_rows(device),
                num_workers=config.num_workers,
                device=device,
                precision=config.precision,
                line=bar,
            )
        kept = gathered(readable)
        if not kept.any():
            raise ConfigError(f"{pairs.name}: no picture can be read, for example {pairs.path(0)}")
        return {"features": gathered(features), "readable": kept}

    kept = _kept(folder / f"images-{key}.safetensors", compute)
    unreadable = int((~kept["readable"]).sum())
    if unreadable and not view and is_main_process():
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
    assets = {name: text for name, text in bundle.assets.items() if name != "image_input"}
    key = fingerprint("captions", trunk, config.precision, assets, length, unique)

    def compute() -> dict[str, Tensor]:
        rows = shard_range(len(unique), rank(), world_size())
        features = [torch.empty(0)]
        step = _batch_rows(device)
        with progress("caption features", len(rows), "captions", is_main_process()) as bar:
            for start in range(rows.start, rows.stop, step):
                texts = unique[start : min(start + step, rows.stop)]
                tokens = trim_padding(bundle.tokenizer(texts), bundle.tokenizer.pad_id)
                with autocast(device, config.precision):
                    encoded = trunk(tokens.to(device))
                features.append(encoded.float().cpu())
                bar.advance(len(texts))
        return {"features": gathered(torch.cat(features))}

    kept = _kept(folder / f"captions-{key}.safetensors", compute)
    return CachedCaptions(kept["features"], {text: row for row, text in enumerate(unique)})
