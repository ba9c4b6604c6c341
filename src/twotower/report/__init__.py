"""Which variant wins: the measurements of all runs side by side."""
