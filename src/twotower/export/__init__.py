"""Checkpoints in the formats of others, each read again by its own reader before it is kept."""
