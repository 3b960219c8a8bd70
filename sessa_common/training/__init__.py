"""Training: the run folder, the training loop and its metrics."""
