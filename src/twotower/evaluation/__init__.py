"""What a checkpoint is worth: retrieval in both directions, with intervals."""
