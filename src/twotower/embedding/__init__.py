"""From a checkpoint to embeddings: the encoder, the store, and the export over many processes."""
