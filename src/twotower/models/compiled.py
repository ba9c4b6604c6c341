"""Towers compiled by torch.compile."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from twotower.models.dual_encoder import DualEncoder, Tower
from twotower.models.huggingface_text import HuggingFaceText
from twotower.models.stages import bare_encoder
from twotower.settings import ConfigError


def compile_towers(model: DualEncoder, device: torch.device, setting: str) -> None:
    """Compile the encoders in place, so that the names of the weights stay.

    The first passes take a minute or more. Call it last, before DDP.

    Args:
        setting: the one that asks for it, as the user writes it.

    Raises:
        ConfigError: what torch.compile needs on this device is not installed.
    """
    missing = _missing_for_compile(device)
    if missing:
        raise ConfigError(f"{setting} needs {missing}, or use {setting}=false")
    for tower in (model.image_tower, model.text_tower):
        encoder = bare_encoder(tower.trunk) if isinstance(tower, Tower) else tower
        # Its pooling asks for the longest caption of a batch, which no graph can hold.
        unit = encoder.encoder if isinstance(encoder, HuggingFaceText) else encoder
        unit.compile()


def _missing_for_compile(device: torch.device) -> str:
    """What is to be installed, as a clause; empty when all is there."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "triton; install it (pip install triton)"
        compilers = [os.environ.get("CC", "gcc"), "clang"]
    else:
        compilers = [os.environ.get("CXX", "g++")]
    if not any(shutil.which(compiler) for compiler in compilers) or not headers.is_file():
        return "a C++ compiler and Python's headers; install them (Debian: g++ and python3-dev)"
    return ""
