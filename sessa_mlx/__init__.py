"""The Sessa model in MLX; every file has its twin in sessa_torch."""
