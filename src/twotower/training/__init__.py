"""Training: the loop, the loss and the optimiser."""
