"""Data sources: each module registers a function `config -> PairTable` beside its config class."""

from twotower.data import (
    class_folders,
    coco,
    flickr8k,
    flickr30k,
    folder,
    hf_dataset,
    manifest,
    openmoji,
    synthetic,
    webdataset,
    yfcc100m,
)
from twotower.data.pairs import DATASETS, Batch, Collate, ImageTextDataset, Pair, PairTable

__all__ = [
    "DATASETS",
    "Batch",
    "Collate",
    "ImageTextDataset",
    "Pair",
    "PairTable",
    "class_folders",
    "coco",
    "flickr8k",
    "flickr30k",
    "folder",
    "hf_dataset",
    "manifest",
    "openmoji",
    "synthetic",
    "webdataset",
    "yfcc100m",
]
