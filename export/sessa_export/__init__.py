"""ONNX export of a checkpoint, its check and a small runner; needs neither MLX nor PyTorch."""
