"""What a run reads and trains: towers on pictures and tokens, or heads on cached features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from twotower.data.pairs import ImageTextDataset, PairTable
from twotower.evaluation.examined import Examined
from twotower.evaluation.features import FeatureInputs, PictureInputs
from twotower.models.dual_encoder import DualEncoder, ModelBundle, Tower
from twotower.settings import ConfigError
from twotower.train_config import TrainConfig
from twotower.training.feature_cache import CachedImages, caption_features, image_features


@dataclass(frozen=True)
class EvaluationSet(Examined):
    """The same with the image tower's inputs of the pairs."""

    images: Dataset[Tensor | None] = field(kw_only=True)


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
    pad_id: int | None


def _is_cached(tower: torch.nn.Module, config: TrainConfig) -> bool:
    return config.cache_features and isinstance(tower, Tower) and tower.locked


def prepare_inputs(
    bundle: ModelBundle,
    train_pairs: PairTable,
    val: Examined,
    config: TrainConfig,
    seed: int,
    device: torch.device,
    cache_folder: Path,
    probe: Examined | None = None,
) -> TrainingInputs:
    """Cache what is locked and join the rest.

    Raises:
        ConfigError: nothing is left to train, or no picture can be read.
    """
    model = bundle.model.to(device).to(memory_format=torch.channels_last)
    image_tower, text_tower = model.image_tower, model.text_tower
    train: ImageTextDataset
    if _is_cached(image_tower, config):
        of_train = (bundle, train_pairs, config, device, cache_folder)
        # One view is the pictures as they are evaluated; more are random crops of them.
        numbers = range(config.cached_views) if config.cached_views > 1 else [None]
        views = [image_features(*of_train, number) for number in numbers]
        train_pairs = views[0][0]
        features = [of_view for _, of_view in views]
        train = CachedImages(train_pairs, features, seed=seed, pairing=config.pairing)
        image_tower = image_tower.get_submodule("head")

        def evaluation_set(of: Examined) -> EvaluationSet:
            pairs, features = image_features(bundle, of.pairs, config, device, cache_folder)
            return EvaluationSet(pairs, of.prompts, images=FeatureInputs(features))

    else:
        transform = bundle.train_transform
        train = ImageTextDataset(train_pairs, transform, seed=seed, pairing=config.pairing)

        def evaluation_set(of: Examined) -> EvaluationSet:
            pictures = PictureInputs(of.pairs, bundle.eval_transform)
            return EvaluationSet(of.pairs, of.prompts, images=pictures)

    sets = [evaluation_set(part) for part in (val, probe) if part is not None]
    tokenizer: Callable[[Sequence[str]], Tensor] = bundle.tokenizer
    pad_id: int | None = bundle.tokenizer.pad_id
    if _is_cached(text_tower, config):
        tables = [train_pairs, *(part.pairs for part in sets)]
        texts = [caption for table in tables for caption in table.all_captions()[0]]
        texts += [text for part in sets if part.prompts for text in part.prompts.texts()]
        tokenizer = caption_features(bundle, [*texts, ""], config, device, cache_folder)
        pad_id = None
        text_tower = text_tower.get_submodule("head")
    trained = DualEncoder(image_tower, text_tower, model.logit_scale, model.logit_bias)
    if not any(p.requires_grad for name, p in trained.named_parameters() if "." in name):
        raise ConfigError(
            "both towers are locked and have no heads: there is nothing to train; unlock one"
        )
    return TrainingInputs(
        model=trained,
        train=train,
        val=sets[0],
        probe=sets[1] if probe else None,
        tokenizer=tokenizer,
        pad_id=pad_id,
    )
