"""ONNX: a folder with a graph a tower, the tokenizer, and what a reader must know of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twotower.export.probe import Features, Probe, check_equal, features_of
from twotower.export.quiet import quiet
from twotower.export.tokenizers import tokenizer_json
from twotower.models.dual_encoder import DualEncoder, ModelBundle
from twotower.models.preprocess import ImageInput
from twotower.settings import ConfigError

IMAGE, TEXT, TOKENIZER, ABOUT = "image.onnx", "text.onnx", "tokenizer.json", "model.json"
FORMAT = 1
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MOST_BYTES = 1_500_000_000  # of weights inside a graph, whose file may have 2 GiB


class _ImageTower(nn.Module):
    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images)


class _TextTower(nn.Module):
    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


def write(bundle: ModelBundle, folder: Path) -> None:
    """Write both towers of any variant, for batches of any size, into a folder.

    Raises:
        ConfigError: the extra `onnx` is not installed, or torch cannot turn a tower into a graph.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"format=onnx needs {', '.join(missing)}; run: pip install 'twotower[onnx]'"
        )
    model = bundle.model.cpu().float().eval()
    size = ImageInput.from_json(bundle.assets["image_input"]).size
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    tokens = bundle.tokenizer(["a dog", "two cats"])
    _write_graph(folder / IMAGE, _ImageTower(model), "images", images)
    _write_graph(folder / TEXT, _TextTower(model), "tokens", tokens)
    (folder / TOKENIZER).write_text(tokenizer_json(bundle.tokenizer), encoding="utf-8")
    (folder / ABOUT).write_text(json.dumps(_about(bundle), indent=2) + "\n")


def check(bundle: ModelBundle, folder: Path, probe: Probe) -> None:
    """Read the folder with onnxruntime and tokenizers, one picture and one caption at a time.

    Raises:
        RuntimeError: the token ids or the features differ.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokens = torch.tensor([found.ids for found in tokenizer.encode_batch(list(probe.captions))])
    if not torch.equal(tokens, bundle.tokenizer(probe.captions)):
        raise RuntimeError(f"{TOKENIZER} gives other token ids than the checkpoint's tokenizer")
    found: Features = (_run(folder / IMAGE, probe.pictures), _run(folder / TEXT, tokens))
    check_equal(features_of(bundle.model, bundle.tokenizer, probe), found, "onnxruntime")


def hint(bundle: ModelBundle, folder: Path) -> str:
    """How the folder is opened elsewhere."""
    return (
        f"onnxruntime.InferenceSession({str(folder / IMAGE)!r}) and its sibling {TEXT}; "
        f"{ABOUT} tells their inputs, {TOKENIZER} is for tokenizers.Tokenizer.from_file"
    )


def _run(graph: Path, inputs: Tensor) -> Tensor:
    """All rows at once, after the first one alone: a graph must take batches of any size."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    session.run(None, {name: inputs[:1].numpy()})
    return torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])


def _write_graph(path: Path, tower: nn.Module, name: str, example: Tensor) -> None:
    weights = sum(tensor.nbytes for tensor in tower.state_dict().values())
    with quiet(), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                tower,
                (example,),
                dynamo=True,
                input_names=[name],
                output_names=[f"{path.stem}_features"],
                dynamic_shapes={name: {0: torch.export.Dim("batch")}},
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"torch cannot write the {path.stem} tower as ONNX: {reason}"
            ) from error
        program.save(str(path), external_data=weights > MOST_BYTES)


def _about(bundle: ModelBundle) -> dict[str, Any]:
    seen = ImageInput.from_json(bundle.assets["image_input"])
    with torch.inference_mode():
        dim = bundle.model.encode_text(bundle.tokenizer(["a dog"])).shape[1]
    length = bundle.tokenizer.context_length
    return {
        "format": FORMAT,
        "variant": bundle.config.registered_name,
        "dim": dim,
        "unit_norm": False,
        "logit_scale": bundle.model.logit_scale.exp().item(),
        "tokenizer": TOKENIZER,
        "context_length": length,
        "image_size": seen.size,
        "interpolation": seen.interpolation.name,
        "mean": seen.mean,
        "std": seen.std,
        "image": {
            "file": IMAGE,
            "input": "images",
            "dtype": "uint8",
            "shape": ["batch", 3, seen.size, seen.size],
            "output": "image_features",
        },
        "text": {
            "file": TEXT,
            "input": "tokens",
            "dtype": "int64",
            "shape": ["batch", length],
            "output": "text_features",
        },
    }
