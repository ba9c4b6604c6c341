"""What a run reads and trains: towers on pictures and tokens, or heads on cached features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from twotower.data.pairs import ImageTextDataset, PairTable
from twotower.evaluation.retrieval import FeatureInputs, PictureInputs
from twotower.models.dual_encoder import DualEncoder, ModelBundle, Tower
from twotower.settings import ConfigError
from twotower.train_config import TrainConfig
from twotower.training.feature_cache import CachedImages, caption_features, image_features


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """A model and the data in the form that it takes.

    `model` shares its parameters with the bundle's: where a trunk is locked and its features are
    cached, the tower in `model` is the bundle's head alone.
    """

    model: DualEncoder
    train: ImageTextDataset
    val_pairs: PairTable
    val_images: Dataset[Tensor | None]
    tokenizer: Callable[[Sequence[str]], Tensor]


def _is_cached(tower: torch.nn.Module, config: TrainConfig) -> bool:
    return config.cache_features and isinstance(tower, Tower) and tower.locked


def prepare_inputs(
    bundle: ModelBundle,
    train_pairs: PairTable,
    val_pairs: PairTable,
    config: TrainConfig,
    seed: int,
    device: torch.device,
    cache_folder: Path,
) -> TrainingInputs:
    """Cache what is locked and join the rest.

    Raises:
        ConfigError: nothing is left to train, or no picture can be read.
    """
    model = bundle.model.to(device).to(memory_format=torch.channels_last)
    image_tower, text_tower = model.image_tower, model.text_tower
    train: ImageTextDataset
    val_images: Dataset[Tensor | None]
    if _is_cached(image_tower, config):
        train_pairs, features = image_features(bundle, train_pairs, config, device, cache_folder)
        train = CachedImages(train_pairs, features, seed=seed)
        val_pairs, features = image_features(bundle, val_pairs, config, device, cache_folder)
        val_images = FeatureInputs(features)
        image_tower = image_tower.get_submodule("head")
    else:
        train = ImageTextDataset(train_pairs, bundle.train_transform, seed=seed)
        val_images = PictureInputs(val_pairs, bundle.eval_transform)
    tokenizer: Callable[[Sequence[str]], Tensor] = bundle.tokenizer
    if _is_cached(text_tower, config):
        captions = [*train_pairs.all_captions()[0], *val_pairs.all_captions()[0], ""]
        tokenizer = caption_features(bundle, captions, config, device, cache_folder)
        text_tower = text_tower.get_submodule("head")
    trained = DualEncoder(image_tower, text_tower, model.logit_scale)
    if sum(p.requires_grad for p in trained.parameters()) < 2:
        raise ConfigError(
            "both towers are locked and have no heads: there is nothing to train; unlock one"
        )
    return TrainingInputs(
        model=trained, train=train, val_pairs=val_pairs, val_images=val_images, tokenizer=tokenizer
    )
