"""CLIPs of OpenAI's architectures out of any format, and out of a bundle into one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from twotower.checkpoint import huggingface, native, open_clip
from twotower.checkpoint.clip import ClipCheckpoint, Pixels, infer_architecture
from twotower.checkpoint.openai import clip_weights
from twotower.checkpoint.tensors import read_tensors
from twotower.models.dual_encoder import ModelBundle
from twotower.models.lora import merge_adapters
from twotower.models.openai_clip import architecture_of, to_openai_names
from twotower.models.preprocess import ImageInput
from twotower.models.saved import load_bundle
from twotower.settings import ConfigError

FORMATS = (
    "a .pt file in OpenAI's format, a folder of open_clip or of Hugging Face's CLIPModel, "
    "or a checkpoint of twotower"
)


def clip_of(bundle: ModelBundle) -> ClipCheckpoint:
    """A bundle's weights, adapters added into them, and what their readers must know of them.

    Raises:
        ConfigError: the bundle is no OpenAI architecture.
    """
    if "architecture" not in bundle.assets:
        raise ConfigError(
            f"a checkpoint of {bundle.config.registered_name} is none of OpenAI's architectures, "
            "which are all that format=openai, open_clip and hf hold; use format=onnx"
        )
    seen = ImageInput.from_json(bundle.assets["image_input"])
    return ClipCheckpoint(
        weights=to_openai_names(merge_adapters(bundle).model.state_dict()),
        architecture=architecture_of(bundle.assets),
        quick_gelu=bundle.assets["activation"] == "quick_gelu",
        pixels=Pixels(mean=seen.mean, std=seen.std, interpolation=seen.interpolation.name),
        source="the checkpoint",
    )


def read_clip(path: Path) -> ClipCheckpoint:
    """The CLIP in a file or a folder, whoever wrote it; nothing that it holds is run.

    A file that lies beside an open_clip_config.json or the config.json of a CLIPModel is read with
    it.

    Raises:
        ConfigError: missing, truncated, of another kind, or asking for more than tensors.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ConfigError(f"model.weights: there is no {path}; give {FORMATS}")
    if path.suffix == ".safetensors" and native.is_native(path):
        return _read_native(path)
    tensors = read_tensors(path, "a file of CLIP weights")
    if any(name.startswith("vision_model.") for name in tensors):
        if not (path.parent / huggingface.CONFIG).is_file():
            raise ConfigError(
                f"{path} holds a CLIPModel of Hugging Face's without its {huggingface.CONFIG}; "
                "give the folder that holds both"
            )
        return huggingface.read_huggingface(path.parent)
    if (path.parent / open_clip.CONFIG).is_file():
        return open_clip.read_open_clip(path.parent, path)
    weights = clip_weights(tensors, path)
    return ClipCheckpoint(
        weights=weights,
        architecture=infer_architecture(weights),
        quick_gelu=None,
        source=str(path),
    )


def _read_folder(folder: Path) -> ClipCheckpoint:
    """Repositories of the hub can hold both formats: open_clip's own file then decides for it."""
    theirs = (folder / open_clip.CONFIG).is_file()
    also = (folder / huggingface.CONFIG).is_file()
    if theirs and (not also or open_clip.find_weights(folder).name not in huggingface.NAMES):
        return open_clip.read_open_clip(folder)
    if also:
        return huggingface.read_huggingface(folder)
    if theirs:
        return open_clip.read_open_clip(folder)
    raise ConfigError(
        f"{folder} holds neither {open_clip.CONFIG} nor {huggingface.CONFIG}; give {FORMATS}"
    )


def _read_native(path: Path) -> ClipCheckpoint:
    header = native.read_header(path)
    if "architecture" not in header.get("assets", {}):
        raise ConfigError(
            f"{path} is a checkpoint of {header.get('variant')}, which is none of OpenAI's "
            "architectures; model=openai_finetune cannot start from it"
        )
    return replace(clip_of(load_bundle(path)), source=str(path))
