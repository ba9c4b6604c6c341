"""Checkpoints: our own format, and what is read from and written to the formats of others."""
