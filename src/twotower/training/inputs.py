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


@dataclass(frozen=True)
class EvaluationSet:
    """Pairs to measure on, and the image tower's inputs of them."""

    pairs: PairTable
    images: Dataset[Tensor | None]


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """A model and the data in the form that it takes.

    `model` shares its parameters with the bundle's: where a trunk is locked and its features are
    cached, the tower in `model` is the bundle's head alone.
    """

    model: DualEncoder
    train: ImageTextDataset
    val: EvaluationSet
    probe: EvaluationSet | None
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
    probe_pairs: PairTable | None = None,
) -> TrainingInputs:
    """Cache what is locked and join the rest.

    Raises:
        ConfigError: nothing is left to train, or no picture can be read.
    """
    model = bundle.model.to(device).to(memory_format=torch.channels_last)
    image_tower, text_tower = model.image_tower, model.text_tower
    train: ImageTextDataset
    if _is_cached(image_tower, config):
        train_pairs, features = image_features(bundle, train_pairs, config, device, cache_folder)
        train = CachedImages(train_pairs, features, seed=seed, pairing=config.pairing)
        image_tower = image_tower.get_submodule("head")

        def evaluation_set(pairs: PairTable) -> EvaluationSet:
            pairs, features = image_features(bundle, pairs, config, device, cache_folder)
            return EvaluationSet(pairs, FeatureInputs(features))

    else:
        transform = bundle.train_transform
        train = ImageTextDataset(train_pairs, transform, seed=seed, pairing=config.pairing)

        def evaluation_set(pairs: PairTable) -> EvaluationSet:
            return EvaluationSet(pairs, PictureInputs(pairs, bundle.eval_transform))

    val = evaluation_set(val_pairs)
    probe = None if probe_pairs is None else evaluation_set(probe_pairs)
    tokenizer: Callable[[Sequence[str]], Tensor] = bundle.tokenizer
    if _is_cached(text_tower, config):
        tables = [train_pairs, val.pairs, *([probe.pairs] if probe else [])]
        captions = [caption for table in tables for caption in table.all_captions()[0]]
        tokenizer = caption_features(bundle, [*captions, ""], config, device, cache_folder)
        text_tower = text_tower.get_submodule("head")
    trained = DualEncoder(image_tower, text_tower, model.logit_scale, model.logit_bias)
    if not any(p.requires_grad for name, p in trained.named_parameters() if "." in name):
        raise ConfigError(
            "both towers are locked and have no heads: there is nothing to train; unlock one"
        )
    return TrainingInputs(model=trained, train=train, val=val, probe=probe, tokenizer=tokenizer)
