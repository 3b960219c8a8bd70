"""Inference: generation, sampling and evaluation, the same for every runtime."""
