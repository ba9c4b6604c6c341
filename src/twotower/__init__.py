"""twotower trains, compares and serves CLIP variants on your own image-text data."""

__version__ = "0.1.0"
