"""The training sections of the config: the optimisation and the loss."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

from twotower.settings import Choice, ConfigError, Section, setting


class Precision(enum.Enum):
    """What the forward pass computes in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Optimizer(enum.Enum):
    """What turns gradients into steps; the last two need apex and a GPU."""

    adamw = "adamw"
    fused_adam = "fused_adam"
    fused_lamb = "fused_lamb"


class Schedule(enum.Enum):
    """The learning rate after the warm-up."""

    cosine = "cosine"
    constant = "constant"
    linear = "linear"
    plateau = "plateau"


class Pairing(enum.Enum):
    """What an epoch brings of an image that has several captions."""

    one = "one"
    separate = "separate"
    group = "group"
    shuffle = "shuffle"


class SameImage(enum.Enum):
    """What two pairs of one image, or of one caption, are to each other in a batch."""

    positive = "positive"
    mask = "mask"
    ignore = "ignore"


@dataclass(kw_only=True)
class LossConfig(Choice):
    """What every loss shares; a loss's own fields are in `training/loss.py`."""

    section: ClassVar[str] = "loss"

    same_image: SameImage = setting(
        SameImage.mask,
        "other pairs of one image or one caption: positive, mask (left out), or ignore (negatives)",
    )


@dataclass(kw_only=True)
class TrainConfig(Section):
    """The optimisation."""

    section: ClassVar[str] = "train"
    not_in_run_name: ClassVar[tuple[str, ...]] = (
        "num_workers",
        "log_every",
        "save_minutes",
        "save_steps",
        "keep_last",
        "figures",
        "wandb",
        "resume",
        "overwrite",
    )

    start_from: str = setting(
        "", "checkpoint whose weights the run starts from; empty is what model= says"
    )
    epochs: int = setting(30, "passes over the training images", ge=1)
    max_steps: int = setting(0, "stop after this many optimiser steps; 0 is no limit", ge=0)
    batch_size: int = setting(
        128, "image-text pairs a step over all ranks: the contrastive batch", ge=2
    )
    micro_batch_size: int = setting(
        0, "pairs a rank that pass through the towers at once; 0 is all of the rank's", ge=0
    )
    pairing: Pairing = setting(
        Pairing.one,
        "captions of an image: one an epoch; or each a pair: separate (never in one batch), "
        "group (side by side) or shuffle",
    )
    optimizer: Optimizer = setting(
        Optimizer.adamw, "adamw, or apex's fused_adam or fused_lamb (CUDA, apex installed)"
    )
    lr: float = setting(5e-4, "peak learning rate of the heads and the temperature", gt=0)
    image_lr_scale: float = setting(1.0, "factor of lr for the image encoder", ge=0)
    text_lr_scale: float = setting(1.0, "factor of lr for the text encoder", ge=0)
    layer_decay: float = setting(
        1.0, "factor of an encoder's lr from each stage to the one before it", gt=0, le=1
    )
    schedule: Schedule = setting(
        Schedule.cosine, "the rate after the warm-up: cosine, constant, linear or plateau"
    )
    plateau_factor: float = setting(
        0.8, "plateau: factor of the rate when validation does not improve", gt=0, lt=1
    )
    plateau_patience: int = setting(1, "plateau: validations without improvement before that", ge=0)
    weight_decay: float = setting(
        0.2, "AdamW decay of matrices; never of norms, biases, logit_scale", ge=0
    )
    beta1: float = setting(0.9, "AdamW decay rate of the mean", ge=0, lt=1)
    beta2: float = setting(0.98, "AdamW decay rate of the variance", ge=0, lt=1)
    eps: float = setting(1e-6, "AdamW epsilon", gt=0)
    warmup_fraction: float = setting(
        0.1, "share of all steps in which the rate rises linearly", ge=0, le=1
    )
    grad_clip_norm: float = setting(1.0, "largest global gradient norm; 0 does not clip", ge=0)
    ema_decay: float = setting(
        0.0,
        "decay a step of the moving average of the weights that is validated and kept; 0 off",
        ge=0,
        lt=1,
    )
    precision: Precision = setting(Precision.fp32, "fp32, bf16 or fp16 (with a gradient scaler)")
    grad_checkpointing: bool = setting(
        False, "compute the encoders' activations again in the backward pass: less memory, slower"
    )
    compile: bool = setting(False, "compile the towers with torch.compile")
    num_workers: int = setting(
        0, "processes a rank that load images; 0 loads in the rank itself", ge=0
    )
    eval_every: int = setting(1, "epochs between validations; 0 validates only at the end", ge=0)
    watch: str = setting(
        "val/mean_recall",
        "metric of a validation that decides the best checkpoint (val/ or probe/)",
    )
    early_stopping: bool = setting(False, "end when the watched metric no longer improves")
    patience: int = setting(5, "early stopping: validations without improvement", ge=1)
    min_change: float = setting(
        0.0,
        "early stopping and plateau: smallest rise of the metric that is an improvement",
        ge=0,
    )
    stop_on_forgetting: float = setting(
        0.0, "end when the probe's metric falls by more than this many points; 0 never", ge=0
    )
    wise_ft: bool = setting(
        False, "afterwards, measure interpolations between the first and the last weights (WiSE-FT)"
    )
    figures: bool = setting(
        True, "draw pairs and matches at each validation, to TensorBoard and as PNG"
    )
    wandb: bool = setting(False, "write metrics and figures to Weights & Biases too")
    log_every: int = setting(10, "steps between two lines in the metrics", ge=1)
    cache_features: bool = setting(
        True, "compute the features of a locked tower once and reuse them"
    )
    cached_views: int = setting(
        1,
        "random crops of each training picture whose features a locked image tower reuses; "
        "1 is the picture as it is evaluated",
        ge=1,
    )
    save_minutes: float = setting(10.0, "minutes between two saves inside an epoch", gt=0)
    save_steps: int = setting(0, "steps between two saves; 0 saves by minutes alone", ge=0)
    keep_last: int = setting(1, "newest checkpoints kept beside the best", ge=1)
    resume: bool = setting(True, "go on with a run that was stopped")
    overwrite: bool = setting(False, "begin anew: a finished run instead of reusing it")

    def __post_init__(self) -> None:
        super().__post_init__()
        needs = {
            "train.early_stopping": self.early_stopping,
            "train.stop_on_forgetting": bool(self.stop_on_forgetting),
            "train.schedule=plateau": self.schedule is Schedule.plateau,
        }
        for name, asked in needs.items():
            if asked and not self.eval_every:
                raise ConfigError(
                    f"{name} needs validations between the first and the last step; set "
                    "train.eval_every to 1 or more"
                )
        if not self.watch.startswith(("val/", "probe/")):
            raise ConfigError(
                f"train.watch must name a metric of a validation, as val/mean_recall or "
                f"probe/zeroshot_top1, not {self.watch!r}"
            )
