"""The Sessa model in PyTorch; every file has its twin in sessa_mlx."""
