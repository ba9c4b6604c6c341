"""The formats that a checkpoint can be written in, each with the check of what was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from twotower.checkpoint.atomic import replacing, replacing_folder
from twotower.config import ExportFormat
from twotower.export import huggingface, onnx, open_clip, openai
from twotower.export.probe import Probe
from twotower.models.dual_encoder import ModelBundle
from twotower.models.lora import merge_adapters
from twotower.settings import ConfigError

FILE_SUFFIXES = (".pt", ".pth", ".onnx", ".safetensors", ".bin")


@dataclass(frozen=True)
class Exporter:
    """How one format is written, checked and opened.

    Attributes:
        name: of the format, in a sentence.
        folder: whether it is a folder, else one file.
        write: puts a bundle into an existing folder, or into a file.
        check: lets the format's own reader read it; raises RuntimeError if features differ.
        hint: how it is opened elsewhere.
    """

    name: str
    folder: bool
    write: Callable[[ModelBundle, Path], None]
    check: Callable[[ModelBundle, Path, Probe], None]
    hint: Callable[[ModelBundle, Path], str]


EXPORTERS = {
    ExportFormat.openai: Exporter(
        "OpenAI's format", False, openai.write, openai.check, openai.hint
    ),
    ExportFormat.open_clip: Exporter(
        "open_clip's format", True, open_clip.write, open_clip.check, open_clip.hint
    ),
    ExportFormat.hf: Exporter(
        "Hugging Face's format", True, huggingface.write, huggingface.check, huggingface.hint
    ),
    ExportFormat.onnx: Exporter("ONNX", True, onnx.write, onnx.check, onnx.hint),
}


def export_bundle(bundle: ModelBundle, kind: ExportFormat, path: Path, probe: Probe) -> str:
    """Write a bundle in a format, have it read again, and keep it only if the features are equal.

    Adapters (LoRA) are added into the weights first.

    Adapters are merged into the weights that they adapt.

    Returns:
        A sentence about what is there now and how to open it.

    Raises:
        ConfigError: the format cannot hold this bundle, or the place cannot be written.
        RuntimeError: the format's own reader gives other features; nothing is left behind.
    """
    exporter = EXPORTERS[kind]
    check_place(path, exporter.folder, kind)
    bundle = merge_adapters(bundle)
    bundle = merge_adapters(bundle)
    place = replacing_folder(path) if exporter.folder else replacing(path)
    with place as temporary:
        exporter.write(bundle, temporary)
        exporter.check(bundle, temporary, probe)
    return (
        f"{path}: {exporter.name}, features equal on {len(probe.pictures)} pictures and "
        f"{len(probe.captions)} captions; open it with {exporter.hint(bundle, path)}"
    )


def check_place(path: Path, folder: bool, kind: ExportFormat) -> None:
    """Refuse a path that is plainly meant for something else.

    Raises:
        ConfigError: it names a folder where a file is written, or the reverse.
    """
    if path.name in ("", ".."):
        raise ConfigError(f"path={path} must name the {'folder' if folder else 'file'} to write")
    if folder and path.suffix in FILE_SUFFIXES:
        raise ConfigError(
            f"format={kind.name} writes a folder, but path={path} is named like a file; "
            f"give path={path.with_suffix('')}"
        )
    if not folder and path.is_dir():
        raise ConfigError(f"format={kind.name} writes one file, but path={path} is a folder")
