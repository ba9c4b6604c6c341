"""The splits of Karpathy and Fei-Fei (2015): one JSON file with the images and all their captions.

https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from twotower.settings import ConfigError

DOWNLOAD = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"


class KarpathyImage(NamedTuple):
    """One image: file name, its folder (COCO's alone have one), captions, split, COCO's id."""

    name: str
    folder: str
    captions: list[str]
    split: str
    coco_id: int | None


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ConfigError: it cannot be read, or is no JSON (half a download, say).
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not whole JSON ({error}); download it again") from error


def read_karpathy(path: Path) -> list[KarpathyImage]:
    """The images of `dataset_flickr30k.json`, `dataset_coco.json` or `dataset_flickr8k.json`.

    Raises:
        ConfigError: it cannot be read, or is another JSON file.
    """
    try:
        return [
            KarpathyImage(
                name=image["filename"],
                folder=image.get("filepath", ""),
                captions=[text for s in image["sentences"] if (text := s["raw"].strip())],
                split=image["split"],
                coco_id=image.get("cocoid"),
            )
            for image in read_json(path)["images"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no list of images with filename, sentences and split ({error!r}); "
            f"take the one in {DOWNLOAD}"
        ) from error
