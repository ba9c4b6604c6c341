"""The newest checkpoints of a run: one under its name, older ones beside it where asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from twotower.checkpoint.atomic import replacing
from twotower.checkpoint.native import read_header
from twotower.models.dual_encoder import ModelBundle
from twotower.models.saved import save_bundle
from twotower.runs import RunPaths


def older_checkpoints(folder: Path) -> list[Path]:
    """What `save_last` moved aside, oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def save_last(
    paths: RunPaths,
    bundle: ModelBundle,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    keep: int,
) -> None:
    """Write the newest checkpoint; the one before it stays under its step's name if `keep` > 1.

    At every moment there is a whole newest checkpoint under its name.

    Raises:
        ConfigError: the folder cannot be written or the disk is full; the previous one stays.
    """
    if keep > 1 and paths.last.is_file():
        step = read_header(paths.last)["step"]
        aside = paths.models / f"step-{step:08d}.safetensors"
        if step != about["step"] and not aside.exists():
            try:
                os.link(paths.last, aside)
            except OSError:  # a file system without hard links
                with replacing(aside) as partial:
                    shutil.copyfile(paths.last, partial)
    save_bundle(paths.last, bundle, training_tensors=tensors, **about)
    for old in older_checkpoints(paths.models)[: -(keep - 1) or None]:
        old.unlink()
