"""From pictures and words to unit vectors: whatever the variant, one class after training."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from twotower.embedding.layout import FloatArray
from twotower.embedding.pictures import (
    Picture,
    PictureBatch,
    collate_pictures,
    name_of,
    read_picture,
)
from twotower.machine import multiplies_bf16
from twotower.models.compiled import compile_towers
from twotower.models.dual_encoder import DualEncoder, ModelBundle
from twotower.models.saved import load_bundle
from twotower.prefetch import PrefetchToDevice
from twotower.settings import ConfigError, to_plain
from twotower.train_config import Precision

LONGEST_DESCRIPTION = 300
DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


def _prepared(model: DualEncoder, device: torch.device, precision: Precision) -> DualEncoder:
    """The model where and as it computes.

    Below fp32 the weights are cast: under autocast a ViT on a CPU is slower than in fp32, with
    cast weights nearly twice as fast, and a GPU need not cast them anew for each batch.
    """
    if device.type == "cpu" and precision is Precision.fp16:
        raise ConfigError("precision fp16 needs a GPU; on a CPU take bf16 or fp32")
    if device.type == "cpu" and precision is Precision.bf16 and not multiplies_bf16():
        raise ConfigError(
            "this processor cannot multiply bf16 (AVX-512 BF16, AMX or Arm's BF16), so that fp32 "
            "is faster here; take precision fp32"
        )
    if precision is not Precision.fp32:
        # The caller's own fp32 weights stay as they are.
        model = copy.deepcopy(model).to(DTYPES[precision])
    # `PixelNorm` gives pictures in this layout; convolutions are fast where weights have it too.
    return model.to(device).to(memory_format=torch.channels_last).eval()


def described(thing: object) -> str:
    """A transform or a tokenizer in words that are the same wherever it is built.

    A vocabulary is told by its hash.
    """
    name = type(thing).__name__
    if not dataclasses.is_dataclass(thing):
        return name
    text = repr(thing)
    if len(text) <= LONGEST_DESCRIPTION:
        return text
    return f"{name} {hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()}"


def _refuse_one(items: object, instead: str) -> None:
    one_array = isinstance(items, np.ndarray) and items.dtype == np.uint8 and items.ndim < 4
    if one_array or isinstance(items, str | bytes | Path | Image.Image):
        raise ConfigError(f"a list is wanted, and {type(items).__name__} is one; use {instead}")


class Encoder:
    """Encodes pictures and texts with a checkpoint's model, tokenizer and transform.

    Batches have one fixed size: the last is padded to it and cut again, texts are padded to the
    tokenizer's length. So a row's value depends neither on how many rows come with it nor on the
    number of processes. The model of the bundle is moved to the device and switched to evaluation;
    `compiled` leaves its towers to torch.compile, which takes a minute at the first batch.

    Raises:
        ConfigError: the device cannot compute in this precision, or compile.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        device: torch.device | None = None,
        precision: Precision = Precision.fp32,
        batch_size: int = 64,
        *,
        compiled: bool = False,
    ) -> None:
        self.bundle = bundle
        self.device = device or torch.device("cpu")
        self.precision = precision
        self.batch_size = batch_size
        self._model = _prepared(bundle.model, self.device, precision)
        self._pipeline = PrefetchToDevice(self.device)
        if compiled:
            _ = self.dim  # by a batch of one text, for which nothing is to be compiled
            compile_towers(self._model, self.device, "encode.compile")

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        device: torch.device | None = None,
        precision: Precision = Precision.fp32,
        batch_size: int = 64,
        *,
        compiled: bool = False,
    ) -> Encoder:
        """The encoder of a checkpoint file.

        Raises:
            ConfigError: the checkpoint is missing or damaged, or as for the class.
        """
        return cls(load_bundle(checkpoint), device, precision, batch_size, compiled=compiled)

    @cached_property
    def dim(self) -> int:
        """Values a row; found by encoding one empty text."""
        with torch.inference_mode():
            tokens = self.bundle.tokenizer([""]).to(self.device)
            return int(self._model.encode_text(tokens).shape[1])

    @property
    def text_length(self) -> int:
        """Tokens that every text is cut and padded to."""
        return self.bundle.tokenizer.context_length

    def description(self) -> dict[str, Any]:
        """What decides the vectors beside the weights, by the names of a store's manifest."""
        return {
            "dim": self.dim,
            "text_length": self.text_length,
            "model": self.bundle.config.registered_name,
            "config": to_plain(self.bundle.config),
            "preprocessing": described(self.bundle.eval_transform),
            "tokenizer": described(self.bundle.tokenizer),
        }

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """Texts -> (N, D) float32 of unit norm, in the order given.

        Raises:
            ConfigError: `texts` is one text, whose letters would be encoded.
        """
        _refuse_one(texts, "encode_texts([text])")
        rows = list(self.iterate_texts(texts))
        return np.concatenate(rows) if rows else np.empty((0, self.dim), np.float32)

    def iterate_texts(self, texts: Sequence[str]) -> Iterator[FloatArray]:
        """The same, `batch_size` texts after `batch_size` texts."""
        parts = (
            texts[first : first + self.batch_size]
            for first in range(0, len(texts), self.batch_size)
        )
        for _, rows in self._pipeline.run(parts, self._of_texts):
            yield self._checked(rows)

    def encode_batch(self, batch: PictureBatch) -> FloatArray:
        """At most `batch_size` pictures -> (n, D) float32 of unit norm.

        Rows of unreadable pictures mean nothing.
        """
        ((_, rows),) = self.encode_batches([batch])
        return rows

    def encode_batches(
        self, batches: Iterable[PictureBatch]
    ) -> Iterator[tuple[PictureBatch, FloatArray]]:
        """Each batch in order with its rows, as `encode_batch`; a GPU has later ones already."""
        for batch, rows in self._pipeline.run(batches, self._of_pictures):
            yield batch, self._checked(rows)

    @overload
    def encode_images(
        self, images: Sequence[Picture], errors: Literal["raise"] = "raise"
    ) -> FloatArray: ...

    @overload
    def encode_images(
        self, images: Sequence[Picture], errors: Literal["none"]
    ) -> list[FloatArray | None]: ...

    def encode_images(
        self, images: Sequence[Picture], errors: Literal["raise", "none"] = "raise"
    ) -> FloatArray | list[FloatArray | None]:
        """Pictures (paths, bytes, PIL pictures, uint8 arrays) -> unit vectors in the order given.

        With `errors="raise"` the result is (N, D) float32; with `errors="none"` it is a list of N
        entries, each (D,) float32, or None for a picture that cannot be read.

        Raises:
            ConfigError: a picture cannot be read and `errors` is "raise", `errors` is neither, or
                `images` is one picture.
        """
        _refuse_one(images, "encode_images([picture])")
        if errors not in ("raise", "none"):
            raise ConfigError(f'errors must be "raise" or "none", not {errors!r}')
        rows: list[FloatArray | None] = []
        for batch, features in self.encode_batches(self._read(images, errors)):
            rows.extend(
                None if place in batch.reasons else row for place, row in enumerate(features)
            )
        if errors == "none":
            return rows
        readable = [row for row in rows if row is not None]
        return np.stack(readable) if readable else np.empty((0, self.dim), np.float32)

    def _read(self, images: Sequence[Picture], errors: str) -> Iterator[PictureBatch]:
        """The pictures in batches; with `errors="raise"` an unreadable one raises ConfigError."""
        for first in range(0, len(images), self.batch_size):
            sources = images[first : first + self.batch_size]
            batch = collate_pictures(
                [read_picture(source, self.bundle.eval_transform) for source in sources]
            )
            if batch.reasons and errors == "raise":
                place, reason = next(iter(batch.reasons.items()))
                name = name_of(sources[place], first + place)
                raise ConfigError(f"cannot read {name}: {reason}")
            yield batch

    def _of_pictures(self, batch: PictureBatch) -> Tensor:
        if batch.pixels is None:
            return torch.zeros(len(batch.reasons), self.dim)
        return self._features(self._model.encode_image, batch.pixels)

    def _of_texts(self, texts: Sequence[str]) -> Tensor:
        return self._features(self._model.encode_text, self.bundle.tokenizer(texts))

    @torch.inference_mode()
    def _features(self, tower: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """One padded forward pass: n <= batch_size inputs -> (n, D) float32 of unit norm."""
        count = len(inputs)
        inputs = self._pipeline.put(inputs)
        if count < self.batch_size:
            # Copies of the first input are valid whatever the tower; zeros may not be.
            padding = inputs[:1].expand(self.batch_size - count, *inputs.shape[1:])
            inputs = torch.cat([inputs, padding])
        return F.normalize(tower(inputs).float(), dim=-1)[:count]

    def _checked(self, rows: Tensor) -> FloatArray:
        if not torch.isfinite(rows).all():
            raise ConfigError(
                "the model gives features that are not finite numbers: the checkpoint is damaged, "
                f"or precision {self.precision.name} is too narrow for it; try fp32"
            )
        numbers: FloatArray = rows.numpy()
        return numbers
