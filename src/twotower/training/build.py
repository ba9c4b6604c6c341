"""Building a run from its config: the model, its data, what it is measured on."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from twotower.config import Config
from twotower.data.pairs import PairTable, load_pairs
from twotower.distributed import rank, resolve_device, world_size
from twotower.evaluation.examined import Examined, examined
from twotower.models.dual_encoder import MODELS, ModelBundle
from twotower.models.saved import load_weights
from twotower.runs import RunPaths
from twotower.settings import ConfigError
from twotower.training.inputs import prepare_inputs
from twotower.training.loss import LOSSES
from twotower.training.optim import check_optimizer
from twotower.training.trainer import Trainer
from twotower.wandb_files import CHECKPOINTS, local_file

log = logging.getLogger(__name__)


def start_bundle(config: Config) -> ModelBundle:
    """The model as the run finds it: as `model=` says, with the weights of `train.start_from`.

    Raises:
        ConfigError: it cannot be built, or the checkpoint is of another variant.
    """
    bundle = MODELS.build(config.model)
    if config.train.start_from:
        path = local_file(config.train.start_from, CHECKPOINTS)
        if not path.is_file():
            raise ConfigError(f"train.start_from: there is no checkpoint at {path}")
        load_weights(path, bundle)
    return bundle


def probe_of(config: Config) -> Examined | None:
    """What the probe measures on, or None without a probe.

    Raises:
        ConfigError: the run is to end on forgetting and there is no probe, or its data is missing.
    """
    probe = config.probe
    if probe.data is None:
        if config.train.stop_on_forgetting:
            raise ConfigError(
                "train.stop_on_forgetting needs a probe; choose its data with data@probe.data=..."
            )
        return None
    return examined(load_pairs(probe.data), probe.split, probe.max_images, config.zeroshot)


def build_trainer(config: Config, source: PairTable) -> Trainer:
    """Everything of a run on the data of `source`, built the same way on every rank.

    Raises:
        ConfigError: the data or the model is not as asked for.
    """
    device = resolve_device(config.distributed)
    check_optimizer(config.train, device)
    pairs = source.with_captions()
    torch.manual_seed(config.seed)
    bundle = start_bundle(config)
    loss = LOSSES.build(config.loss)
    if loss.initial is not None:
        bundle.model.start_temperature(*loss.initial)
    # From here on each rank draws its own dropout; the data's order is drawn by seed and epoch.
    torch.manual_seed(config.seed * 1009 + rank())
    cache = Path(config.run.models_dir) / "features"
    how = config.evaluate
    val = examined(source, how.split, how.max_images, config.zeroshot)
    inputs = prepare_inputs(
        bundle,
        pairs.split("train"),
        val,
        config.train,
        config.seed,
        device,
        cache,
        probe_of(config),
    )
    trainable = sum(p.numel() for p in inputs.model.parameters() if p.requires_grad)
    log.info(
        "%s: %d training and %d validation images, %s trainable parameters, on %d x %s",
        pairs.name,
        len(inputs.train),
        len(inputs.val.pairs),
        f"{trainable:,}",
        world_size(),
        device.type,
    )
    return Trainer(
        bundle,
        inputs,
        loss,
        config.train,
        config.evaluate,
        config.probe,
        config.seed,
        RunPaths.of(config),
        device,
    )
