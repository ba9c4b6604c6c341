"""`twotower encode`: a checkpoint and a source -> an embedding store."""

from __future__ import annotations

from pathlib import Path

from twotower.config import Config, FreeText
from twotower.console import say
from twotower.embedding.export import existing_checkpoint, export
from twotower.embedding.legacy import check_legacy_folder, write_legacy
from twotower.embedding.source import pairs_to_encode
from twotower.embedding.store import EmbeddingStore
from twotower.runs import checkpoint_path, store_path


def run(config: Config, free: FreeText) -> None:
    """Encode `path=` or the data section with the run's checkpoint, and say where the store is."""
    checkpoint = existing_checkpoint(checkpoint_path(config))
    if config.encode.legacy_output:  # before hours of work
        check_legacy_folder(Path(config.encode.legacy_output))
    pairs = pairs_to_encode(config.data, free.path, config.encode)
    pairs = pairs.split(config.encode.split).head(config.encode.limit)
    output = Path(config.encode.output) if config.encode.output else store_path(config)
    result = export(checkpoint, pairs, output, config.encode, config.distributed)
    if result is not None:
        say(result.sentence())
        if config.encode.legacy_output and result.manifest.complete:
            files = write_legacy(EmbeddingStore.open(output), Path(config.encode.legacy_output))
            say(f"wrote {files} files of the older layout into {config.encode.legacy_output}")
