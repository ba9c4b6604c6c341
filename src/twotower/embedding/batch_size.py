"""`encode.batch_size=auto`: the number of rows a forward pass at which the tower is fastest."""

from __future__ import annotations

import logging
import time

import torch
from PIL import Image

from twotower.embedding.encoder import Encoder
from twotower.embedding.pictures import PictureBatch

log = logging.getLogger(__name__)

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
MOST_ON_CPU = 128
SECONDS = 20.0  # after which no larger one is tried
GAIN = 1.05  # a larger batch must be faster by as much, for it takes more memory


def find_batch_size(encoder: Encoder, *, images: bool) -> int:
    """Try larger and larger batches until they are not faster, or do not fit into memory.

    Args:
        images: whether pictures are encoded, or captions alone.
    """
    before, began = encoder.batch_size, time.monotonic()
    best, best_rate = SIZES[0], 0.0
    try:
        for size in SIZES:
            on_cpu = encoder.device.type == "cpu"
            if (on_cpu and size > MOST_ON_CPU) or time.monotonic() - began > SECONDS:
                break
            encoder.batch_size = size
            try:
                rate = _rate(encoder, size, images)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            if rate > best_rate * GAIN:
                best, best_rate = size, rate
            elif size > 2 * best:
                break
    finally:
        encoder.batch_size = before
    log.info("encode.batch_size=auto: %d rows a forward pass, %.1f rows/s", best, best_rate)
    return best


def _rate(encoder: Encoder, size: int, images: bool) -> float:
    """Rows a second, after a first pass that warms up."""
    pixels = encoder.bundle.eval_transform(Image.new("RGB", (64, 64)))
    batch = PictureBatch(pixels.expand(size, *pixels.shape).contiguous(), {})
    texts = ["a photo"] * size
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        if images:
            encoder.encode_batch(batch)
        else:
            encoder.encode_texts(texts)
        seconds.append(time.perf_counter() - start)
    return size / min(seconds[1:])
