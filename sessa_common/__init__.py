"""What the two Sessa implementations agree on; imports neither MLX nor PyTorch."""
